# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of block_sparse_linear, in tiles of the right size.

Nothing here waits for the device or reads the values of the indices on the host, so all of it can
be captured in a CUDA graph.

float32 products are exact (IEEE) unless `torch.backends.cuda.matmul.fp32_precision` is "tf32", as
in dense PyTorch (`torch.set_float32_matmul_precision("high")` sets it).
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _tuning
from lean_kernels.ops._triton import check_device, check_interpreted
from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.ops.block_sparse_linear.gradients import gradients as gradients_of
from lean_kernels.ops.block_sparse_linear.triton_kernels import _grad_weight_kernel, _matmul_kernel

NAME = "block_sparse_linear"
# Triton 3.10 changes the default, and with it the last bit of results.
_OPTIONS = {"enable_fp_fusion": True}
# The interpreter takes the bits of a bfloat16 for an integer.
_INTERPRETER_DTYPES = (torch.float32, torch.float16, torch.float64)
# With fewer programs than this, grad_weight also splits the tokens, in parts no shorter than that.
_SPLIT_BELOW_PROGRAMS = 512
_SPLIT_TOKENS = 1024
# What the lists of a table stand for.
TILE = ("BLOCK_M", "BLOCK_N", "GROUP_M", "num_warps", "num_stages")
OUTER = ("BLOCK_OUT", "BLOCK_IN", "BLOCK_M", "num_warps", "num_stages")


def config(
    block_out: int, block_in: int, dtype: torch.dtype, tokens: int, table: dict | None = None
) -> dict[str, int]:
    """Tile sizes and launch options of `_matmul_kernel` for one call.

    Args:
        block_out, block_in: the block as the kernel sees it (swapped for grad_input).
        dtype: of the operands.
        tokens: rows of x.
        table: what was measured, see `tuning.py`.

    Where nothing was measured: from shared memory (64 KiB on gfx942 is the tightest) and registers.
    The tile of the contraction, and so the order of a sum, does not depend on `tokens`.
    """
    tuned = (table or {}).get("matmul", {}).get(kind(block_out, block_in, dtype))
    if tuned:
        most = sorted(map(int, tuned["tiles"]))
        tile = tuned["tiles"][str(next((t for t in most if tokens <= t), most[-1]))]
        return {"BLOCK_K": tuned["BLOCK_K"], **dict(zip(TILE, tile, strict=True))}
    half = dtype.itemsize == 2
    block_m, block_n = (_clamp(size, 16, 128 if half else 64) for size in (tokens, block_out))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        # Narrow blocks are loaded element by element, which costs registers.
        "BLOCK_K": 16 if not half else 32 if block_in < 16 else 64,
        "GROUP_M": 8,
        "num_warps": 8 if block_m > 64 else 4,
        # x is loaded through a loaded index, so the compiler spends two stages per tile in flight.
        "num_stages": 2 if torch.version.hip else 5,
    }


def grad_weight_config(
    block_out: int, block_in: int, dtype: torch.dtype, table: dict | None = None
) -> dict[str, int]:
    """Tile sizes and launch options of `_grad_weight_kernel`; see `config`."""
    tuned = (table or {}).get("grad_weight", {}).get(kind(block_out, block_in, dtype))
    if tuned:
        return dict(zip(OUTER, tuned, strict=True))
    half = dtype.itemsize == 2
    block_out, block_in = (_clamp(size, 16, 128 if half else 64) for size in (block_out, block_in))
    return {
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        "BLOCK_M": 64 if half else 32,
        "num_warps": 8 if block_out * block_in > 128 * 64 else 4,
        "num_stages": 2 if torch.version.hip else 4 if half else 3,
    }


def kind(block_out: int, block_in: int, dtype: torch.dtype) -> str:
    return f"{block_out}x{block_in} {str(dtype).removeprefix('torch.')}"


def _clamp(size: int, low: int, high: int) -> int:
    """The power of two at or above `size`, within [low, high]."""
    return min(max(triton.next_power_of_2(size), low), high)


def _check(x: Tensor, block_shape: tuple[int, int]) -> None:
    for size in block_shape:
        if size & (size - 1):
            raise ValueError(
                f"block_sparse_linear: impl 'triton' takes blocks whose sides are powers of two, "
                f"got {block_shape[0]}x{block_shape[1]}; use impl 'cpu' or 'reference'"
            )
    check_device("block_sparse_linear", x)
    check_interpreted("block_sparse_linear", x.dtype, _INTERPRETER_DTYPES)


