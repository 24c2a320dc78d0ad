# SPDX-License-Identifier: Apache-2.0
"""The demo's comparison of compressed vocabularies: bytes, lookup time, fidelity.

Nothing is trained but the tables themselves, for a few epochs: MorphTE, which is meant to be
trained with the model, shows where such training would start.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lean_kernels as lk
from lean_kernels.compress.morphemes import build_morphemes
from lean_kernels.evaluation import embed, fidelity
from lean_kernels.nn.morphte_embedding import least_factor_size

KINDS = {"SVD": "low_rank", "autoencoder": "autoencoder", "MorphTE": "morphte"}
EPOCHS = {"autoencoder": 4, "morphte": 2}  # a minute for all of them on two cores
MORPHEME_EPOCHS = 2
ORDER = 3


@dataclass
class VocabularyRow:
    """One form of the word embeddings in the model."""

    what: str
    compression: float  # bytes of the dense table / these
    rank: int | None
    table_bytes: int
    milliseconds: float  # of looking up all texts, median over the rounds
    cosine: float  # mean over the texts, embedding here against dense
    spearman: float  # of all pairwise similarities, here against dense
    fit_seconds: float


def rank_for(
    kind: str, rows: int, columns: int, compression: float, *, num_morphemes: int = 0
) -> int:
    """The largest rank at which float32 tensors are `compression` times smaller than the table."""
    numbers = rows * columns / compression
    if kind == "morphte":  # factors, the int32 index, LayerNorm
        per_rank = num_morphemes * least_factor_size(columns, ORDER)
        return max(1, int((numbers - rows * ORDER - 2 * columns) / per_rank))
    fixed = columns if kind == "autoencoder" else 0
    return max(1, min(int((numbers - fixed) / (rows + columns)), columns, rows))


def compare(
    dense: nn.Module,
    tokenizer,
    batches: list,
    expected: Tensor,
    scratch: Path,
    *,
    compressions: Sequence[float],
    rounds: int,
    step: Callable[[str], None],
) -> list[VocabularyRow]:
    """The dense table, then each kind at each compression.

    Args:
        dense: a Hugging Face model; left as it is.
        batches: of `evaluation.make_batches`.
        expected: the dense model's embeddings of them.
        scratch: directory for a file of morphemes.
        rounds: timed lookups of all batches, every form in turn.
        step: called with what comes next, `steps(compressions)` times.
    """
    embedding = dense.get_input_embeddings()
    name = next(name for name, module in dense.named_modules() if module is embedding)
    rows, columns = embedding.weight.shape
    step("find morphemes")
    kinds, morphemes, count = dict(KINDS), scratch / "morphemes.json", 0
    if find_spec("morfessor") is None:
        kinds.pop("MorphTE")
    else:
        count = _write_morphemes(morphemes, tokenizer, rows)
    layers, found = {"dense": embedding}, [_row("dense", embedding, expected, expected, 0.0)]
    for compression in compressions:
        for what, kind in kinds.items():
            step(f"compress the vocabulary {compression:g}x: {what}")
            rank = rank_for(kind, rows, columns, compression, num_morphemes=count)
            rule = {"kind": kind, "rank": rank}
            if kind in EPOCHS:
                rule["epochs"] = EPOCHS[kind]
            if kind == "morphte":
                rule["morphemes"] = str(morphemes)
            began = time.perf_counter()
            model = copy.deepcopy(dense)
            lk.convert(model, {"embedding": {name: rule}}, progress=_silent)
            seconds = time.perf_counter() - began
            layer = model.get_input_embeddings()
            what = f"{what} {compression:g}x"
            found.append(_row(what, layer, expected, embed(model, batches), seconds))
            layers[what] = layer
    step("time lookups")
    for row, milliseconds in zip(found, _milliseconds(layers, batches, rounds), strict=True):
        row.milliseconds = milliseconds
    morphemes.unlink(missing_ok=True)
    return found


def steps(compressions: Sequence[float]) -> int:
    """How often `compare` calls its `step`, at most."""
    return len(compressions) * len(KINDS) + 2 if compressions else 0


def _write_morphemes(path: Path, tokenizer, rows: int) -> int:
    """Find the morphemes of each row, once for all, and return how many there are."""
    indices, names = build_morphemes(
        tokenizer, order=ORDER, num_embeddings=rows, epochs=MORPHEME_EPOCHS, progress=_silent
    )
    words = [[names[i] for i in row if i >= ORDER - 1] for row in indices.tolist()]  # no paddings
    path.write_text(json.dumps(words), encoding="utf-8")
    return len(names)


def _row(
    what: str, layer: nn.Module, expected: Tensor, found: Tensor, seconds: float
) -> VocabularyRow:
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    size = layer.num_embeddings * layer.embedding_dim * expected.element_size()
    cosine, rank_correlation = fidelity(expected, found)
    return VocabularyRow(
        what=what,
        compression=size / stored,
        rank=getattr(layer, "rank", None),
        table_bytes=stored,
        milliseconds=0.0,
        cosine=cosine,
        spearman=rank_correlation,
        fit_seconds=seconds,
    )


@torch.inference_mode()
def _milliseconds(layers: dict[str, nn.Module], batches: list, rounds: int) -> list[float]:
    """Of looking up the tokens of all batches, in turn, after one round to warm up."""
    taken = []
    for _ in range(rounds + 1):
        times = [time.perf_counter()]
        for layer in layers.values():
            total = sum(layer(inputs["input_ids"])[0, 0, 0] for _, inputs in batches)
            total.item()  # waits for a GPU
            times.append(time.perf_counter())
        taken.append(np.diff(times))
    return (1e3 * np.median(taken[1:], axis=0)).tolist()


def _silent(done: int, total: int, name: str) -> None:
    """The demo has a bar of its own."""
