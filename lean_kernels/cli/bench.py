# SPDX-License-Identifier: Apache-2.0
"""lean-kernels bench"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lean_kernels.cli.common import Debug


def bench(
    case: Annotated[
        str, typer.Argument(help="block_sparse_linear, embeddings, token_dropping, ...")
    ],
    suite: Annotated[str | None, typer.Option(help="quick, full, numbers, ...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --suite quick.")] = False,
    impl: Annotated[str | None, typer.Option(help="Time this implementation of the op.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads; default as torch has.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds per configuration.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Filter, field=value[,value].")] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    break_even: Annotated[Path | None, typer.Option(help="Write densities here.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Write under bench/results.")] = False,
    debug: Debug = False,
) -> None:
    """Check kernels and their competitors against float64, then time them side by side."""
    import lean_kernels

    checkout = Path(lean_kernels.__file__).parents[1]
    for root in (checkout, Path.cwd()):
        if (root / "bench" / "run.py").is_file():
            sys.path.insert(0, str(root))
            break
    else:
        raise FileNotFoundError(
            f"no folder bench/ in {checkout} or here: benchmarks come with the source, not with "
            "the installed package; clone the repository and run this command inside it"
        )
    from bench import run

    code = run.main(
        case,
        suite=suite,
        quick=quick,
        impl=impl,
        device=device,
        threads=threads,
        budget=budget,
        only=only or (),
        json_out=json,
        markdown_out=markdown,
        plot_out=plot,
        break_even_out=break_even,
        save=save,
    )
    raise typer.Exit(code)
