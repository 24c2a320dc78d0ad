# SPDX-License-Identifier: Apache-2.0
"""lean-kernels info"""

from typing import Annotated

import typer

from lean_kernels.cli.common import Debug, console


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, and which kernels run here (or why they do not)."""
    from lean_kernels.info import collect

    report = collect()
    if as_json:
        import json

        typer.echo(json.dumps(report, indent=2))
        return

    from rich.markup import escape
    from rich.table import Table

    cpu, gpu = report["cpu"], report["gpu"]
    facts = {name: report[name] for name in ("lean_kernels", "python", "torch", "platform")}
    facts["CPU"] = f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']}"
    facts["instruction sets"] = cpu["instruction_sets"]
    facts["CPU kernels use"] = cpu["kernels_use"] or "no kernels loaded: see the table"
    facts["LEAN_KERNELS_CPU_ISA"] = cpu["LEAN_KERNELS_CPU_ISA"] or "not set"
    facts["GPU"] = gpu["devices"] or "none seen by torch"
    facts["torch built for"] = " ".join(
        f"{name.upper()} {gpu[name]}" for name in ("cuda", "rocm") if gpu[name]
    )
    facts |= {name: version or "not installed" for name, version in report["packages"].items()}
    listing = Table(box=None, show_header=False)
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        listing.add_row(name, escape(text or "CPU only"))
    screen = console()
    screen.print(listing)

    if isinstance(report["ops"], str):
        screen.print(f"ops: {escape(report['ops'])}")
        return
    table = Table("op", "backend", "runs here")
    for op, backends in report["ops"].items():
        for backend, status in backends.items():
            table.add_row(op, backend, escape(status))
    screen.print(table)
