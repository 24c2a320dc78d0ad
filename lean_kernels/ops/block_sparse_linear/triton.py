# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of block_sparse_linear: forward, grad_input and grad_weight.

Forward and grad_input are one kernel. A program owns one block row of the sparse matrix and a tile
of tokens, walks the kept blocks of that row and writes its tile of the result once. For grad_input
the same kernel walks the block columns, through a transposed index made on the device.

grad_weight gives each kept block a program that walks the tokens.

Blocks may be any power of two on either side. Sides below 16 are padded to the 16 that tensor cores
want; several narrow blocks fill one step of the contraction; sides above 128 are cut.

Nothing here waits for the device or reads the values of the indices on the host, so all of it can
be captured in a CUDA graph. A column outside the matrix counts as a zero block, and row bounds are
clamped, so no pattern makes a kernel touch memory outside its tensors. Every sum runs in a fixed
order, in float32 (float64 for float64).

float32 products are exact (IEEE) unless `torch.backends.cuda.matmul.fp32_precision` is "tf32", as
in dense PyTorch (`torch.set_float32_matmul_precision("high")` sets it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _tuning
from lean_kernels.ops.block_sparse_linear import bsr

NAME = "block_sparse_linear"
# Triton 3.10 changes the default, and with it the last bit of results.
_OPTIONS = {"enable_fp_fusion": True}
_INTERPRETED = triton.knobs.runtime.interpret
# The interpreter takes the bits of a bfloat16 for an integer.
_INTERPRETER_DTYPES = (torch.float32, torch.float16, torch.float64)
# With fewer programs than this, grad_weight also splits the tokens, in parts no shorter than that.
_SPLIT_BELOW_PROGRAMS = 512
_SPLIT_TOKENS = 1024
# What the lists of a table stand for.
TILE = ("BLOCK_M", "BLOCK_N", "GROUP_M", "num_warps", "num_stages")
OUTER = ("BLOCK_OUT", "BLOCK_IN", "BLOCK_M", "num_warps", "num_stages")


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
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
def _tile(tokens, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The token tile and the tile of the result's columns that this program makes."""
    # GROUP_M token tiles walk the rows side by side: weights and x are then found in L2.
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def _row(start_ptr, row, nnz, SIZE_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The entries of a block row, from start to stop, and the steps of BLOCK_K they take."""
    start = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), nnz)
    stop = tl.minimum(tl.maximum(tl.load(start_ptr + row + 1), start), nnz)
    if SIZE_K < BLOCK_K:
        steps = tl.cdiv(stop - start, BLOCK_K // SIZE_K)
    else:
        steps = (stop - start) * (SIZE_K // BLOCK_K)
    return start, stop, steps


@triton.jit
def _step(
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
    CUTS_N: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = _tile(tokens, tl.cdiv(features_n, SIZE_N) * CUTS_N, BLOCK_M, GROUP_M)
    row = tile_n // CUTS_N

    m = tl.cast(tile_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n % CUTS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # within the block
    mask_m = m < tokens
    x_rows = x_ptr + m[:, None] * stride_xm
    w_cols = weight_ptr + tl.cast(n, tl.int64)[None, :] * stride_wn

    start, stop, steps = _row(start_ptr, row, nnz, SIZE_K, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(steps):
        entry, k, feature, mask_k = _step(step, index_ptr, start, stop, features_k, SIZE_K, BLOCK_K)
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
    acc = _activate(acc, ACTIVATION)
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
    if not _INTERPRETED and x.device.type == "cpu":
        raise RuntimeError(
            "block_sparse_linear: impl 'triton' needs tensors on a GPU, got cpu; move them, "
            "use impl 'cpu', or debug with TRITON_INTERPRET=1 in the environment"
        )
    if _INTERPRETED and x.dtype not in _INTERPRETER_DTYPES:
        raise RuntimeError(
            f"block_sparse_linear: Triton's interpreter multiplies {x.dtype} wrongly; "
            f"debug in float32"
        )


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
