# SPDX-License-Identifier: Apache-2.0
"""Random block masks: uniform, and skewed as those of pruned models are."""

import torch
from torch import Tensor

MASKS = ("uniform", "skewed")


def _zipf_counts(rows: int, cols: int, kept: int) -> Tensor:
    """Blocks per row in proportion to 1 / rank, none above `cols`, `kept` in all."""
    weight = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    low, high = 0.0, float(rows * cols) / float(weight[-1])
    for _ in range(100):
        middle = (low + high) / 2
        if float((middle * weight).clamp(max=cols).sum()) < kept:
            low = middle
        else:
            high = middle
    exact = (high * weight).clamp(max=cols)
    counts = exact.floor().long()
    # Largest remainders take what rounding down left over.
    order = (exact - counts).masked_fill(counts >= cols, -1).argsort(descending=True, stable=True)
    counts[order[: kept - int(counts.sum())]] += 1
    return counts


def block_mask(kind: str, rows: int, cols: int, density: float, generator: torch.Generator):
    """Bool [rows, cols] with round(density * rows * cols) True entries, and at least one.

    "uniform": any entry alike. "skewed": the counts of rows follow Zipf's law (1 / rank, in random
    order, at most a full row), the places within a row are uniform.
    """
    kept = max(1, round(density * rows * cols))
    scores = torch.rand(rows, cols, generator=generator)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if kind == "uniform":
        mask.view(-1)[scores.flatten().topk(kept).indices] = True
        return mask
    if kind == "skewed":
        counts = _zipf_counts(rows, cols, kept)[torch.randperm(rows, generator=generator)]
        return scores.argsort(dim=1).argsort(dim=1) < counts[:, None]
    raise ValueError(f"block_mask: unknown kind {kind!r}; expected one of {MASKS}")
