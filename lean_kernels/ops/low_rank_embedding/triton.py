# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of low_rank_embedding: codes are gathered straight into the operand of a product.

A program makes a tile of rows, or, where added tables or a norm follow and a row fits a tile, whole
rows that it finishes itself; longer rows are finished by a second kernel. The gradient multiplies
by the slope of the activation in the same kernel, then the codes' is a dense product of torch and
the decoder's a product over gathered codes, in parts that are summed in a fixed order.

Nothing here waits for the device, but for the number of rows of a sparse gradient. A row whose id
is out of bounds comes out as NaN, and adds nothing to gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device

_OPTIONS = {"enable_fp_fusion": True}
_WHOLE = 512  # features; the accumulators of a longer row spill
_MOST_FEATURES = 1 << 16  # beyond, a row does not fit the registers of the second kernel
_SPLIT_PLACES = 1024  # that one part of the decoder's gradient sums over


@triton.jit
def _valid_ids(ids_ptr, m, live, rows):
    ids = tl.cast(tl.load(ids_ptr + m, mask=live, other=0), tl.int64)
    return ids, live & (ids >= 0) & (ids < rows)


@triton.jit
def _add_row(z, ids_ptr, table_ptr, rows, stride, m, n, live, mask_n):
    ids, valid = _valid_ids(ids_ptr, m, live, rows)
    mask = valid[:, None] & mask_n[None, :]
    row = tl.load(table_ptr + ids[:, None] * stride + n[None, :], mask=mask, other=0.0)
    return tl.where(valid[:, None] | ~live[:, None], z + row.to(z.dtype), float("nan"))


