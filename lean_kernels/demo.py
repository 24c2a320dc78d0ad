# SPDX-License-Identifier: Apache-2.0
"""The trade-off on a real encoder: how fast, how small and how faithful it is, as weights or tokens
are dropped or its vocabulary is compressed.

Weights are pruned by block magnitude, tokens dropped by a measured profile, and nothing is trained
afterwards: low densities and high speeds show the price of dropping alone.
"""

import copy
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels import demo_vocabulary
from lean_kernels._files import Marker, atomic_directory
from lean_kernels.architectures import find_encoders
from lean_kernels.compress.tokens import measure_profile
from lean_kernels.demo_vocabulary import VocabularyRow
from lean_kernels.evaluation import (
    embed,
    fidelity,
    load_tokenizer,
    longest_text,
    make_batches,
)
from lean_kernels.nn.token_profile import rescale

MIN_ROUNDS, BUDGET_SECONDS = 3, 90.0  # a slow machine stops timing early
RESULTS = "results.json"
MARKER = Marker(RESULTS, '"largest_reload_difference"')
PLOT = "tradeoff.png"


@dataclass
class Row:
    """One model of the comparison: the dense one, one with dropped weights, or with dropped tokens.

    The fields that say what was dropped are None where nothing of the kind was.
    """

    what: str
    density: float | None  # fraction of weight blocks kept
    speed: float | None  # of the token profile; 0 is packed, with no token dropped
    kept: float | None  # mean over the layers of the fraction of tokens kept
    milliseconds: float  # all texts once, median over the rounds
    speedup: float  # dense milliseconds / these
    parameters: int
    bytes_on_disk: int  # weight files only
    cosine: float  # mean over the texts, embedding here against dense
    spearman: float  # of all pairwise similarities, here against dense
    sparse_layers: int  # convert leaves a layer dense where that is faster
    path: str | None


@dataclass
class Result:
    """What `run` measured. `rows[0]` is the dense model."""

    model: str
    texts: int
    tokens: int
    batch_size: int
    rounds: int
    threads: int
    device: str
    layers: int  # linear layers that were offered to convert
    profile: list[float] | None  # of tokens, at speed 1; None: no encoder that can drop any
    largest_reload_difference: float  # of embeddings, converted in memory against reloaded
    rows: list[Row]
    vocabulary: list[VocabularyRow]  # the dense table first; empty where none was asked for


def _linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside numbered, that is repeated, blocks."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and re.search(r"\.\d+\.", name)
    ]


def encoder_recipe(
    model: nn.Module, density: float, block_shape: tuple[int, int] = (32, 32)
) -> "lk.Recipe":
    """A recipe for every linear layer inside the model's repeated blocks.

    Layers outside of them (embeddings, pooler, heads) stay dense.
    """
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in _linears(model))
    if not patterns:
        raise ValueError(f"{type(model).__name__} has no linear layers inside repeated blocks")
    rule = {"block_shape": list(block_shape), "density": density}
    return lk.Recipe.from_dict({"linear": {pattern: dict(rule) for pattern in patterns}})


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _saved_bytes(model: nn.Module) -> int:
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return _weight_bytes(Path(directory))


@dataclass(frozen=True)
class _Variant:
    """A lean model to be: one of density and speed is given."""

    density: float | None = None
    speed: float | None = None

    @property
    def what(self) -> str:
        if self.density is not None:
            return f"density {self.density:g}"
        return f"speed {self.speed:g}" if self.speed else "packed"

    @property
    def directory(self) -> str:
        return self.what.replace(" ", "-")

    def recipe(self, dense: nn.Module, block_shape, profile) -> "lk.Recipe":
        if self.density is not None:
            return encoder_recipe(dense, self.density, block_shape)
        rule = {"packed": True}
        if self.speed:
            rule |= {"profile": profile, "speed": self.speed}
        return lk.Recipe.from_dict({"tokens": rule})

    def kept(self, profile) -> float | None:
        if self.speed is None:
            return None
        return float(np.mean(rescale(profile, self.speed)))


def _measure(dense: nn.Module, batches: list) -> list[float] | None:
    """The model's token profile on these texts; None where it has no encoder that can drop any."""
    if len(find_encoders(dense)) != 1:
        return None
    found = measure_profile(dense, [inputs for _, inputs in batches])
    return [round(value, 4) for value in found]