def _numerics(dtype: torch.dtype) -> dict:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def _rows(x: Tensor) -> Tensor:
    """[..., features] as [tokens, features], without a copy where strides allow."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _matmul(
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    index: Tensor,
    order: Tensor | None,
    features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """`_matmul_kernel` over weight [nnz, SIZE_N, SIZE_K]."""
    nnz, size_n, size_k = weight.shape
    _check(x, (size_n, size_k))
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    tiles = config(size_n, size_k, x.dtype, x.shape[0], _tuning.table(NAME, x.device))
    rows, cuts = start.numel() - 1, triton.cdiv(size_n, tiles["BLOCK_N"])
    grid = (triton.cdiv(x.shape[0], tiles["BLOCK_M"]) * rows * cuts,)
    with torch.cuda.device_of(x):
        _matmul_kernel[grid](
            x,
            weight,
            start.contiguous(),
            index.contiguous(),
            order,
            None if bias is None else bias.contiguous(),
            residual,
            y,
            *(*x.shape, features, nnz),
            *x.stride(),
            *(weight.stride(0), weight.stride(2), weight.stride(1)),
            *((0, 0) if residual is None else residual.stride()),
            SIZE_K=size_k,
            SIZE_N=size_n,
            ACTIVATION=activation,
            **tiles,
            **_numerics(x.dtype),
            **_OPTIONS,
        )
    return y


def _block_rows(crow_indices: Tensor, blocks: Tensor) -> Tensor:
    """Block row, int32, of the blocks with these numbers; safe for any `crow_indices`."""
    return torch.searchsorted(crow_indices[1:], blocks, right=True, out_int32=True)


def forward(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation_code: int,
) -> Tensor:
    """activation(x Wᵀ + bias) + residual, [..., out_features]; see `op.block_sparse_linear`."""
    return _matmul(
        x,
        weight,
        crow_indices,
        col_indices,
        None,
        out_features,
        bias,
        residual,
        activation_code,
    )


def grad_input(
    grad: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int
) -> Tensor:
    """grad W, [..., in_features], for grad [..., out_features]."""
    block_cols = triton.cdiv(in_features, weight.shape[2])
    cols, order = torch.sort(col_indices, stable=True)
    order = order.to(torch.int32)
    bounds = torch.arange(block_cols + 1, dtype=torch.int32, device=grad.device)
    start = torch.searchsorted(cols, bounds, out_int32=True)
    rows = _block_rows(crow_indices, order)
    return _matmul(grad, weight.transpose(1, 2), start, rows, order, in_features)


def grad_weight(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_out: int,
    block_in: int,
) -> Tensor:
    """The kept blocks of gradᵀ x, [nnz, block_out, block_in] in the order of `bsr.blocks_empty`."""
    _check(x, (block_out, block_in))
    nnz = col_indices.numel()
    out = bsr.blocks_empty(nnz, (block_out, block_in), dtype=x.dtype, device=x.device)
    if nnz == 0:
        return out
    grad, x = _rows(grad), _rows(x)
    tokens = x.shape[0]
    tiles = grad_weight_config(block_out, block_in, x.dtype, _tuning.table(NAME, x.device))
    programs = nnz * triton.cdiv(block_out, tiles["BLOCK_OUT"])
    programs *= triton.cdiv(block_in, tiles["BLOCK_IN"])
    parts = max(1, min(_SPLIT_BELOW_PROGRAMS // programs, tokens // _SPLIT_TOKENS))
    part_tokens = triton.cdiv(tokens, parts)
    numerics = _numerics(x.dtype)
    sums = out
    in_place = parts == 1 and out.transpose(1, 2).is_contiguous()  # as the kernel writes it
    if not in_place:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = torch.empty(parts, nnz, block_in, block_out, dtype=wide, device=x.device)
    numbers = torch.arange(nnz, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _grad_weight_kernel[(programs, parts)](
            grad,
            x,
            _block_rows(crow_indices, numbers),
            col_indices.contiguous(),
            sums,
            *(tokens, part_tokens, grad.shape[1], x.shape[1], nnz),
            *grad.stride(),
            *x.stride(),
            SIZE_OUT=block_out,
            SIZE_IN=block_in,
            **tiles,
            **numerics,
            **_OPTIONS,
        )
    return out if in_place else out.copy_(sums.sum(0).transpose(1, 2))


gradients = partial(gradients_of, grad_input, grad_weight)
