# SPDX-License-Identifier: Apache-2.0
"""lean-kernels convert"""

from pathlib import Path
from typing import Annotated

import typer

from lean_kernels.cli.common import (
    Debug,
    Force,
    console,
    load_model,
    model_path,
    progress_bar,
    require_transformers,
)


def convert(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the word minilm.")],
    recipe: Annotated[Path, typer.Option(help="TOML: which modules become what.")],
    out: Annotated[Path, typer.Option(help="Directory for the lean model and its tokenizer.")],
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a model lean by a recipe, and save it for AutoModel.from_pretrained."""
    from lean_kernels._files import check_replaceable
    from lean_kernels.integrations.model_card import MARKER

    if not recipe.exists():
        raise FileNotFoundError(f"recipe {recipe} does not exist")
    path = model_path(model)
    if out.exists() and Path(path).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} holds the model itself, which would be lost; choose another")
    check_replaceable(out, MARKER, force)
    require_transformers()

    import lean_kernels as lk
    from lean_kernels.integrations.transformers import save

    rules = lk.Recipe.from_toml(recipe)
    dense, tokenizer = load_model(path)
    with progress_bar() as progress:
        lean = lk.convert(dense, rules, tokenizer=tokenizer, progress=progress)
        save(lean, out, tokenizer=tokenizer, overwrite=force)
    _print_report(lean.lean_report())
    typer.echo(f"saved {out}" + ("" if tokenizer else " (the model has no tokenizer)"))
    typer.echo(f"load it: import lean_kernels; model = lean_kernels.load({str(out)!r})")


def _print_report(report) -> None:
    from rich.markup import escape
    from rich.table import Table

    header, *rows = report.rows()
    table = Table(*header)
    for column in table.columns[1:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    screen = console()
    screen.print(table)
    screen.print(report.summary())