def _check_same_bits(converted: nn.Module, reloaded: nn.Module, directory: Path) -> None:
    ours, theirs = converted.state_dict(), reloaded.state_dict()
    different = sorted(ours.keys() ^ theirs.keys()) or [
        name for name in ours if not torch.equal(ours[name], theirs[name])
    ]
    if different:
        raise RuntimeError(
            f"{directory}: the reloaded model is not the converted one: {', '.join(different[:3])}"
        )


def run(
    model_name: str | Path,
    texts: Sequence[str],
    out: Path,
    *,
    densities: Sequence[float],
    speeds: Sequence[float] = (),
    compressions: Sequence[float] = (),
    block_shape: tuple[int, int] = (32, 32),
    batch_size: int = 32,
    rounds: int = 7,
    device: str = "cpu",
    overwrite: bool = False,
    title: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Result:
    """Convert a model at several densities and speeds, save, reload, compare with the dense one.

    Times leave tokenisation out and take dense and lean in turn, on the same batches. What is timed
    and compared is the reloaded model, after a check that it holds the bits of the converted one.

    Args:
        model_name: a directory or hub id that `AutoModel` loads as a text encoder.
        texts: at least 3.
        out: gets one saved model per density and speed, and RESULTS; written whole or not at all.
        densities: fractions of weight blocks to keep.
        speeds: of the token profile measured on the texts; 0 packs and drops nothing. Passed over
            where the model has no encoder that LeanEncoder knows.
        rounds: timed passes over all texts; after BUDGET_SECONDS only MIN_ROUNDS are waited for.
        compressions: of the vocabulary, in bytes; each is compared for three kinds. None of these
            models is saved.
        overwrite: replace an earlier output in `out`.
        title: what to call the model in the results; default its name.
        progress: called as progress(done, total, name) before each step and once at the end.
    """
    from transformers import AutoModel

    from lean_kernels.integrations.transformers import save

    total = len(densities) + len(speeds) + demo_vocabulary.steps(compressions) + rounds + 4
    done = itertools.count()

    def step(name: str) -> None:
        progress(next(done), total, name)

    with atomic_directory(out, MARKER, overwrite) as scratch:
        step("load the dense model")
        dense = AutoModel.from_pretrained(model_name, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(model_name)
        if tokenizer is None:
            raise ValueError(f"{model_name} has no tokenizer, so no text can be embedded")
        longest = longest_text(tokenizer, dense)
        batches = make_batches(tokenizer, texts, batch_size, longest, device)
        models, sizes, differences = [dense], [_saved_bytes(dense)], [0.0]
        dense.to(device)
        step("measure which tokens matter")
        profile = _measure(dense, batches) if speeds else None
        variants = [_Variant(density=density) for density in densities]
        if profile is not None:
            variants += [_Variant(speed=speed) for speed in speeds]
        for variant in variants:
            step(f"convert: {variant.what}")
            converted = lk.convert(
                copy.deepcopy(dense), variant.recipe(dense, block_shape, profile)
            )
            directory = scratch / variant.directory
            save(converted, directory, tokenizer=tokenizer)
            reloaded = AutoModel.from_pretrained(directory).eval().to(device)
            _check_same_bits(converted, reloaded, directory)
            difference = embed(converted, batches[:1]) - embed(reloaded, batches[:1])
            differences.append(difference.abs().max().item())
            models.append(reloaded)
            sizes.append(_weight_bytes(directory))

        step("compare embeddings")
        embeddings = [embed(model, batches) for model in models]
        seconds = _seconds(models, batches, rounds, step)
        milliseconds = (1e3 * np.median(seconds, axis=0)).tolist()
        rows = []
        for index, variant in enumerate((None, *variants)):
            cosine, rank_correlation = fidelity(embeddings[0], embeddings[index])
            modules, parameters = models[index].modules(), models[index].parameters()
            rows.append(
                Row(
                    what="dense" if variant is None else variant.what,
                    density=None if variant is None else variant.density,
                    speed=None if variant is None else variant.speed,
                    kept=None if variant is None else variant.kept(profile),
                    milliseconds=milliseconds[index],
                    speedup=milliseconds[0] / milliseconds[index],
                    parameters=sum(parameter.numel() for parameter in parameters),
                    bytes_on_disk=sizes[index],
                    cosine=cosine,
                    spearman=rank_correlation,
                    sparse_layers=sum(isinstance(m, lk.nn.BlockSparseLinear) for m in modules),
                    path=None if variant is None else str(Path(out) / variant.directory),
                )
            )
        vocabulary = []
        if compressions:
            vocabulary = demo_vocabulary.compare(
                dense,
                tokenizer,
                batches,
                embeddings[0],
                scratch,
                compressions=compressions,
                rounds=rounds,
                step=step,
            )
        result = Result(
            model=title or str(model_name),
            texts=len(texts),
            tokens=sum(int(inputs["attention_mask"].sum()) for _, inputs in batches),
            batch_size=batch_size,
            rounds=len(seconds),
            threads=torch.get_num_threads(),
            device=device,
            layers=len(_linears(dense)),
            profile=profile,
            largest_reload_difference=max(differences),
            rows=rows,
            vocabulary=vocabulary,
        )
        (scratch / RESULTS).write_text(json.dumps(asdict(result), indent=2) + "\n")
        step("plot")
        if find_spec("matplotlib") is not None:
            plot(result, scratch / PLOT)
    step("")
    return result


def _seconds(models: list, batches: list, rounds: int, step: Callable[[str], None]) -> np.ndarray:
    """Seconds over all batches [rounds, models], taken in turn."""
    seconds = []
    for number in range(rounds):
        step(f"time, round {number + 1} of {rounds}")
        times = [time.perf_counter()]
        for model in models:
            embed(model, batches)  # ends with a copy to the CPU, so a GPU has finished
            times.append(time.perf_counter())
        seconds.append(np.diff(times))
        if number + 1 >= MIN_ROUNDS and np.sum(seconds) > BUDGET_SECONDS:
            break
    return np.array(seconds)


def plot(result: Result, path: Path) -> None:
    """Speed-up and fidelity over density, and one against the other for all, as a PNG."""
    from matplotlib.figure import Figure

    sparse = [row for row in result.rows if row.density is not None]
    dropping = [row for row in result.rows if row.speed is not None]
    densities = [row.density for row in sparse]
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    speed, faith, trade = figure.subplots(1, 3)

    speed.plot(densities, [row.speedup for row in sparse], "o-", color="tab:blue")
    speed.axhline(1, color="gray", linestyle="--", linewidth=1)
    speed.annotate("as fast as dense", (0.02, 1), (0, -4), textcoords="offset points", va="top")
    for row in sparse:
        speed.annotate(
            f"{row.speedup:.2f}x",
            (row.density, row.speedup),
            (6, 6),
            textcoords="offset points",
        )
    top = 1.15 * max(1, *(row.speedup for row in result.rows))
    speed.set(title="Speed-up over dense, end to end", ylabel="speed-up", ylim=(0, top))

    faith.plot(densities, [row.cosine for row in sparse], "o-", label="mean cosine")
    faith.plot(densities, [row.spearman for row in sparse], "s-", label="Spearman of similarities")
    faith.set(title="Fidelity to dense, pruned without training", ylim=(None, 1.02))
    faith.legend(loc="upper left")
    for axes in (speed, faith):
        axes.set(xlabel="density (fraction of weight blocks kept)", xlim=(0, 1.08))
        axes.grid(alpha=0.3)

    trade.plot(*_trade(sparse), "o-", label="weights dropped (density)")
    for row in sparse:
        trade.annotate(f"{row.density:g}", (row.speedup, row.spearman), **_BESIDE)
    if dropping:
        trade.plot(*_trade(dropping), "s-", label="tokens dropped (speed)")
    for row in dropping:
        trade.annotate(
            f"{row.speed:g}" if row.speed else "packed", (row.speedup, row.spearman), **_BESIDE
        )
    trade.axvline(1, color="gray", linestyle="--", linewidth=1)
    trade.set(title="Fidelity against speed, nothing trained", xlabel="speed-up over dense")
    trade.set(ylabel="Spearman of similarities", xlim=(0, top), ylim=(None, 1.02))
    trade.grid(alpha=0.3)
    trade.legend(loc="lower left")
    figure.suptitle(
        f"{result.model}: {result.texts} texts, {result.tokens} tokens, "
        f"{result.device}, {result.threads} threads"
    )
    figure.savefig(path, dpi=150)


_BESIDE = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": "small"}


def _trade(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.speedup for row in rows], [row.spearman for row in rows]
