# SPDX-License-Identifier: Apache-2.0
"""int8 weights of block_sparse_linear as plain tensors: rounding, packing, and what is right.

A weight is quantised symmetrically per output over the blocks kept in its row, x per row as it
comes: w = scale * q, q from -127 to 127. The kernels read blocks as int8 [nnz, block_in / 4,
block_out, 4]: element [b, k, o, j] multiplies input 4 k + j of block b into its output o.
"""

import torch
from torch import Tensor

from lean_kernels.ops.block_sparse_linear import bsr, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_INPUTS = 1 << 16  # sums stay within int32
LARGEST = 127
LEAST = 1e-36  # a row without a larger element counts as zero


def block_shape(weight: Tensor) -> tuple[int, int]:
    """(block_out, block_in) of a packed weight."""
    return weight.shape[2], 4 * weight.shape[1]


def check_block_shape(shape: tuple[int, int], name: str) -> None:
    """Raise ValueError unless int8 kernels take such blocks."""
    block_out, block_in = shape
    if block_out % 16 or block_in % 4:
        raise ValueError(
            f"{name}: int8 takes blocks of a multiple of 16 outputs and of 4 inputs, got "
            f"{block_out}x{block_in}"
        )


def pack(blocks: Tensor) -> Tensor:
    """[nnz, block_out, block_in] as the kernels read it, [nnz, block_in / 4, block_out, 4]."""
    nnz, block_out, block_in = blocks.shape
    return blocks.reshape(nnz, block_out, block_in // 4, 4).transpose(1, 2).contiguous()


def unpack(weight: Tensor) -> Tensor:
    """`pack` undone."""
    nnz, fours, block_out, _ = weight.shape
    return weight.transpose(1, 2).reshape(nnz, block_out, 4 * fours)


def quantise(weight: Tensor, crow_indices: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """Packed int8 blocks, and float32 scales [out_features], of blocks [nnz, block_out, block_in].

    The scale of an output is its largest weight / 127; 1 where all are zero.
    """
    nnz, block_out, _ = weight.shape
    rows = bsr.row_indices(crow_indices, nnz)
    block_rows = crow_indices.numel() - 1
    most = torch.zeros(block_rows, block_out, dtype=torch.float32, device=weight.device)
    largest = weight.detach().abs().amax(2).float()
    most.scatter_reduce_(0, rows.unsqueeze(1).expand_as(largest), largest, "amax")
    scales = torch.where(most > 0, most / LARGEST, torch.ones_like(most))
    q = (weight.detach().float() / scales[rows].unsqueeze(2)).round().clamp_(-LARGEST, LARGEST)
    return pack(q.to(torch.int8)), scales.flatten()[:out_features].contiguous()


def dequantise(weight: Tensor, scales: Tensor, crow_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [nnz, block_out, block_in] in that dtype."""
    blocks = unpack(weight)
    block_rows, block_out = crow_indices.numel() - 1, blocks.shape[1]
    padded = scales.new_ones(block_rows * block_out)
    padded[: scales.numel()] = scales
    rows = bsr.row_indices(crow_indices, blocks.shape[0])
    of_block = padded.view(block_rows, block_out)[rows].unsqueeze(2)
    fresh = bsr.blocks_empty(*blocks.shape[:1], blocks.shape[1:], dtype=dtype, device=blocks.device)
    return fresh.copy_(blocks * of_block)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., in_features] and float32 scales [..., 1]; NaN for a row that is not finite."""
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True)
    finite = most.isfinite()
    # Not LARGEST / most: torch makes a product with a reciprocal of that, and rounds twice.
    inverse = torch.full_like(most, LARGEST) / most
    inverse = torch.where(finite & (most > LEAST), inverse, torch.zeros_like(most))
    q = torch.where(finite, (wide * inverse).round(), torch.zeros_like(wide))
    return q.to(torch.int8), torch.where(finite, most / LARGEST, torch.full_like(most, torch.nan))


def check(x: Tensor, weight: Tensor, scales: Tensor | None, out_features: int) -> None:
    """Raise ValueError unless an int8 weight and its scales fit x; op.py checks the rest."""

    def fail(problem: str) -> None:
        raise ValueError(f"block_sparse_linear: {problem}")

    if weight.dim() != 4 or weight.shape[3] != 4:
        fail(
            f"an int8 weight must be [nnz, block_in / 4, block_out, 4], got {list(weight.shape)}; "
            "block_sparse_linear.int8.pack makes it"
        )
    check_block_shape(block_shape(weight), "block_sparse_linear")
    if x.dtype not in DTYPES:
        fail(f"int8 takes x in one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.dim() and x.shape[-1] > MOST_INPUTS:
        fail(f"int8 takes at most {MOST_INPUTS} in_features, got {x.shape[-1]}")
    if scales is None or scales.dtype != torch.float32 or scales.shape != (out_features,):
        got = None if scales is None else f"{scales.dtype} {list(scales.shape)}"
        fail(f"weight_scales must be float32 [{out_features}] for an int8 weight, got {got}")


def forward(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """The reference: exact sums of the rounded factors, the rest in float64."""
    q, row_scales = quantise_rows(x)
    blocks = unpack(weight).double()
    dense = bsr.to_dense(blocks, crow_indices, col_indices, out_features, x.shape[-1])
    y = (q.double() @ dense.t()) * (row_scales.double() * scales.double())
    y = reference.ACTIVATIONS[activation](y if bias is None else y + bias.double())
    return (y if residual is None else y + residual.double()).to(x.dtype)
