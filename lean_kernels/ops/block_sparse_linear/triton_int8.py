# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of block_sparse_linear over int8 weights; not yet run on hardware.

One kernel rounds the rows of x to int8, the other multiplies: a program owns one block row and a
tile of tokens, sums in int32 and scales back with the epilogue. Bounds as in `triton_kernels.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops.block_sparse_linear import int8
from lean_kernels.ops.block_sparse_linear.triton import _OPTIONS, _check, _clamp, _rows
from lean_kernels.ops.block_sparse_linear.triton_kernels import (
    activate,
    find_row,
    find_step,
    find_tile,
)


@triton.jit(do_not_specialize=["tokens"])
def _quantise_kernel(
    x_ptr,  # [tokens, features]
    q_ptr,  # int8 [tokens, features], contiguous
    scale_ptr,  # float32 [tokens]
    tokens,
    features,
    stride_xm,
    stride_xk,
    LEAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    k = tl.arange(0, BLOCK_K)
    most = tl.zeros((BLOCK_K,), dtype=tl.float32)
    finite = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, features, BLOCK_K):
        at = tl.cast(start, tl.int64) + k
        x = tl.load(x_ptr + row * stride_xm + at * stride_xk, mask=at < features, other=0.0)
        x = x.to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        finite += x * 0.0
    largest = tl.max(most, 0)
    spoilt = tl.sum(finite, 0)  # 0, or NaN where a value is not finite
    # Rounded to nearest, as on CPU: a last bit would decide ties.
    live = (largest > LEAST) & (spoilt == 0.0)
    inverse = tl.where(live, tl.div_rn(127.0 + 0.0 * largest, tl.where(live, largest, 1.0)), 0.0)
    tl.store(scale_ptr + row, tl.div_rn(largest, 127.0 + 0.0 * largest) + spoilt)
    for start in range(0, features, BLOCK_K):
        at = tl.cast(start, tl.int64) + k
        x = tl.load(x_ptr + row * stride_xm + at * stride_xk, mask=at < features, other=0.0)
        # Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even.
        scaled = x.to(tl.float32) * inverse
        rounded = (scaled + 12582912.0) - 12582912.0
        rounded = tl.where(spoilt == 0.0, rounded, 0.0)
        tl.store(q_ptr + row * features + at, rounded.to(tl.int8), mask=at < features)


@triton.jit(do_not_specialize=["tokens"])
def _matmul_int8_kernel(
    q_ptr,  # int8 [tokens, features_k], contiguous
    row_scale_ptr,  # float32 [tokens]
    weight_ptr,  # int8 [nnz, SIZE_K / 4, SIZE_N, 4], contiguous
    weight_scale_ptr,  # float32 [features_n]
    start_ptr,
    index_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,  # [tokens, features_n], contiguous
    tokens,
    features_k,
    features_n,
    nnz,
    stride_rm,
    stride_rn,
    SIZE_K: tl.constexpr,
    SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row, m, n = find_tile(tokens, features_n, SIZE_N, BLOCK_M, BLOCK_N, GROUP_M)
    mask_m = m < tokens
    start, stop, steps = find_row(start_ptr, row, nnz, SIZE_K, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(steps):
        entry, k, feature, mask_k = find_step(
            step, index_ptr, start, stop, features_k, SIZE_K, BLOCK_K
        )
        q = tl.load(  # [BLOCK_M, BLOCK_K]
            q_ptr + m[:, None] * features_k + tl.cast(feature, tl.int64)[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0,
        )
        of_block = tl.cast(entry, tl.int64) * SIZE_K * SIZE_N + k // 4 * (SIZE_N * 4) + k % 4
        w = tl.load(  # [BLOCK_K, BLOCK_N]
            weight_ptr + of_block[:, None] + (n * 4)[None, :],
            mask=mask_k[:, None] & (n < SIZE_N)[None, :],
            other=0,
        )
        acc = tl.dot(q, w, acc, out_dtype=tl.int32)

    out = row * SIZE_N + n
    mask_n = (n < SIZE_N) & (out < features_n)
    row_scale = tl.load(row_scale_ptr + m, mask=mask_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + out, mask=mask_n, other=0.0)
    y = acc.to(tl.float32) * (row_scale[:, None] * weight_scale[None, :])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        offsets = m[:, None] * stride_rm + tl.cast(out, tl.int64)[None, :] * stride_rn
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + (m[:, None] * features_n + out[None, :]), y, mask=mask)


def config(block_out: int, block_in: int, tokens: int) -> dict[str, int]:
    """Tile sizes and launch options; reasoned, not tuned on hardware."""
    block_m = _clamp(tokens, 16, 128)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": _clamp(block_out, 16, 128),
        "BLOCK_K": 64 if block_in <= 64 else 128,
        "GROUP_M": 8,
        "num_warps": 8 if block_m > 64 else 4,
        "num_stages": 2 if torch.version.hip else 4,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation_code: int,
) -> Tensor:
    """activation(x Wᵀ + bias) + residual, [..., out_features]; see `op.block_sparse_linear`."""
    size_n, size_k = int8.block_shape(weight)
    _check(x, (size_n, size_k))
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = _rows(x)
    tokens, features = x.shape
    q = torch.empty(tokens, features, dtype=torch.int8, device=x.device)
    row_scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    residual = None if residual is None else _rows(residual)
    tiles = config(size_n, size_k, tokens)
    rows, cuts = crow_indices.numel() - 1, triton.cdiv(size_n, tiles["BLOCK_N"])
    with torch.cuda.device_of(x):
        _quantise_kernel[(tokens,)](
            *(x, q, row_scales, tokens, features),
            *x.stride(),
            LEAST=int8.LEAST,
            BLOCK_K=_clamp(features, 16, 1024),
            num_warps=4,
            **_OPTIONS,
        )
        _matmul_int8_kernel[(triton.cdiv(tokens, tiles["BLOCK_M"]) * rows * cuts,)](
            *(q, row_scales, weight.contiguous(), weight_scales.contiguous()),
            *(crow_indices.contiguous(), col_indices.contiguous()),
            None if bias is None else bias.contiguous(),
            residual,
            y,
            *(tokens, features, out_features, weight.shape[0]),
            *((0, 0) if residual is None else residual.stride()),
            SIZE_K=size_k,
            SIZE_N=size_n,
            ACTIVATION=activation_code,
            **tiles,
            **_OPTIONS,
        )
    return y
