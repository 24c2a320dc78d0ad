# SPDX-License-Identifier: Apache-2.0
"""What block_sparse_linear means, in plain PyTorch: expand to dense, multiply, add.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.ops.block_sparse_linear.gradients import gradients as gradients_of

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def forward(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    dense = bsr.to_dense(_wide(weight), crow_indices, col_indices, out_features, x.shape[-1])
    y = F.linear(_wide(x), dense, None if bias is None else _wide(bias))
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + _wide(residual)
    return y.to(x.dtype)


def grad_input(
    grad: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int
) -> Tensor:
    dense = bsr.to_dense(_wide(weight), crow_indices, col_indices, grad.shape[-1], in_features)
    return (_wide(grad) @ dense).to(grad.dtype)


def grad_weight(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_out: int,
    block_in: int,
) -> Tensor:
    block_shape = block_out, block_in
    dense = _rows(_wide(grad)).t() @ _rows(_wide(x))
    blocks = bsr.gather_blocks(dense, crow_indices, col_indices, block_shape)
    out = bsr.blocks_empty(col_indices.numel(), block_shape, dtype=x.dtype, device=x.device)
    return out.copy_(blocks)


gradients = partial(gradients_of, grad_input, grad_weight)
