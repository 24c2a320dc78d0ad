# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of select_tokens, gather_tokens and scatter_tokens.

Selection gives each sequence a program, twice: to count the tokens it keeps, and, once a cumulative
sum has said where they go, to write their numbers. Scores become integers of the same order, and
the last kept one is built bit by bit, each bit one count over the sequence.

Rows move as the widest integers that their bytes and addresses allow, up to four tensors a launch.

Nothing here waits for the device as long as `total` is given. cu_seqlens is clamped to the tensors,
and rows with indices out of bounds are zero, so no input makes a kernel leave its tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device, float64_bits, float64_of

BLOCK = 256  # tokens a program looks at together; most sequences are one such tile
_SLOTS = 4  # tensors of one gather launch
_THRESHOLD = 2  # the position in op.MODES
_SLACK = 1e-6  # as in reference


@triton.jit
def _bounds(cu_ptr, sequence, tokens):
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence + 1), begin), tokens)
    return begin, end


@triton.jit
def _order_keys(score):
    """Integers in the order of the scores; 0 and -0 are equal, NaN is lowest, below any number."""
    if score.dtype == tl.float64:
        bits = (score + 0.0).to(tl.int64, bitcast=True)
        keys = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(score == score, keys, -0x7FFFFFFFFFFFFFFF - 1)
    else:
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(score == score, keys, -0x7FFFFFFF - 1)


@triton.jit
def _protected(protect_ptr, begin, i, live):
    keep = i == begin if protect_ptr is None else tl.load(protect_ptr + i, mask=live, other=0) != 0
    return keep


@triton.jit
def _keys(scores_ptr, protect_ptr, begin, i, live, MOST: tl.constexpr):
    """Keys of tokens i; those protected are above all others. Dead lanes are never protected."""
    keys = _order_keys(tl.load(scores_ptr + i, mask=live, other=float("nan")))
    return tl.where(live & _protected(protect_ptr, begin, i, live), MOST, keys)


