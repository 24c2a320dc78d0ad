# SPDX-License-Identifier: Apache-2.0
"""What add_layer_norm means, in plain PyTorch: pick rows, add, normalise; and its gradient.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _sums(x: Tensor, residual: Tensor | None, indices: Tensor | None) -> Tensor:
    if indices is not None:
        x = x[indices]
        residual = None if residual is None else residual[indices]
    return _wide(x) if residual is None else _wide(x) + _wide(residual)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor | None,
    eps: float,
) -> Tensor:
    sums = _sums(x, residual, indices)
    return F.layer_norm(sums, sums.shape[-1:], _wide(weight), _wide(bias), eps).to(x.dtype)


def grad(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    indices: Tensor | None,
    eps: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (the same for residual), weight and bias; None where not needed."""
    sums = _sums(x, residual, indices)
    shape, scale = sums.shape[-1:], _wide(weight)
    _, mean, rstd = torch.native_layer_norm(sums, shape, None, None, eps)
    # torch's CPU kernel needs a bias to tell the dtype of its gradient by.
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        _wide(grad).contiguous(), sums, shape, mean, rstd, scale, scale,
        [need_x, need_weight, need_bias],
    )  # fmt: skip
    if need_x and indices is not None:
        # Adds up rows that were taken twice, and in a fixed order on every device.
        dx = torch.ops.aten.embedding_dense_backward(dx, indices, x.shape[0], -1, False)
    return (
        dx.to(x.dtype) if need_x else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(weight.dtype) if need_bias else None,
    )
