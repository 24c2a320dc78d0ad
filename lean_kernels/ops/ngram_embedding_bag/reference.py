# SPDX-License-Identifier: Apache-2.0
"""What ngram_embedding_bag means, in plain PyTorch: pick rows, weigh, add up per bag.

In float64, rounded once: the kernels' sums are as wide as `wide` says.
"""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the kernels' sums, and of the gradient of weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bag_of(ids: Tensor, offsets: Tensor) -> Tensor:
    """The bag of each id, int64 [N]."""
    places = torch.arange(ids.shape[0], device=ids.device)
    return torch.searchsorted(offsets.long().contiguous(), places, right=True) - 1


def coefficients(
    ids: Tensor,
    bag: Tensor,
    bags: int,
    weights: Tensor | None,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    """What each row is multiplied by before rows are added up, [N]; 0 for padding."""
    live = ids != padding_idx
    factor = live.double()
    if mean:
        counts = torch.zeros(bags, dtype=torch.float64, device=ids.device).index_add(0, bag, factor)
        factor = factor / counts[bag].clamp_min(1)
    # Where, and not a product: nothing is known of the weights of what is left out.
    return factor if weights is None else torch.where(live, factor * weights.double(), 0)


def _rows(ids: Tensor, table: Tensor, scales: Tensor | None, padding_idx: int) -> Tensor:
    rows = table[ids.long()].double()
    rows = rows if scales is None else rows * scales[ids.long()][:, None]
    return torch.where((ids != padding_idx)[:, None], rows, 0)


def forward(
    ids: Tensor,
    offsets: Tensor,
    table: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    bag, bags = bag_of(ids, offsets), offsets.shape[0] - 1
    rows = _rows(ids, table, scales, padding_idx)
    rows = rows * coefficients(ids, bag, bags, weights, padding_idx, mean)[:, None]
    out = torch.zeros(bags, table.shape[1], dtype=torch.float64, device=table.device)
    return out.index_add(0, bag, rows).to(table.dtype if scales is None else torch.float32)


def grad_table(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: int,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    bag = bag_of(ids, offsets)
    factor = coefficients(ids, bag, grad.shape[0], weights, padding_idx, mean)
    out = torch.zeros(rows, grad.shape[1], dtype=torch.float64, device=grad.device)
    return out.index_add(0, ids.long(), grad.double()[bag] * factor[:, None]).to(grad.dtype)


def grad_rows(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: int,
    padding_idx: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    used = ids.long().unique()
    used = used[used != padding_idx]
    dense = grad_table(grad, ids, offsets, weights, rows, padding_idx, mean)
    return used, dense[used]


def grad_weights(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    table: Tensor,
    scales: Tensor | None,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    bag = bag_of(ids, offsets)
    factor = coefficients(ids, bag, grad.shape[0], None, padding_idx, mean)
    products = _rows(ids, table, scales, padding_idx) * grad.double()[bag]
    return (products.sum(1) * factor).to(wide(table.dtype))
