# SPDX-License-Identifier: Apache-2.0
"""lean-kernels profile"""

import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lean_kernels.cli.common import (
    Debug,
    check_device,
    console,
    load_model,
    model_path,
    progress_bar,
    require_transformers,
)

DIGITS = 4  # of a fraction in the recipe: less than a token in a thousand


def profile(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the word minilm.")],
    texts: Annotated[Path, typer.Option(help="Texts like those to come, one per line.")],
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.toml"),
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose other rules the new one keeps.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of it, a PNG.")] = None,
    statistic: Annotated[
        str, typer.Option(help="median, mean, or a quantile in (0, 1), of the tokens' scores.")
    ] = "median",
    threshold: Annotated[
        float | None, typer.Option(help="Keep as many tokens as reach this times the statistic.")
    ] = None,
    mean_kept: Annotated[
        float | None, typer.Option(help="Rescale to this mean of the kept fractions.")
    ] = None,
    exclude_diagonal: Annotated[
        bool, typer.Option("--exclude-diagonal", help="Leave out what a token pays itself.")
    ] = False,
    speed: Annotated[float | None, typer.Option(help="The recipe's speed; 1 leaves it.")] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Find the speed predicted to be this much faster.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=0, help="Timed passes; 0 measures no time.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace --out and --plot.")] = False,
    debug: Debug = False,
) -> None:
    """Measure which tokens a model can do without, layer by layer, and write it into a recipe."""
    from lean_kernels._files import check_new_file, write_file

    if speed is not None and target_speedup is not None:
        raise ValueError("give --speed or --target-speedup, not both")
    check_new_file(out, force)
    if plot is not None:
        if find_spec("matplotlib") is None:
            raise ImportError("--plot needs matplotlib: pip install matplotlib")
        check_new_file(plot, force)
    for path in (texts, recipe):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
    check_device(device)
    where = model_path(model)
    require_transformers()

    from lean_kernels import _toml, evaluation
    from lean_kernels.compress import tokens
    from lean_kernels.recipe import Recipe, TokenRule

    rules = Recipe() if recipe is None else Recipe.from_toml(recipe)
    dense, tokenizer = load_model(where)
    if tokenizer is None:
        raise ValueError(f"{where} has no tokenizer, so no text can be measured")
    longest = evaluation.longest_text(tokenizer, dense)
    dense = dense.float().eval().to(device)
    lines = evaluation.read_texts(texts)
    batches = [i for _, i in evaluation.make_batches(tokenizer, lines, batch_size, longest, device)]

    with progress_bar() as progress:
        total = len(batches) + rounds + 1

        def step(done: int, what: str) -> None:
            progress(done, total, what)

        measured = tokens.measure_scores(
            dense,
            batches,
            exclude_diagonal=exclude_diagonal,
            progress=lambda done: step(done, "measure scores"),
        )
        options = {"threshold": threshold, "mean_kept": mean_kept}
        found = tokens.derive_profile(measured, statistic=_statistic(statistic), **options)
        found = tuple(max(round(value, DIGITS), 10.0**-DIGITS) for value in found)
        lengths = measured.lengths
        padded = [inputs["input_ids"].shape[1] for inputs in batches for _ in inputs["input_ids"]]
        if target_speedup is not None:
            speed = tokens.speed_for(found, target_speedup, lengths, dense.config, padded=padded)
        rule = TokenRule(
            profile=found,
            speed=1.0 if speed is None else round(speed, DIGITS),
            exclude_diagonal=exclude_diagonal,
        )
        rows = _speeds(dense, rule, batches, lengths, padded, rounds, step)
        kept = tokens.rescale(rule.profile, rule.speed)
        text = _toml.dumps(replace(rules, tokens=rule).to_dict())
        write_file(out, text.encode(), force)
        if plot is not None:
            write_file(plot, _png(model, rule, kept, len(lines), int(lengths.sum())), force)
        step(total, "")
    _print(rule, kept, rows)
    typer.echo(f"recipe   {out}")
    if plot is not None:
        typer.echo(f"plot     {plot}")


def _statistic(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _speeds(dense, rule, batches, lengths, padded, rounds: int, step) -> list[tuple]:
    """(what, predicted speed-up, measured milliseconds or None) of padded, packed and dropping."""
    import copy

    import numpy as np
    import torch

    import lean_kernels as lk
    from lean_kernels.compress import tokens

    config = dense.config
    predicted = {
        "padded": 1.0,
        "packed, nothing dropped": tokens.predict_speedup(None, lengths, config, padded=padded),
        "packed, by the recipe": tokens.predict_speedup(
            tokens.rescale(rule.profile, rule.speed), lengths, config, padded=padded
        ),
    }
    if not rounds:
        return [(name, value, None) for name, value in predicted.items()]
    packed = replace(rule, profile=None, speed=1.0)
    models = [
        dense,
        *(lk.convert(copy.deepcopy(dense), {"tokens": r.to_dict()}) for r in (packed, rule)),
    ]
    seconds = []
    with torch.inference_mode():
        for model in models:
            model(**batches[-1])
        for done in range(rounds):
            step(len(batches) + done, f"time, round {done + 1} of {rounds}")
            times = [time.perf_counter()]
            for model in models:
                for inputs in batches:
                    model(**inputs)[0].sum().item()  # waits for a GPU
                times.append(time.perf_counter())
            seconds.append(np.diff(times))
    medians = (1e3 * np.median(seconds, axis=0)).tolist()
    return [(name, value, ms) for (name, value), ms in zip(predicted.items(), medians, strict=True)]


def _print(rule, kept, rows) -> None:
    from rich.table import Table

    table = Table("layer", "profile", f"kept at speed {rule.speed:g}")
    for layer, (value, now) in enumerate(zip(rule.profile, kept, strict=True)):
        table.add_row(str(layer), f"{value:.3f}", f"{now:.3f}")
    table.add_row("mean", *(f"{sum(column) / len(kept):.3f}" for column in (rule.profile, kept)))
    screen = console()
    screen.print(table)
    table = Table("encoder", "predicted speed-up", "measured speed-up", "ms")
    for name, predicted, ms in rows:
        measured = ("-", "-") if ms is None else (f"{rows[0][2] / ms:.2f}x", f"{ms:.0f}")
        table.add_row(name, f"{predicted:.2f}x", *measured)
    screen.print(table)
    typer.echo(
        "Speed-ups are over the padded model; predictions count the encoder's products alone, "
        "measurements are of the whole model."
    )


def _png(model: str, rule, kept, texts: int, count: int) -> bytes:
    from io import BytesIO

    from matplotlib.figure import Figure

    layers = range(1, len(kept) + 1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.step([0, *layers], [1, *rule.profile], "o-", where="post", label="profile")
    if rule.speed != 1:
        axes.step([0, *layers], [1, *kept], "s--", where="post", label=f"at speed {rule.speed:g}")
        axes.legend()
    axes.set(xlabel="layers passed", ylabel="fraction of tokens left", ylim=(0, 1.05))
    axes.set(title=f"{model}: {texts} texts, {count} tokens")
    axes.grid(alpha=0.3)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()