@triton.jit(do_not_specialize=["tokens", "value_bits"])
def _count_kernel(
    scores_ptr,  # [tokens]
    cu_ptr,  # [B + 1]
    protect_ptr,  # [tokens] as int8, or None
    wanted_ptr,  # [B] int32, or None
    kept_ptr,  # [B + 1] int32 out; kept[b + 1] is the count of sequence b
    tokens,
    value_bits,
    SLACK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    begin, end = _bounds(cu_ptr, b, tokens)
    length = end - begin
    guarded = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(tl.cdiv(length, BLOCK)):
        i = begin + step * BLOCK + tl.arange(0, BLOCK)
        live = i < end
        keep = _protected(protect_ptr, begin, i, live)
        if THRESHOLD:
            score = tl.load(scores_ptr + i, mask=live, other=float("nan"))
            keep = keep | (score >= float64_of(value_bits).to(score.dtype))
        guarded += (live & keep).to(tl.int32)
    count = tl.sum(guarded, axis=0)
    if not THRESHOLD:
        if wanted_ptr is None:
            wanted = tl.ceil(length.to(tl.float64) * float64_of(value_bits) - SLACK).to(tl.int32)
            wanted = tl.minimum(tl.maximum(wanted, 1), length)
        else:
            wanted = tl.minimum(tl.maximum(tl.load(wanted_ptr + b), 0), length)
        count = tl.maximum(count, wanted)
    tl.store(kept_ptr + b + 1, count)
    tl.store(kept_ptr, 0, mask=b == 0)


@triton.jit(do_not_specialize=["tokens", "total", "value_bits"])
def _select_kernel(
    scores_ptr,  # [tokens]
    cu_ptr,  # [B + 1]
    protect_ptr,  # [tokens] as int8, or None
    kept_ptr,  # [B + 1] int32, cumulative
    out_ptr,  # [total] int64
    tokens,
    total,
    value_bits,
    THRESHOLD: tl.constexpr,
    MOST: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    begin, end = _bounds(cu_ptr, b, tokens)
    steps = tl.cdiv(end - begin, BLOCK)
    place = tl.load(kept_ptr + b)
    count = tl.load(kept_ptr + b + 1) - place

    # The largest key that `count` tokens reach, from the top bit down: the sign bit to be cleared,
    # the others to be set.
    low = tl.full((), -MOST - 1, dtype=KEY)
    better = tl.zeros((), dtype=tl.int32)
    if not THRESHOLD:
        bit = BITS - 1
        while bit >= 0:
            candidate = low ^ (tl.full((), 1, dtype=KEY) << bit)
            reached = tl.zeros((BLOCK,), dtype=tl.int32)
            for step in range(steps):
                i = begin + step * BLOCK + tl.arange(0, BLOCK)
                live = i < end
                keys = _keys(scores_ptr, protect_ptr, begin, i, live, MOST)
                reached += (live & (keys >= candidate)).to(tl.int32)
            reaching = tl.sum(reached, axis=0)
            low = tl.where(reaching >= count, candidate, low)
            bit = tl.where(reaching == count, -1, bit - 1)  # these are the ones
        strictly = tl.zeros((BLOCK,), dtype=tl.int32)
        for step in range(steps):
            i = begin + step * BLOCK + tl.arange(0, BLOCK)
            live = i < end
            keys = _keys(scores_ptr, protect_ptr, begin, i, live, MOST)
            strictly += (live & (keys > low)).to(tl.int32)
        better = tl.sum(strictly, axis=0)

    ties = count - better
    for step in range(steps):
        i = begin + step * BLOCK + tl.arange(0, BLOCK)
        live = i < end
        if THRESHOLD:
            score = tl.load(scores_ptr + i, mask=live, other=float("nan"))
            above = score >= float64_of(value_bits).to(score.dtype)
            keep = live & (_protected(protect_ptr, begin, i, live) | above)
        else:
            keys = _keys(scores_ptr, protect_ptr, begin, i, live, MOST)
            tied = (live & (keys == low)).to(tl.int32)
            keep = live & ((keys > low) | ((tied != 0) & (tl.cumsum(tied, axis=0) <= ties)))
            ties -= tl.sum(tied, axis=0)
        rank = tl.cumsum(keep.to(tl.int32), axis=0) - 1
        at = place + rank
        tl.store(out_ptr + at, i.to(tl.int64), mask=keep & (at < total))
        place += tl.sum(keep.to(tl.int32), axis=0)


@triton.jit
def _move(from_ptr, to_ptr, source, target, valid, live, stride, COLUMNS, BLOCK_K: tl.constexpr):
    """Rows `source` of from_ptr, or zeros where not valid, to contiguous rows `target`."""
    for start in range(0, COLUMNS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < COLUMNS)[None, :]
        values = tl.load(
            from_ptr + source[:, None] * stride + k[None, :], mask=valid[:, None] & inside, other=0
        )
        tl.store(
            to_ptr + target[:, None] * COLUMNS + k[None, :], values, mask=live[:, None] & inside
        )


@triton.jit(do_not_specialize=["rows", "tokens"])
def _gather_kernel(
    indices_ptr,  # [rows] int64
    from_0, from_1, from_2, from_3,  # [tokens, columns] of integers, or None
    to_0, to_1, to_2, to_3,  # [rows, columns], contiguous
    stride_0, stride_1, stride_2, stride_3,
    rows,
    tokens,
    COLUMNS_0: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, COLUMNS_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < rows
    source = tl.load(indices_ptr + m, mask=live, other=0)
    valid = live & (source >= 0) & (source < tokens)
    _move(from_0, to_0, source, m, valid, live, stride_0, COLUMNS_0, BLOCK_K)
    if from_1 is not None:
        _move(from_1, to_1, source, m, valid, live, stride_1, COLUMNS_1, BLOCK_K)
    if from_2 is not None:
        _move(from_2, to_2, source, m, valid, live, stride_2, COLUMNS_2, BLOCK_K)
    if from_3 is not None:
        _move(from_3, to_3, source, m, valid, live, stride_3, COLUMNS_3, BLOCK_K)


@triton.jit(do_not_specialize=["rows", "total"])
def _inverse_kernel(
    indices_ptr,  # [rows] int64
    inverse_ptr,  # [total] int64, -1 where no row goes
    rows,
    total,
    BLOCK: tl.constexpr,
):
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(indices_ptr + i, mask=i < rows, other=-1)
    tl.store(inverse_ptr + at, i, mask=(at >= 0) & (at < total))


@triton.jit(do_not_specialize=["rows", "total"])
def _scatter_into_kernel(
    indices_ptr,  # [rows] int64
    from_ptr,  # [rows, columns] of integers
    to_ptr,  # [total, columns]
    stride_from,
    stride_to,
    rows,
    total,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(indices_ptr + m, mask=m < rows, other=-1)
    valid = (target >= 0) & (target < total)
    for start in range(0, COLUMNS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (k < COLUMNS)[None, :]
        values = tl.load(from_ptr + m[:, None] * stride_from + k[None, :], mask=mask, other=0)
        tl.store(to_ptr + target[:, None] * stride_to + k[None, :], values, mask=mask)


def _words(*tensors: Tensor) -> list[Tensor]:
    """[T, ...] tensors as [T, columns] of the widest integers that all of them can be seen as."""
    rows = [t if t[:1].is_contiguous() else t.contiguous() for t in tensors]
    # Rows of no elements, and single rows of any stride, have no step that matters.
    steps = [t.stride(0) if t.shape[0] > 1 else t[:1].numel() for t in rows]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        size = dtype.itemsize
        if all(
            t[:1].numel() * t.itemsize % size == 0
            and step * t.itemsize % size == 0
            and t.data_ptr() % size == 0
            for t, step in zip(rows, steps, strict=True)
        ):
            break
    seen = []
    for t, step in zip(rows, steps, strict=True):
        numel = t[:1].numel()
        if t.dtype.is_complex:
            t = torch.view_as_real(t)
            step, numel = step * 2, numel * 2
        flat = t.as_strided((t.shape[0], numel), (step, 1)).view(torch.uint8)
        seen.append(flat.view(dtype))
    return seen


def config(columns: int, itemsize: int) -> dict[str, int]:
    """Tile of one step of a copy: about 8 KiB; not tuned on hardware."""
    block_k = min(triton.next_power_of_2(max(columns, 1)), 4096 // itemsize)
    return {"BLOCK_M": max(1, min(8192 // itemsize // block_k, 128)), "BLOCK_K": block_k}


def gather(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    """Rows `indices` of each tensor; see `op.gather_tokens`."""
    check_device("gather_tokens", indices)
    rows, tokens, indices = indices.shape[0], tensors[0].shape[0], indices.contiguous()
    results = [torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in tensors]
    moved = [
        _words(t, result)
        for t, result in zip(tensors, results, strict=True)
        if result.numel() and tokens
    ]
    if not tokens:
        for result in results:
            result.zero_()
    for first in range(0, len(moved), _SLOTS):
        part = moved[first : first + _SLOTS]
        sources, targets = ([pair[side] for pair in part] for side in (0, 1))
        empty = [None] * (_SLOTS - len(part))
        widest = max(sources, key=lambda t: t.shape[1] * t.itemsize)
        tiles = config(widest.shape[1], widest.itemsize)
        columns = [t.shape[1] for t in sources] + [0] * len(empty)
        with torch.cuda.device_of(indices):
            _gather_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]),)](
                indices,
                *sources, *empty,
                *targets, *empty,
                *(t.stride(0) for t in sources), *(0 for _ in empty),
                rows,
                tokens,
                *columns,
                **tiles,
            )  # fmt: skip
    return results


def scatter(packed: Tensor, indices: Tensor, total: int) -> Tensor:
    """Row i of `packed` at row indices[i] of [total, ...]; see `op.scatter_tokens`."""
    check_device("scatter_tokens", packed)
    rows = indices.shape[0]
    inverse = torch.full((total,), -1, dtype=torch.int64, device=packed.device)
    if rows and total:
        block = 256
        with torch.cuda.device_of(packed):
            _inverse_kernel[(triton.cdiv(rows, block),)](
                indices.contiguous(), inverse, rows, total, BLOCK=block
            )
    return gather([packed], inverse)[0]


def scatter_into(out: Tensor, packed: Tensor, indices: Tensor) -> None:
    """Row i of `packed` into row indices[i] of `out`; see `op.scatter_tokens`."""
    check_device("scatter_tokens", packed)
    rows = indices.shape[0]
    if packed.numel() == 0 or out.numel() == 0:
        return
    source, target = _words(packed, out)
    tiles = config(source.shape[1], source.itemsize)
    with torch.cuda.device_of(packed):
        _scatter_into_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]),)](
            indices.contiguous(),
            source,
            target,
            *(source.stride(0), target.stride(0), rows, out.shape[0]),
            COLUMNS=source.shape[1],
            **tiles,
        )


def select(
    scores: Tensor,
    cu_seqlens: Tensor,
    protect: Tensor | None,
    counts: Tensor | None,
    value: float,
    mode: int,
    total: int | None,
    tensors: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Indices, cu_seqlens and rows of the kept tokens; see `op.compact_tokens`."""
    check_device("select_tokens", scores)
    tokens, sequences = scores.shape[0], cu_seqlens.shape[0] - 1
    scores, cu_seqlens = scores.contiguous(), cu_seqlens.contiguous()
    protect = None if protect is None else protect.contiguous().view(torch.int8)
    kept = torch.zeros(sequences + 1, dtype=torch.int32, device=scores.device)
    threshold = mode == _THRESHOLD
    options = {"THRESHOLD": threshold, "BLOCK": BLOCK}
    value_bits = float64_bits(value)
    if sequences:
        with torch.cuda.device_of(scores):
            _count_kernel[(sequences,)](
                scores,
                cu_seqlens,
                protect,
                None if counts is None else counts.contiguous(),
                kept,
                *(tokens, value_bits),
                SLACK=_SLACK,
                **options,
            )
        kept = kept.cumsum(0, dtype=torch.int32)
    count = int(kept[-1]) if total is None else total
    indices = torch.full((count,), -1, dtype=torch.int64, device=scores.device)
    wide = scores.dtype == torch.float64
    if sequences and count:
        with torch.cuda.device_of(scores):
            _select_kernel[(sequences,)](
                scores,
                cu_seqlens,
                protect,
                kept,
                indices,
                *(tokens, count, value_bits),
                MOST=(1 << 63) - 1 if wide else (1 << 31) - 1,
                KEY=tl.int64 if wide else tl.int32,
                BITS=64 if wide else 32,
                **options,
            )
    # Should more be kept than the caller said, what follows must not read past the end.
    kept = kept if total is None else kept.clamp(max=count)
    return indices, kept, gather(tensors, indices) if tensors else []
