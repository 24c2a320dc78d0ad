# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of block_sparse_linear: forward, grad_input and grad_weight.

Forward and grad_input are one kernel. A program owns one block row of the sparse matrix and a tile
of tokens, walks the kept blocks of that row and writes its tile of the result once. For grad_input
the same kernel walks the block columns, through a transposed index made on the device.

grad_weight gives each kept block a program that walks the tokens.

Blocks may be any power of two on either side. Sides below 16 are padded to the 16 that tensor cores
want; several narrow blocks fill one step of the contraction; sides above 128 are cut.

A column outside the matrix counts as a zero block, and row bounds are clamped, so no pattern makes
a kernel touch memory outside its tensors. Every sum runs in a fixed order, in float32 (float64 for
float64).
"""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    # The codes are the positions in op.ACTIVATIONS.
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)  # unlike a maximum, keeps NaN
    elif ACTIVATION == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == 4:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def find_tile(
    tokens,
    features_n,
    SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """This program's block row, its tokens [BLOCK_M] and its places in the block [BLOCK_N]."""
    CUTS_N: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    tiles_n = tl.cdiv(features_n, SIZE_N) * CUTS_N
    # GROUP_M token tiles walk the rows side by side: weights and x are then found in L2.
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    tile_m, tile_n = first_m + within % group_m, within // group_m
    m = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile_n // CUTS_N, m, tile_n % CUTS_N * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def find_row(start_ptr, row, nnz, SIZE_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The entries of a block row, from start to stop, and the steps of BLOCK_K they take."""
    start = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), nnz)
    stop = tl.minimum(tl.maximum(tl.load(start_ptr + row + 1), start), nnz)
    if SIZE_K < BLOCK_K:
        steps = tl.cdiv(stop - start, BLOCK_K // SIZE_K)
    else:
        steps = (stop - start) * (SIZE_K // BLOCK_K)
    return start, stop, steps


@triton.jit
def find_step(
    step, index_ptr, start, stop, features_k, SIZE_K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Of each of the BLOCK_K places of a step: entry, place within its block, feature, whether it
    is there. A step is a part of one block, or several blocks."""
    lane = tl.arange(0, BLOCK_K)
    if SIZE_K < BLOCK_K:
        entry = start + step * (BLOCK_K // SIZE_K) + lane // SIZE_K
        k = lane % SIZE_K
    else:
        entry = start + step // (SIZE_K // BLOCK_K)
        k = step % (SIZE_K // BLOCK_K) * BLOCK_K + lane
    index = tl.load(index_ptr + entry, mask=entry < stop, other=-1)
    if SIZE_K < BLOCK_K:
        # What the compiler cannot know of loaded values, and needs for wide loads.
        index = tl.max_constancy(index, SIZE_K)
    live = (index >= 0) & (index < tl.cdiv(features_k, SIZE_K))
    feature = tl.where(live, index, 0) * SIZE_K + k
    if SIZE_K < BLOCK_K:
        feature = tl.max_contiguous(tl.multiple_of(feature, SIZE_K), SIZE_K)
    return entry, k, feature, live & (feature < features_k)


@triton.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    x_ptr,  # [tokens, features_k]
    weight_ptr,  # [nnz, SIZE_K, SIZE_N] in strides
    start_ptr,  # [rows + 1]: entries of row r are start[r] .. start[r + 1]
    index_ptr,  # [nnz]: where along K each entry lies, in blocks
    order_ptr,  # [nnz]: the block of each entry, or None for entry i = block i
    bias_ptr,  # [features_n] or None
    residual_ptr,  # [tokens, features_n] or None
    y_ptr,  # [tokens, features_n], contiguous
    tokens,
    features_k,
    features_n,
    nnz,
    stride_xm,
    stride_xk,
    stride_wz,
    stride_wk,
    stride_wn,
    stride_rm,
    stride_rn,
    SIZE_K: tl.constexpr,
    SIZE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, m, n = find_tile(tokens, features_n, SIZE_N, BLOCK_M, BLOCK_N, GROUP_M)
    mask_m = m < tokens
    x_rows = x_ptr + m[:, None] * stride_xm
    w_cols = weight_ptr + tl.cast(n, tl.int64)[None, :] * stride_wn

    start, stop, steps = find_row(start_ptr, row, nnz, SIZE_K, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(steps):
        entry, k, feature, mask_k = find_step(
            step, index_ptr, start, stop, features_k, SIZE_K, BLOCK_K
        )
        block = entry
        if order_ptr is not None:
            block = tl.load(order_ptr + entry, mask=entry < stop, other=0)
        if SIZE_K < BLOCK_K:
            block = tl.max_constancy(block, SIZE_K)
        x = tl.load(  # [BLOCK_M, BLOCK_K]
            x_rows + tl.cast(feature, tl.int64)[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w_rows = tl.cast(block, tl.int64) * stride_wz + tl.cast(k, tl.int64) * stride_wk
        w = tl.load(  # [BLOCK_K, BLOCK_N]
            w_cols + w_rows[:, None],
            mask=mask_k[:, None] & (n < SIZE_N)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)

    out = row * SIZE_N + n
    mask_n = (n < SIZE_N) & (out < features_n)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out, mask=mask_n, other=0.0).to(ACC)[None, :]
    acc = activate(acc, ACTIVATION)
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        offsets = m[:, None] * stride_rm + tl.cast(out, tl.int64)[None, :] * stride_rn
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + (m[:, None] * features_n + out[None, :]), acc, mask=mask)


@triton.jit(do_not_specialize=["tokens", "part_tokens"])
def _grad_weight_kernel(
    grad_ptr,  # [tokens, out_features]
    x_ptr,  # [tokens, in_features]
    row_ptr,  # [nnz]
    col_ptr,  # [nnz]
    out_ptr,  # [parts, nnz, SIZE_IN, SIZE_OUT], contiguous
    tokens,
    part_tokens,
    out_features,
    in_features,
    nnz,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CUTS_OUT: tl.constexpr = (SIZE_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    CUTS_IN: tl.constexpr = (SIZE_IN + BLOCK_IN - 1) // BLOCK_IN
    pid = tl.program_id(0)
    part = tl.program_id(1)
    block = pid // (CUTS_OUT * CUTS_IN)
    i = pid // CUTS_IN % CUTS_OUT * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # within the block
    j = pid % CUTS_IN * BLOCK_IN + tl.arange(0, BLOCK_IN)
    row = tl.load(row_ptr + block)
    col = tl.load(col_ptr + block)
    valid_row = (row >= 0) & (row < tl.cdiv(out_features, SIZE_OUT))
    valid_col = (col >= 0) & (col < tl.cdiv(in_features, SIZE_IN))
    out = tl.where(valid_row, row, 0) * SIZE_OUT + i
    feature = tl.where(valid_col, col, 0) * SIZE_IN + j
    mask_out = (i < SIZE_OUT) & (out < out_features) & valid_row
    mask_in = (j < SIZE_IN) & (feature < in_features) & valid_col
    grad_cols = grad_ptr + tl.cast(out, tl.int64)[None, :] * stride_gn
    x_cols = x_ptr + tl.cast(feature, tl.int64)[None, :] * stride_xk

    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACC)
    for step in range(tl.cdiv(last - first, BLOCK_M)):
        m = tl.cast(first + step * BLOCK_M, tl.int64) + tl.arange(0, BLOCK_M)
        mask_m = m < last
        grad = tl.load(  # [BLOCK_M, BLOCK_OUT]
            grad_cols + m[:, None] * stride_gm, mask=mask_m[:, None] & mask_out[None, :], other=0.0
        )
        x = tl.load(  # [BLOCK_M, BLOCK_IN]
            x_cols + m[:, None] * stride_xm, mask=mask_m[:, None] & mask_in[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION, out_dtype=ACC)

    # Padding must come out as zero, even where 0 * NaN made it NaN.
    acc = tl.where(mask_out[:, None] & mask_in[None, :], acc, 0.0)
    part_block = (tl.cast(part, tl.int64) * nnz + block) * SIZE_IN * SIZE_OUT
    tl.store(
        out_ptr + part_block + j[None, :] * SIZE_OUT + i[:, None],
        acc,
        mask=(i < SIZE_OUT)[:, None] & (j < SIZE_IN)[None, :],
    )
