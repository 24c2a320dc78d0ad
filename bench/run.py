# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark case: `python -m bench.run CASE --quick`."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import break_even, environment, peak, plot, registry, report, runner

RESULTS = Path(__file__).parent / "results"
QUICK = 0.5  # of the seconds a configuration is worth
WRONG, MISSED = 1, 3


def main(
    case: str,
    *,
    suite: str | None = None,
    quick: bool = False,
    impl: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    budget: float | None = None,
    only: Sequence[str] = (),
    json_out: str | Path | None = None,
    markdown_out: str | Path | None = None,
    plot_out: str | Path | None = None,
    break_even_out: str | Path | None = None,
    save: bool = False,
    console: Console | None = None,
) -> int:
    """Check and time a case, print its tables, write what is asked for.

    Args:
        case: one of `bench.registry.CASES`, or of its GROUPS, which runs each of them.
        suite: a list of configurations of the case; "numbers" evaluates the promised numbers.
            Default "full", with `quick` "quick".
        impl: time this implementation of the op instead of the layer.
        device: "cpu" or "cuda".
        threads: torch's intra-op threads; default as torch is set now.
        budget: seconds of timing per configuration.
        only: filters `field=value[,value...]` on the fields of a configuration.
        json_out, markdown_out, plot_out: files to write.
        break_even_out: file for break-even densities, dtype -> block shape -> density.
        save: also write JSON, Markdown and any plot under bench/results/<device>/.

    Returns:
        0; 1 if a result was wrong (that configuration is not timed); 3 if suite "numbers" found a
        promised number missed. ValueError for a name, filter or device that does not exist, or a
        file to write for a group.
    """
    if case in registry.GROUPS:
        if any((json_out, markdown_out, plot_out, break_even_out)):
            raise ValueError(
                f"{case} is {', '.join(registry.GROUPS[case])}: name one of these to write a file, "
                "or save all"
            )
        options = {"suite": suite, "quick": quick, "impl": impl, "device": device}
        options |= {"threads": threads, "budget": budget, "only": only}
        options |= {"save": save, "console": console}
        codes = [main(name, **options) for name in registry.GROUPS[case]]
        return WRONG if WRONG in codes else max(codes)
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 180)  # tables in a log or a pipe need not fold
    definition = registry.load(case)
    suite = suite or ("quick" if quick else "full")
    budget = budget or definition.budget * (QUICK if suite == "quick" else 1)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; expected 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available in this process; use 'cpu'")
    for label, value in (("threads", threads), ("budget", budget)):
        if value is not None and value <= 0:
            raise ValueError(f"{label} must be positive, got {value}")
    configs = registry.select(definition, suite, only)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        run = _run(definition, suite, configs, impl, device, budget, console)
    finally:
        torch.set_num_threads(before)
    run["settings"]["only"] = list(only)
    report.show(definition, run, console)
    folder = RESULTS / environment.device_slug(run["environment"]) if save else None
    name = case if suite == "full" else f"{case}-{suite}"
    writers = {
        ".json": (json_out, partial(report.write_json, run)),
        ".md": (markdown_out, partial(report.write_markdown, definition, run)),
        ".png": (plot_out, partial(plot.speedup_over_density, run)),
    }
    for suffix, (asked, write) in writers.items():
        saves = folder and (suffix != ".png" or plot.plottable(run))
        for path in (asked, folder / f"{name}{suffix}" if saves else None):
            if path is not None:
                write(Path(path))
                console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if break_even_out is not None:
        report.write_json(run["break_even"], Path(break_even_out))
    wrong = [record["refused"] for record in run["records"] if "refused" in record]
    for problem in wrong:
        console.print(f"[red]wrong result, not timed:[/] {problem}", highlight=False)
    if wrong:
        return WRONG
    return MISSED if any(not result["pass"] for result in run["requirements"]) else 0


def _run(definition, suite, configs, impl, device, budget, console) -> dict:
    threads = torch.get_num_threads()
    options = registry.Options(threads=threads, device=device, impl=impl)
    found = environment.collect(device, threads)
    if environment.is_busy(found):
        load, cores = found["load_average"][0], found["cores"]
        console.print(
            f"[yellow]load {load:.1f} on {cores} cores: other processes will distort these times"
        )
    roof = peak.roof(threads) if device == "cpu" else {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    records = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(definition.name, total=len(configs))
        for config in configs:
            records.append(
                runner.run_config(
                    definition, config, options, budget=budget, roof=roof.get("fma_gflops")
                )
            )
            progress.advance(task)
    numbers = definition.requirements if suite == "numbers" else ()
    return {
        "schema": report.SCHEMA,
        "case": definition.name,
        "suite": suite,
        "environment": found,
        "roof": roof,
        "settings": {"threads": threads, "device": device, "impl": impl, "budget_s": budget},
        "records": records,
        "break_even": break_even.table(records),
        "requirements": report.evaluate(numbers, records),
    }


if __name__ == "__main__":
    from lean_kernels.cli import app

    app(["bench", *sys.argv[1:]], prog_name="lean-kernels")
