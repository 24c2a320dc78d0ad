# SPDX-License-Identifier: Apache-2.0
"""lean-kernels demo"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lean_kernels.cli.common import (
    Debug,
    Force,
    check_device,
    console,
    model_path,
    progress_bar,
    require_transformers,
)


def _numbers(option: str, text: str, valid: Callable[[float], bool], range_: str):
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(valid, numbers)):
        raise ValueError(f"{option}: expected numbers {range_} with commas, got {text!r}")
    return tuple(dict.fromkeys(numbers))


def demo(
    model: Annotated[str, typer.Option(help="A directory, a hub id, or minilm.")] = "minilm",
    texts: Annotated[
        Path | None, typer.Option(help="One text per line; without it, 250 shipped sentences.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for models, table and plot.")] = Path(
        "out/demo"
    ),
    densities: Annotated[str, typer.Option(help="Fractions kept.")] = "0.9,0.75,0.5,0.35,0.2,0.1",
    speeds: Annotated[
        str, typer.Option(help="Of token dropping, 0 packs only; none with an empty string.")
    ] = "0,1,2,3,4",
    compressions: Annotated[
        str, typer.Option(help="Of the vocabulary; none with an empty string.")
    ] = "2,4,10,20",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes, if time allows.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compare a dense encoder with lean ones: speed, size, and how faithful the embeddings stay."""
    from lean_kernels import _extension
    from lean_kernels import demo as comparison
    from lean_kernels._files import check_replaceable
    from lean_kernels.evaluation import read_texts

    check_replaceable(out, comparison.MARKER, force)
    check_device(device)
    kept = _numbers("--densities", densities, lambda x: 0 < x <= 1, "in (0, 1]")
    chosen = _numbers("--speeds", speeds, lambda x: 0 <= x < 100, "from 0 to 100") if speeds else ()
    smaller = ()
    if compressions:
        smaller = _numbers("--compressions", compressions, lambda x: 1 < x <= 1000, "above 1")
    path = model_path(model)
    lines = read_texts(texts)
    require_transformers()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with progress_bar() as progress:
        result = comparison.run(
            path,
            lines,
            out,
            densities=kept,
            speeds=chosen,
            compressions=smaller,
            batch_size=batch_size,
            rounds=rounds,
            device=device,
            overwrite=force,
            title="all-MiniLM-L6-v2" if model == "minilm" else model,
            progress=progress,
        )
    _print_comparison(result)
    if device == "cpu" and (reason := _extension.load_cpu()) is not None:
        typer.echo(f"warning: without CPU kernels lean layers run on slow plain PyTorch: {reason}")
    if find_spec("matplotlib") is None:
        typer.echo("plot     skipped: pip install matplotlib")
    else:
        typer.echo(f"plot     {out / comparison.PLOT}")
    typer.echo(f"results  {out / comparison.RESULTS}")
    for row in result.rows[1:]:
        typer.echo(f"model    {row.path}")


def _print_comparison(result) -> None:
    from rich.table import Table

    table = Table(
        *("what", "tokens kept", "ms", "speed-up", "sparse layers", "parameters"),
        *("MB on disk", "cosine", "Spearman"),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.rows:
        table.add_row(
            row.what,
            "-" if row.kept is None else f"{row.kept:.2f}",
            f"{row.milliseconds:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.sparse_layers} of {result.layers}",
            f"{row.parameters / 1e6:.1f} M",
            f"{row.bytes_on_disk / 1e6:.1f}",
            f"{row.cosine:.4f}",
            f"{row.spearman:.4f}",
        )
    typer.echo(
        f"{result.model}: {result.texts} texts, {result.tokens} tokens in "
        f"batches of {result.batch_size}, {result.threads} threads on {result.device}; "
        f"median of {result.rounds} passes, dense and lean in turn"
    )
    console().print(table)
    typer.echo(
        "cosine: mean over texts of lean against dense embedding; Spearman: of all pairwise "
        "similarities, lean against dense."
    )
    typer.echo(
        "Every lean model was saved and reloaded by stock AutoModel.from_pretrained; the weights "
        "came back bit for bit; largest difference of an embedding: "
        f"{result.largest_reload_difference:g}."
    )
    if any(row.speed is not None for row in result.rows):
        typer.echo(
            "packed: no padding, every token stays, exact to rounding. speed: tokens dropped layer "
            "by layer by a profile measured on these texts; tokens kept: mean over the layers."
        )
    if result.vocabulary:
        _print_vocabulary(result)
    typer.echo(
        "Nothing here was trained after dropping weights or tokens: accuracy at low density or "
        "high speed needs training with them dropped, which is what the papers do."
    )


def _print_vocabulary(result) -> None:
    from rich.table import Table

    from lean_kernels.demo_vocabulary import EPOCHS

    table = Table("vocabulary", "rank", "MB", "smaller", "lookup ms", "cosine", "Spearman", "fit s")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.vocabulary:
        table.add_row(
            row.what,
            "-" if row.rank is None else str(row.rank),
            f"{row.table_bytes / 1e6:.2f}",
            f"{row.compression:.1f}x",
            f"{row.milliseconds:.2f}",
            f"{row.cosine:.4f}",
            f"{row.spearman:.4f}",
            f"{row.fit_seconds:.1f}",
        )
    console().print(table)
    typer.echo(
        f"Vocabulary: the tables alone were fitted, for {EPOCHS['autoencoder']} epochs "
        f"(autoencoder) and {EPOCHS['morphte']} (MorphTE), which is few; MorphTE is made to be "
        "trained with the model. lookup: all texts through the embedding. A fit that knows how "
        "often tokens occur (`texts` in a recipe) keeps far more."
    )
