# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of ngram_embedding_bag: a program sums some columns of the rows of one bag.

The table's gradient is such a sum too, of the gradient's rows, once ids are sorted. A row that
occurs often is cut into pieces of PIECE occurrences, whose sums a second kernel adds in order: no
atomics, and a hot row is no one program's work.

Nothing here waits for the device, but for the number of rows of a sparse gradient. Offsets are
clamped and ids out of bounds left out, so no input makes a kernel leave its tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device

PIECE = 128  # occurrences of a row that one program sums
BLOCK_N = 8  # rows loaded together


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def _bag_kernel(
    ids_ptr,  # [count]
    offsets_ptr,  # [B + 1]
    table_ptr,  # [rows, features] in strides
    weights_ptr,  # [count] or None
    scales_ptr,  # [rows] or None
    out_ptr,  # [B, features], contiguous
    count,
    rows,
    padding,
    features,
    stride_v,
    stride_d,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    bag = tl.cast(tl.program_id(0), tl.int64)
    d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < features
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + bag), 0), count)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + bag + 1), begin), count)
    sums = tl.zeros((BLOCK_D,), dtype=ACC)
    live = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for step in range(tl.cdiv(end - begin, BLOCK_N)):
        i = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.load(ids_ptr + i, mask=i < end, other=-1).to(tl.int64)
        valid = (row >= 0) & (row < rows) & (row != padding)
        mask = valid[:, None] & mask_d[None, :]
        values = tl.load(  # [BLOCK_N, BLOCK_D]
            table_ptr + row[:, None] * stride_v + d[None, :] * stride_d, mask=mask, other=0
        ).to(ACC)
        factor = valid.to(ACC)
        if weights_ptr is not None:
            factor *= tl.load(weights_ptr + i, mask=valid, other=0.0).to(ACC)
        if scales_ptr is not None:
            factor *= tl.load(scales_ptr + row, mask=valid, other=0.0).to(ACC)
        sums += tl.sum(values * factor[:, None], axis=0)
        live += valid.to(tl.int32)
    if MEAN:
        sums = sums / tl.maximum(tl.sum(live, axis=0), 1).to(ACC)
    tl.store(out_ptr + bag * features + d, sums, mask=mask_d)


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def _dot_kernel(
    grad_ptr,  # [B, features], contiguous
    ids_ptr,  # [count]
    bag_ptr,  # [count] int64
    factors_ptr,  # [count]
    table_ptr,  # [rows, features] in strides
    scales_ptr,  # [rows] or None
    out_ptr,  # [count]
    count,
    rows,
    padding,
    features,
    stride_v,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = i < count
    row = tl.load(ids_ptr + i, mask=live, other=-1).to(tl.int64)
    valid = (row >= 0) & (row < rows) & (row != padding)
    bag = tl.load(bag_ptr + i, mask=valid, other=0)
    sums = tl.zeros((BLOCK_N,), dtype=ACC)
    for step in range(tl.cdiv(features, BLOCK_D)):
        d = tl.cast(step, tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (d < features)[None, :]
        values = tl.load(  # [BLOCK_N, BLOCK_D]
            table_ptr + row[:, None] * stride_v + d[None, :] * stride_d, mask=mask, other=0
        ).to(ACC)
        grad = tl.load(grad_ptr + bag[:, None] * features + d[None, :], mask=mask, other=0.0)
        sums += tl.sum(values * grad.to(ACC), axis=1)
    sums *= tl.load(factors_ptr + i, mask=valid, other=0.0)
    if scales_ptr is not None:
        sums *= tl.load(scales_ptr + row, mask=valid, other=0.0).to(ACC)
    tl.store(out_ptr + i, sums, mask=live)


@triton.jit(do_not_specialize=["count", "rows"])
def _piece_kernel(
    grad_ptr,  # [B, features], contiguous
    ids_ptr,  # [count] int64, sorted
    bag_ptr,  # [count] int64, as ids
    factors_ptr,  # [count], as ids
    kind_ptr,  # [count] int32: 0 no head of a piece, 1 of a row's only one, 2 of one of several
    slot_ptr,  # [count] int64: where the sum of a piece of several goes
    slot_ids_ptr,  # [slots] int64 out
    partial_ptr,  # [slots, features] out
    out_ptr,  # [rows, features] out
    count,
    rows,
    features,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    head = tl.cast(tl.program_id(0), tl.int64)
    kind = tl.load(kind_ptr + head)
    id = tl.load(ids_ptr + head)
    if (kind > 0) & (id < rows):
        d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = d < features
        stop = tl.minimum(head + PIECE, count)
        sums = tl.zeros((BLOCK_D,), dtype=ACC)
        at = head
        while at < stop:
            i = at + tl.arange(0, BLOCK_N)
            same = (i < stop) & (tl.load(ids_ptr + i, mask=i < stop, other=-1) == id)
            bag = tl.load(bag_ptr + i, mask=same, other=0)
            factor = tl.load(factors_ptr + i, mask=same, other=0.0)
            grad = tl.load(  # [BLOCK_N, BLOCK_D]
                grad_ptr + bag[:, None] * features + d[None, :],
                mask=same[:, None] & mask_d[None, :],
                other=0.0,
            )
            sums += tl.sum(grad.to(ACC) * factor[:, None], axis=0)
            all_same = tl.sum(same.to(tl.int32), axis=0) == BLOCK_N
            at = tl.where(all_same, at + BLOCK_N, stop)
        if kind == 1:
            tl.store(out_ptr + id * features + d, sums, mask=mask_d)
        else:
            slot = tl.load(slot_ptr + head)
            tl.store(slot_ids_ptr + slot, id)
            tl.store(partial_ptr + slot * features + d, sums, mask=mask_d)


@triton.jit(do_not_specialize=["slots"])
def _join_kernel(
    slot_ids_ptr,  # [slots] int64, -1 where nothing is
    partial_ptr,  # [slots, features]
    out_ptr,  # [rows, features] out
    slots,
    features,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    first = tl.cast(tl.program_id(0), tl.int64)
    id = tl.load(slot_ids_ptr + first)
    before = tl.load(slot_ids_ptr + first - 1, mask=first > 0, other=-1)
    if (id >= 0) & (id != before):
        d = tl.cast(tl.program_id(1), tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = d < features
        sums = tl.zeros((BLOCK_D,), dtype=ACC)
        at = first
        while at < slots:
            i = at + tl.arange(0, BLOCK_N)
            same = tl.load(slot_ids_ptr + i, mask=i < slots, other=-1) == id
            sums += tl.sum(
                tl.load(
                    partial_ptr + i[:, None] * features + d[None, :],
                    mask=same[:, None] & mask_d[None, :],
                    other=0.0,
                ),
                axis=0,
            )
            all_same = tl.sum(same.to(tl.int32), axis=0) == BLOCK_N
            at = tl.where(all_same, at + BLOCK_N, slots)
        tl.store(out_ptr + id * features + d, sums, mask=mask_d)


def config(features: int, dtype: torch.dtype) -> dict:
    """Tile and launch options; not tuned on hardware."""
    return {
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": min(triton.next_power_of_2(features), 256),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": 4,
    }


def forward(
    ids: Tensor,
    offsets: Tensor,
    table: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    """Sums or means of rows; see `op.ngram_embedding_bag`."""
    check_device("ngram_embedding_bag", table)
    bags, features = offsets.shape[0] - 1, table.shape[1]
    dtype = torch.float32 if table.dtype == torch.int8 else table.dtype
    out = torch.empty(bags, features, dtype=dtype, device=table.device)
    if bags == 0:
        return out
    tiles = config(features, table.dtype)
    with torch.cuda.device_of(table):
        _bag_kernel[(bags, triton.cdiv(features, tiles["BLOCK_D"]))](
            ids.contiguous(),
            offsets.contiguous(),
            table,
            None if weights is None else weights.contiguous(),
            None if scales is None else scales.contiguous(),
            out,
            *(ids.shape[0], table.shape[0], padding_idx, features),
            *table.stride(),
            MEAN=mean,
            **tiles,
        )
    return out


def _spread(
    ids: Tensor, offsets: Tensor, rows: int, padding_idx: int, mean: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each id: whether it counts, its bag, and the factor of the bag."""
    count = ids.shape[0]
    bounds = offsets.long().clamp(0, count).contiguous()
    live = (ids >= 0) & (ids < rows) & (ids != padding_idx)
    places = torch.arange(count, device=ids.device)
    bag = (torch.searchsorted(bounds, places, right=True) - 1).clamp(0, len(bounds) - 2)
    if not mean:
        return live, bag, torch.ones(count, dtype=dtype, device=ids.device)
    before = torch.nn.functional.pad(live.long().cumsum(0), (1, 0))
    counts = before[bounds[1:]] - before[bounds[:-1]]
    return live, bag, (1 / counts.clamp_min(1).to(dtype))[bag]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_weights(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    table: Tensor,
    scales: Tensor | None,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    check_device("ngram_embedding_bag", table)
    count, (rows, features) = ids.shape[0], table.shape
    out = torch.empty(count, dtype=_wide(table.dtype), device=table.device)
    if count == 0 or offsets.shape[0] == 1:
        return out.zero_()
    _, bag, factors = _spread(ids, offsets, rows, padding_idx, mean, out.dtype)
    tiles = config(features, table.dtype)
    with torch.cuda.device_of(table):
        _dot_kernel[(triton.cdiv(count, BLOCK_N),)](
            grad.contiguous(),
            ids.contiguous(),
            bag,
            factors,
            table,
            None if scales is None else scales.contiguous(),
            out,
            *(count, rows, padding_idx, features),
            *table.stride(),
            **tiles,
        )
    return out


def grad_table(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: int,
    padding_idx: int,
    mean: bool,
) -> Tensor:
    """The table's gradient, dense."""
    check_device("ngram_embedding_bag", grad)
    count, features = ids.shape[0], grad.shape[1]
    out = torch.zeros(rows, features, dtype=grad.dtype, device=grad.device)
    if count == 0 or rows == 0 or grad.shape[0] == 0:
        return out
    acc = _wide(grad.dtype)
    live, bag, factors = _spread(ids, offsets, rows, padding_idx, mean, acc)
    factors = factors if weights is None else factors * weights.to(acc)
    ordered, order = torch.where(live, ids.long(), rows).sort(stable=True)
    places = torch.arange(count, device=ids.device)
    new = torch.ones(count, dtype=torch.bool, device=ids.device)
    new[1:] = ordered[1:] != ordered[:-1]
    rank = places - torch.where(new, places, 0).cummax(0).values  # of an occurrence of its row
    head = rank % PIECE == 0
    longer = torch.zeros_like(head)
    longer[:-PIECE] = ordered[PIECE:] == ordered[:-PIECE]
    several = head & ((rank > 0) | longer)
    slots = 2 * count // PIECE + 1  # what is cut has more than PIECE occurrences
    slot_ids = torch.full((slots,), -1, dtype=torch.int64, device=ids.device)
    partial = torch.empty(slots, features, dtype=acc, device=grad.device)
    tiles = config(features, grad.dtype)
    columns = triton.cdiv(features, tiles["BLOCK_D"])
    with torch.cuda.device_of(grad):
        _piece_kernel[(count, columns)](
            grad.contiguous(),
            ordered,
            bag[order],
            factors[order],
            head.int() + several.int(),
            several.long().cumsum(0) - 1,
            slot_ids,
            partial,
            out,
            *(count, rows, features),
            PIECE=PIECE,
            **tiles,
        )
        if count > PIECE:
            _join_kernel[(slots, columns)](slot_ids, partial, out, slots, features, **tiles)
    return out


def grad_rows(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    rows: int,
    padding_idx: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The rows of the table that occur, and their gradient; waits for their number."""
    live = (ids >= 0) & (ids < rows) & (ids != padding_idx)
    used = ids[live].long().unique()
    compact = torch.where(live, torch.searchsorted(used, ids.long()), -1)
    return used, grad_table(grad, compact, offsets, weights, len(used), -1, mean)