@triton.jit
def _finish(
    z, m, n, live, mask_n, features,
    ids0_ptr, table0_ptr, rows0, stride0, ids1_ptr, table1_ptr, rows1, stride1,
    weight_ptr, shift_ptr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    # z [BLOCK_M, BLOCK_N]: whole rows where there is a norm; NORM as in _row_norm.KINDS.
    if ids0_ptr is not None:
        z = _add_row(z, ids0_ptr, table0_ptr, rows0, stride0, m, n, live, mask_n)
    if ids1_ptr is not None:
        z = _add_row(z, ids1_ptr, table1_ptr, rows1, stride1, m, n, live, mask_n)
    if NORM != 0:
        z = tl.where(mask_n[None, :], z, 0.0)
        if NORM == 1:
            z = tl.where(mask_n[None, :], z - (tl.sum(z, axis=1) / features)[:, None], 0.0)
        z = z * (1.0 / tl.sqrt(tl.sum(z * z, axis=1) / features + EPS))[:, None]
        if weight_ptr is not None:
            z *= tl.load(weight_ptr + n, mask=mask_n, other=0.0).to(z.dtype)[None, :]
        if shift_ptr is not None:
            z += tl.load(shift_ptr + n, mask=mask_n, other=0.0).to(z.dtype)[None, :]
    return z


@triton.jit(do_not_specialize=["places"])
def _rows_kernel(
    ids_ptr,  # [places]
    codes_ptr,  # [rows, rank]
    scales_ptr,  # [rows] or None
    decoder_ptr,  # [features, rank]
    bias_ptr,  # [features] or None
    grad_ptr,  # [places, features], contiguous; None: the rows themselves
    y_ptr,  # [places, features], contiguous
    places, rows, features, rank,
    stride_cv, stride_ck, stride_dn, stride_dk,
    ids0_ptr, table0_ptr, rows0, stride0, ids1_ptr, table1_ptr, rows1, stride1,
    weight_ptr, shift_ptr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(features, BLOCK_N)
    pid = tl.program_id(0)
    m = tl.cast(pid // tiles_n, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.cast(pid % tiles_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, mask_n = m < places, n < features
    ids, valid = _valid_ids(ids_ptr, m, live, rows)
    code_rows = codes_ptr + ids[:, None] * stride_cv
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, rank, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        mask_k = k < rank
        w = tl.load(  # [BLOCK_K, BLOCK_N]
            decoder_ptr + n[None, :] * stride_dn + k[:, None] * stride_dk,
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        codes = tl.load(  # [BLOCK_M, BLOCK_K]
            code_rows + k[None, :] * stride_ck, mask=valid[:, None] & mask_k[None, :], other=0
        )
        z = tl.dot(codes.to(w.dtype), w, z, input_precision=PRECISION, out_dtype=ACC)
    if scales_ptr is not None:
        z *= tl.load(scales_ptr + ids, mask=valid, other=0.0).to(ACC)[:, None]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(ACC)[None, :]
    mask = live[:, None] & mask_n[None, :]
    if grad_ptr is not None:
        # The gradient times the slope; the codes of ACTIVATION are the positions in op.ACTIVATIONS.
        if ACTIVATION == 1:
            slope = tl.where(z > 0, 1.0, 0.0)
        elif ACTIVATION == 2:
            slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            slope += 0.3989422804014327 * z * tl.exp(-0.5 * z * z)
        else:
            slope = tl.where(z > 0, 1.0, tl.exp(tl.minimum(z, 0.0)))
        grad = tl.load(grad_ptr + m[:, None] * features + n[None, :], mask=mask, other=0.0)
        tl.store(y_ptr + m[:, None] * features + n[None, :], grad.to(ACC) * slope, mask=mask)
    else:
        if ACTIVATION == 1:
            z = tl.where(z < 0, 0.0, z)  # unlike a maximum, keeps NaN
        elif ACTIVATION == 2:
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        elif ACTIVATION == 3:
            # exp(z) - 1 loses digits near 0, where its series does not.
            series = z * (1.0 + z * (0.5 + z * (0.16666666666666666 + z * 0.041666666666666664)))
            below = tl.where(z > -0.02, series, tl.exp(tl.minimum(z, 0.0)) - 1.0)
            z = tl.where(z > 0, z, below)
        z = tl.where(valid[:, None], z, float("nan"))
        z = _finish(
            z, m, n, live, mask_n, features,
            ids0_ptr, table0_ptr, rows0, stride0, ids1_ptr, table1_ptr, rows1, stride1,
            weight_ptr, shift_ptr, NORM, EPS,
        )  # fmt: skip
        tl.store(y_ptr + m[:, None] * features + n[None, :], z, mask=mask)


@triton.jit(do_not_specialize=["places"])
def _finish_kernel(
    x_ptr,  # [places, features], contiguous
    y_ptr,  # like x
    places, features,
    ids0_ptr, table0_ptr, rows0, stride0, ids1_ptr, table1_ptr, rows1, stride1,
    weight_ptr, shift_ptr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.cast(tl.program_id(0), tl.int64) + tl.arange(0, 1)
    n = tl.arange(0, BLOCK_N)
    live, mask_n = m < places, n < features
    mask = live[:, None] & mask_n[None, :]
    z = tl.load(x_ptr + m[:, None] * features + n[None, :], mask=mask, other=0.0).to(ACC)
    z = _finish(
        z, m, n, live, mask_n, features,
        ids0_ptr, table0_ptr, rows0, stride0, ids1_ptr, table1_ptr, rows1, stride1,
        weight_ptr, shift_ptr, NORM, EPS,
    )  # fmt: skip
    tl.store(y_ptr + m[:, None] * features + n[None, :], z, mask=mask)


@triton.jit(do_not_specialize=["places"])
def _grad_decoder_kernel(
    ids_ptr,  # [places]
    codes_ptr,  # [rows, rank]
    factor_ptr,  # [places]: what each place counts
    grad_ptr,  # [places, features], contiguous
    out_ptr,  # [splits, features, rank], contiguous
    places, rows, features, rank, split,
    stride_cv, stride_ck,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.cast(tl.program_id(2), tl.int64)
    mask_n, mask_k = n < features, k < rank
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    size = tl.minimum(split, places - part * split)
    for start in range(0, size, BLOCK_M):
        m = part * split + start + tl.arange(0, BLOCK_M)
        live = start + tl.arange(0, BLOCK_M) < size
        ids, valid = _valid_ids(ids_ptr, m, live, rows)
        factor = tl.load(factor_ptr + m, mask=valid, other=0.0)
        grad = tl.load(  # [BLOCK_M, BLOCK_N]
            grad_ptr + m[:, None] * features + n[None, :],
            mask=(valid & (factor != 0))[:, None] & mask_n[None, :],
            other=0.0,
        )
        codes = tl.load(  # [BLOCK_M, BLOCK_K]
            codes_ptr + ids[:, None] * stride_cv + k[None, :] * stride_ck,
            mask=valid[:, None] & mask_k[None, :],
            other=0,
        )
        codes = (codes.to(ACC) * factor.to(ACC)[:, None]).to(grad.dtype)
        acc = tl.dot(tl.trans(grad), codes, acc, input_precision=PRECISION, out_dtype=ACC)
    at = (part * features + n[:, None]) * rank + k[None, :]
    tl.store(out_ptr + at, acc, mask=mask_n[:, None] & mask_k[None, :])


def config(features: int, size: int, whole: bool) -> dict[str, int]:
    """Tile and launch options for elements of `size` bytes; not tuned on hardware."""
    if whole:
        block_n = max(triton.next_power_of_2(features), 16)
        tile = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_K": 16}
        return tile | {"num_warps": 8, "num_stages": 1}
    # float32 and float64 multiply without tensor cores, on operands held in registers.
    tile = (
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
        if size == 2
        else {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    )
    return tile | {"num_warps": 4, "num_stages": 2}


def _numerics(dtype: torch.dtype) -> dict:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return {"ACC": acc, "PRECISION": "tf32" if tf32 else "ieee", **_OPTIONS}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launch_rows(ids, codes, scales, decoder, bias, activation, grad, y, end, whole) -> None:
    features, rank = decoder.shape
    places = ids.numel()
    tiles = config(features, decoder.element_size(), whole)
    grid = triton.cdiv(places, tiles["BLOCK_M"]) * triton.cdiv(features, tiles["BLOCK_N"])
    with torch.cuda.device_of(codes):
        _rows_kernel[(grid,)](
            ids, codes, scales, decoder, bias, grad, y,
            places, codes.shape[0], features, rank, *codes.stride(), *decoder.stride(),
            *_end_arguments(end),
            ACTIVATION=activation, NORM=end[4], EPS=end[7],
            **_numerics(decoder.dtype), **tiles,
        )  # fmt: skip


def _end_arguments(end) -> tuple:
    tables = []
    for ids, table in (end[:2], end[2:4]):
        if ids is None:
            tables += [None, None, 0, 0]
        else:
            table = table if table.stride(1) == 1 else table.contiguous()
            tables += [ids.contiguous(), table, table.shape[0], table.stride(0)]
    return (*tables, *(None if t is None else t.contiguous() for t in end[5:7]))


_NOTHING = (None, None, None, None, 0, None, None, 0.0)


def forward(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    decoder: Tensor,
    bias: Tensor | None,
    activation: int,
    *end,
) -> Tensor:
    """The rows of `ids`; see `op.low_rank_embedding`."""
    check_device("low_rank_embedding", codes)
    features, norm = decoder.shape[0], end[4]
    if norm and features > _MOST_FEATURES:
        raise ValueError(
            f"low_rank_embedding: impl 'triton' normalises rows of at most {_MOST_FEATURES} "
            f"features, got {features}; use impl 'reference'"
        )
    shape, dtype, device = (*ids.shape, features), decoder.dtype, codes.device
    y = torch.empty(shape, dtype=dtype, device=device)
    if y.numel() == 0:
        return y
    whole = bool(norm) and features <= _WHOLE
    table = (ids.contiguous(), codes, None if scales is None else scales.contiguous(), decoder,
             None if bias is None else bias.contiguous(), activation)  # fmt: skip
    if whole or not norm:
        _launch_rows(*table, None, y, end, whole)
        return y
    x = torch.empty(shape, dtype=_wide(dtype), device=device)
    _launch_rows(*table, None, x, _NOTHING, False)
    block = triton.next_power_of_2(features)
    with torch.cuda.device_of(codes):
        _finish_kernel[(ids.numel(),)](
            x, y, ids.numel(), features, *_end_arguments(end),
            NORM=norm, EPS=end[7], BLOCK_N=block,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            num_warps=min(max(block // 512, 4), 16), **_OPTIONS,
        )  # fmt: skip
    return y


def grad(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    decoder: Tensor,
    bias: Tensor | None,
    activation: int,
    padding_idx: int,
    by_frequency: bool,
    sparse: bool,
    need_codes: bool,
    need_decoder: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the gradient of codes, gradients of codes, decoder and bias: `reference.grad`."""
    check_device("low_rank_embedding", codes)
    features, rank = decoder.shape
    rows, places, dtype = codes.shape[0], ids.numel(), decoder.dtype
    none = decoder.new_empty(0)
    ids, g = ids.reshape(-1).contiguous(), grad.reshape(places, features).contiguous()
    valid = (ids >= 0) & (ids < rows)
    safe = torch.where(valid, ids, 0).long()
    counted = valid & (ids != padding_idx)
    factor = counted.to(_wide(dtype))
    if by_frequency:
        times = factor.new_zeros(rows).index_put((safe,), counted.to(factor.dtype), accumulate=True)
        factor = factor / times[safe].clamp_min(1)
    if activation and places:
        sloped = torch.empty(places, features, dtype=dtype, device=codes.device)
        _launch_rows(ids, codes, scales, decoder, bias, activation, g, sloped, _NOTHING, False)
        g = sloped
    d_codes = d_decoder = d_bias = none
    used = safe.new_empty(0)
    if need_codes:
        d_codes = torch.where(counted[:, None], (g @ decoder) * factor[:, None], 0)
        at, total = safe, rows
        if sparse:
            used, at = safe[counted].unique(return_inverse=True)
            d_codes, total = d_codes[counted], len(used)
        # Adds up in a fixed order.
        d_codes = torch.ops.aten.embedding_dense_backward(d_codes, at, total, -1, False)
        d_codes = d_codes.to(dtype)
    if need_decoder:
        by_row = factor if scales is None else factor * scales.to(factor.dtype)[safe]
        splits = max(1, triton.cdiv(places, _SPLIT_PLACES))
        parts = torch.empty(splits, features, rank, dtype=_wide(dtype), device=codes.device)
        side = 64 if dtype.itemsize == 2 else 32
        grid = (triton.cdiv(features, side), triton.cdiv(rank, side), splits)
        with torch.cuda.device_of(codes):
            _grad_decoder_kernel[grid](
                ids, codes, by_row, g, parts,
                places, rows, features, rank, _SPLIT_PLACES, *codes.stride(),
                BLOCK_M=32 if side == 64 else 16, BLOCK_N=side, BLOCK_K=side,
                num_warps=4, num_stages=2, **_numerics(dtype),
            )  # fmt: skip
        d_decoder = parts.sum(0).to(dtype)
    if need_bias:
        d_bias = (
            torch.where(counted[:, None], g.to(factor.dtype) * factor[:, None], 0).sum(0).to(dtype)
        )
    return used, d_codes, d_decoder, d_bias
