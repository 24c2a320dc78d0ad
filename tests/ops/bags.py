# SPDX-License-Identifier: Apache-2.0
"""Problems for the tests of ngram_embedding_bag, and their exact answers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lean_kernels.ops import ngram_embedding_bag

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = DTYPES[2:]
# Of RMS; bags are random sums, in which roundings average out.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.int8: 1e-6}
LENGTHS = (3, 0, 1, 40, 7, 0)


@dataclass(frozen=True)
class Bags:
    ids: Tensor
    offsets: Tensor
    table: Tensor
    weights: Tensor | None = None
    scales: Tensor | None = None
    padding_idx: int | None = None

    def run(self, mode: str = "mean", **options) -> Tensor:
        return ngram_embedding_bag(
            self.ids,
            self.offsets,
            self.table,
            mode=mode,
            weights=self.weights,
            scales=self.scales,
            padding_idx=self.padding_idx,
            **options,
        )

    def exact(self, mode: str = "mean") -> Tensor:
        """The definition, bag by bag, in float64."""
        out = torch.zeros(len(self.offsets) - 1, self.table.shape[1], dtype=torch.float64)
        out = out.to(self.table.device)
        for b, (begin, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            live = self.ids[begin:end] != (-1 if self.padding_idx is None else self.padding_idx)
            ids = self.ids[begin:end][live].long()
            rows = self.table.double()[ids]
            if self.scales is not None:
                rows = rows * self.scales.double()[ids, None]
            if self.weights is not None:
                rows = rows * self.weights.double()[begin:end][live, None]
            if len(ids):
                out[b] = rows.sum(0) / (len(ids) if mode == "mean" else 1)
        return out

    def with_table(self, table: Tensor) -> "Bags":
        return replace(self, table=table)


def bags(
    lengths=LENGTHS,
    rows=50,
    features=33,
    dtype=torch.float32,
    *,
    weighted=False,
    padding_idx=None,
    index=torch.int64,
    seed=0,
) -> Bags:
    """Random bags whose ids favour small numbers, as n-grams numbered by their count do."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(index)
    count = int(offsets[-1])
    ids = (torch.rand(count, generator=generator) ** 2 * rows).to(index)
    scales = None
    if dtype == torch.int8:
        table = torch.randint(-127, 128, (rows, features), generator=generator, dtype=dtype)
        scales = torch.rand(rows, generator=generator) + 0.5
    else:
        table = torch.randn(rows, features, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(count, generator=generator, dtype=torch.float64) if weighted else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = None if weights is None else weights.to(wide)
    return Bags(ids, offsets, table, weights, scales, padding_idx)


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = actual.detach().double() - expected.double()
    scale = expected.double().square().mean().sqrt()
    return float(difference.square().mean().sqrt() / scale.clamp_min(1e-300))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Halves: rounded once, from a float32 sum that may land on the other side of a tie."""
    if dtype in TOLERANCE:
        assert error(actual, expected) <= TOLERANCE[dtype]
    else:
        assert error(actual, expected) <= torch.finfo(dtype).eps / 2
