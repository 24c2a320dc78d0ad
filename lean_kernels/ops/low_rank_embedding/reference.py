# SPDX-License-Identifier: Apache-2.0
"""What low_rank_embedding means, in plain PyTorch: look codes up, decode them; and its gradient.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels.ops import _row_norm

FORWARD = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "elu": F.elu}
SLOPES = {
    "relu": lambda z: (z > 0).to(z.dtype),
    "gelu": lambda z: (
        0.5 * (1 + torch.erf(z / math.sqrt(2)))
        + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    ),
    "elu": lambda z: torch.where(z > 0, 1, z.exp()),
}


def _codes(ids: Tensor, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = F.embedding(ids, codes)
    if scales is None:
        return _row_norm.wide(rows)
    return rows.to(dtype) * F.embedding(ids, scales[:, None]).to(dtype)


def forward(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    decoder: Tensor,
    bias: Tensor | None,
    activation: str | None,
    added: tuple[Tensor | None, ...],
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    rows = _codes(ids, codes, scales, _row_norm.wide(decoder).dtype)
    rows = FORWARD[activation](F.linear(rows, _row_norm.wide(decoder), _row_norm.wide(bias)))
    rows = _row_norm.add(rows, added)
    return _row_norm.forward(rows, norm, norm_weight, norm_bias, eps).to(decoder.dtype)


def grad(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    decoder: Tensor,
    bias: Tensor | None,
    activation: str | None,
    padding_idx: int,
    by_frequency: bool,
    sparse: bool,
    need_codes: bool,
    need_decoder: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the gradient of codes, gradients of codes, decoder and bias; empty where not needed.

    With `sparse` that of codes has the rows that occur, which are returned first, ascending.
    """
    ids, g = ids.reshape(-1).long(), _row_norm.wide(grad).reshape(-1, grad.shape[-1])
    rows = _codes(ids, codes, scales, g.dtype)
    if padding_idx >= 0:
        g = g.masked_fill((ids == padding_idx)[:, None], 0)
    if by_frequency:
        ones = torch.ones_like(ids, dtype=g.dtype)
        times = g.new_zeros(codes.shape[0]).index_add(0, ids, ones)
        g = g / times[ids][:, None]
    if activation is not None:
        g = g * SLOPES[activation](F.linear(rows, _row_norm.wide(decoder), _row_norm.wide(bias)))
    none = decoder.new_empty(0)
    d_codes, used = none, ids.new_empty(0)
    if need_codes:
        d_codes, at, total = g @ _row_norm.wide(decoder), ids, codes.shape[0]
        if sparse:
            kept = ids != padding_idx
            used, at = ids[kept].unique(return_inverse=True)
            d_codes, total = d_codes[kept], len(used)
        # Adds up in a fixed order on every device.
        d_codes = torch.ops.aten.embedding_dense_backward(d_codes, at, total, -1, False)
        d_codes = d_codes.to(decoder.dtype)
    return (
        used,
        d_codes,
        (g.t() @ rows).to(decoder.dtype) if need_decoder else none,
        g.sum(0).to(decoder.dtype) if need_bias else none,
    )
