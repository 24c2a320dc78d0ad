# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of add_layer_norm: a program normalises a few rows, held whole in registers.

Nothing here waits for the device. A row whose index is out of bounds comes out as NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device

_MOST_FEATURES = 1 << 16  # beyond, a row no longer fits the registers of a program


@triton.jit(do_not_specialize=["rows", "x_rows"])
def _norm_kernel(
    x_ptr,  # [x_rows, features] in strides
    residual_ptr,  # like x, or None
    weight_ptr,  # [features]
    bias_ptr,  # [features] or None
    indices_ptr,  # [rows] int64, or None
    y_ptr,  # [rows, features], contiguous
    rows,
    x_rows,
    features,
    stride_xm,
    stride_xk,
    stride_rm,
    stride_rk,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    live, mask_k = m < rows, k < features
    source = tl.load(indices_ptr + m, mask=live, other=0) if indices_ptr is not None else m
    valid = live & (source >= 0) & (source < x_rows)
    mask = valid[:, None] & mask_k[None, :]
    k_wide = tl.cast(k, tl.int64)
    z = tl.load(  # [BLOCK_M, BLOCK_K]
        x_ptr + source[:, None] * stride_xm + k_wide[None, :] * stride_xk, mask=mask, other=0.0
    ).to(ACC)
    if residual_ptr is not None:
        offsets = source[:, None] * stride_rm + k_wide[None, :] * stride_rk
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(ACC)
    mean = tl.sum(z, axis=1) / features
    z = tl.where(mask_k[None, :], z - mean[:, None], 0.0)
    variance = tl.sum(z * z, axis=1) / features
    y = z * (1.0 / tl.sqrt(variance + EPS))[:, None]
    y *= tl.load(weight_ptr + k, mask=mask_k, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(ACC)[None, :]
    if indices_ptr is not None:
        y = tl.where(valid[:, None], y, float("nan"))
    tl.store(y_ptr + m[:, None] * features + k[None, :], y, mask=live[:, None] & mask_k[None, :])


def config(features: int) -> dict[str, int]:
    """Rows per program and launch options; not tuned on hardware."""
    block = triton.next_power_of_2(features)
    return {
        "BLOCK_M": max(1, 1024 // block),
        "BLOCK_K": block,
        "num_warps": min(max(block // 512, 4), 16),
    }


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor | None,
    eps: float,
) -> Tensor:
    """LayerNorm(x + residual) of all rows or those in `indices`; see `op.add_layer_norm`."""
    check_device("add_layer_norm", x)
    features = x.shape[-1]
    if features > _MOST_FEATURES:
        raise ValueError(
            f"add_layer_norm: impl 'triton' takes rows of at most {_MOST_FEATURES} features, got "
            f"{features}; use impl 'reference'"
        )
    shape = x.shape if indices is None else (indices.shape[0], features)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    rows = y.numel() // features
    tiles = config(features)
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]),)](
            x,
            residual,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if indices is None else indices.contiguous(),
            y,
            *(rows, x.shape[0], features),
            *x.stride(),
            *((0, 0) if residual is None else residual.stride()),
            EPS=eps,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            **tiles,
        )
    return y
