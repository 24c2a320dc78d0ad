# SPDX-License-Identifier: Apache-2.0
"""What tensor_product_embedding means, in plain PyTorch; float32 sums for half precision."""

import torch.nn.functional as F
from torch import Tensor

from lean_kernels.ops import _row_norm


def _picked(ids: Tensor, morphemes: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
    """The factors of each id's morphemes, n of [N, r, q], wide."""
    chosen = morphemes.index_select(0, ids.reshape(-1)).long()
    rows = _row_norm.wide(F.embedding(chosen, factors.flatten(1)))
    return rows.unflatten(-1, factors.shape[1:]).unbind(1)


def _products(picked: tuple[Tensor, ...]) -> list[Tensor]:
    """Entry k: the tensor product of factors k to n - 1 of each rank, [N, r, q^(n - k)]; k >= 1."""
    products = [picked[-1]]
    for factor in picked[-2:0:-1]:
        products.append((factor[:, :, :, None] * products[-1][:, :, None, :]).flatten(2))
    return [picked[0], *products[::-1]]


def rows(ids: Tensor, morphemes: Tensor, factors: Tensor, embedding_dim: int) -> Tensor:
    """The rows as they are made, [*, D], wide."""
    first, tail, *_ = _products(_picked(ids, morphemes, factors))
    made = (first.transpose(1, 2) @ tail).flatten(1)[:, :embedding_dim]
    return made.reshape(*ids.shape, embedding_dim)


def forward(ids, morphemes, factors, embedding_dim, *added_and_norm) -> Tensor:
    """See `op.tensor_product_embedding`; `added_and_norm` as in the schema."""
    *added, norm, weight, bias, eps = added_and_norm
    x = _row_norm.add(rows(ids, morphemes, factors, embedding_dim), tuple(added))
    return _row_norm.forward(x, norm, weight, bias, eps).to(factors.dtype)


def grad(
    grad, ids, morphemes, factors, ids0, table0, ids1, table1, norm, weight, eps, padding_idx
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of factors, of both added tables and of the norm's weight and bias, wide.

    One without a tensor that it belongs to is empty.
    """
    order, (_, rank, size), features = morphemes.shape[1], factors.shape, grad.shape[-1]
    made = rows(ids, morphemes, factors, features)
    g = _row_norm.wide(grad)
    if padding_idx >= 0:
        g = g.masked_fill((ids == padding_idx)[..., None], 0)
    x = _row_norm.add(made, (ids0, table0, ids1, table1))
    dx, dweight, dbias = _row_norm.grad(g, x, norm, weight, eps)
    dx = dx.reshape(-1, features)
    dadded = [
        dx.new_empty(0)
        if at is None
        else dx.new_zeros(table.shape).index_add(0, at.reshape(-1), dx)
        for at, table in ((ids0, table0), (ids1, table1))
    ]
    # Digit by digit: of T[a, rest] the factor a's share, and what is left for the others.
    picked = _picked(ids, morphemes, factors)
    _, *tails = _products(picked)
    left = F.pad(dx, (0, size**order - features)).view(-1, 1, size, size ** (order - 1))
    shares = []
    for factor, tail in zip(picked, tails, strict=False):
        shares.append((left @ tail[..., None]).squeeze(-1).expand(-1, rank, -1))
        left = (factor[:, :, None, :] @ left).squeeze(2)
        if len(shares) < order - 1:
            left = left.unflatten(-1, (size, -1))
    shares.append(left)
    at = morphemes.index_select(0, ids.reshape(-1)).long()
    dfactors = dx.new_zeros(factors.shape)
    for j, share in enumerate(shares):
        dfactors.index_add_(0, at[:, j], share)
    return dfactors, *dadded, dweight, dbias
