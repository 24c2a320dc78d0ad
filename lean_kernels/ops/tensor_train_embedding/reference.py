# SPDX-License-Identifier: Apache-2.0
"""What tensor_train_embedding means, in plain PyTorch: one slice of each core, multiplied in turn.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def digits(ids: Tensor, factors: Sequence[int]) -> list[Tensor]:
    """The index of each id in each core, the first the most significant."""
    found, rest = [], ids.long()
    for factor in reversed(factors):
        found.append(rest % factor)
        rest = rest // factor
    return found[::-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(ids: Tensor, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each core its slices [N, r, d r'], and what it makes of those before it, [N, height, r'].

    ids: [N].
    """
    places = digits(ids, [core.shape[0] for core in cores])
    slices = [core[place].flatten(2) for core, place in zip(cores, places, strict=True)]
    product, products = torch.ones_like(slices[0][:, :, :1]), []
    for core, piece in zip(cores, slices, strict=True):
        height = product.shape[1] * core.shape[2]
        product = (product @ piece).view(len(ids), height, core.shape[3])
        products.append(product)
    return slices, products


def forward(
    ids: Tensor, cores: Sequence[Tensor], num_embeddings: int, embedding_dim: int
) -> Tensor:
    acc = _wide(cores[0].dtype)
    _, products = _products(ids.reshape(-1), [core.to(acc) for core in cores])
    rows = products[-1].flatten(1)[:, :embedding_dim].reshape(*ids.shape, embedding_dim)
    return rows.to(cores[0].dtype).contiguous()


def grad(
    grad: Tensor,
    ids: Tensor,
    cores: Sequence[Tensor],
    num_embeddings: int,
    padding_idx: int,
    by_frequency: bool,
) -> list[Tensor]:
    acc = _wide(cores[0].dtype)
    rows, place = ids.reshape(-1).unique(return_inverse=True)
    upstream = grad.reshape(-1, grad.shape[-1]).to(acc)
    below = _sums(upstream, place, len(rows), by_frequency) * (rows != padding_idx)[:, None]
    slices, products = _products(rows, [core.to(acc) for core in cores])
    below = F.pad(below, (0, products[-1].shape[1] - below.shape[1]))
    places = digits(rows, [core.shape[0] for core in cores])
    found = []
    for k in reversed(range(len(cores))):
        core, piece = cores[k], slices[k]
        before = products[k - 1] if k else torch.ones_like(piece[:, :, :1])  # [N, height, r]
        below = below.reshape(len(rows), before.shape[1], piece.shape[2])
        dpiece = (before.mT @ below).flatten(1)
        found.append(_sums(dpiece, places[k], core.shape[0]).view(core.shape).to(core.dtype))
        below = below @ piece.mT
    return found[::-1]


def _sums(rows: Tensor, place: Tensor, count: int, mean: bool = False) -> Tensor:
    """The sums (or means) of the rows that go to each of `count` places, in a fixed order."""
    return torch.ops.aten.embedding_dense_backward(rows.contiguous(), place, count, -1, mean)
