# SPDX-License-Identifier: Apache-2.0
"""Which rows and keys a program works on, found on the device; shared by the Triton kernels.

Sequence b is given row tiles cu[b] * PACK // BLOCK + b up to the first one of sequence b + 1. That
is at least as many as it needs, at most total * PACK // BLOCK + B + 1 over the whole batch, and
ascends in b, so that a program finds its sequence by a search in cu_seqlens and no table of tiles
is built. Rows behind the last sequence form one more, which sees no keys: it gets zeros.

A row is a (token, head) pair: PACK query heads that share a key head lie side by side in a tile.
"""

import triton
import triton.language as tl

VARYING = ["sequences", "total", "total_k", "left", "right"]  # from call to call
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def count_up_to(ptr, count, x, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """How many i in [0, count) have ptr[i] <= x, for ascending values; with BLOCK > 0, how many
    have ptr[i] * PACK // BLOCK + i <= x. A step divides the range by 128."""
    lane = tl.arange(0, 128)
    low = count - count
    span = count
    while span > 0:
        step = tl.cdiv(span, 128)
        i = low + (lane + 1) * step - 1
        inside = i < low + span
        value = tl.load(ptr + i, mask=inside, other=0).to(tl.int64)
        if BLOCK > 0:
            value = value * PACK // BLOCK + i
        passed = tl.sum((inside & (value <= x)).to(tl.int32), 0)
        end = low + span
        low += passed * step
        span = tl.minimum(step - 1, end - low)
    return low


@triton.jit
def find_span(cu_ptr, b, sequences, total):
    """Tokens [start, stop) of sequence b, inside the tensor whatever cu_seqlens holds; those
    behind the last sequence for b == sequences."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), total)
    stop = tl.load(cu_ptr + b + 1, mask=b < sequences, other=total)
    return start, tl.minimum(tl.maximum(stop, start), total)


@triton.jit
def find_tile(cu_ptr, sequences, total, tile, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence of a tile, the tokens [start, stop) of it, and the tile's first row in it."""
    b = tl.maximum(count_up_to(cu_ptr, sequences + 1, tile, PACK, BLOCK) - 1, 0)
    start, stop = find_span(cu_ptr, b, sequences, total)
    before = (tl.cast(start, tl.int64) * PACK // BLOCK).to(tl.int32) + b
    return b, start, stop, tl.maximum(tile - before, 0) * BLOCK


@triton.jit
def find_seen(first, last, count, before, after, positions_ptr, BOUNDED: tl.constexpr):
    """Of `count` tokens, the range [begin, end) that any and [full_begin, full_end) that each of
    the positions first .. last sees, `before` and `after` its own."""
    begin = count - count
    end = count
    full_begin = begin
    full_end = end
    if BOUNDED:
        first = tl.cast(first, tl.int64)
        last = tl.cast(last, tl.int64)
        if positions_ptr is None:
            begin = tl.minimum(tl.maximum(first - before, 0), count).to(tl.int32)
            end = tl.minimum(tl.maximum(last + after + 1, 0), count).to(tl.int32)
            full_begin = tl.minimum(tl.maximum(last - before, 0), count).to(tl.int32)
            full_end = tl.minimum(tl.maximum(first + after + 1, 0), count).to(tl.int32)
        else:
            begin = count_up_to(positions_ptr, count, first - before - 1, 1, 0)
            end = count_up_to(positions_ptr, count, last + after, 1, 0)
            full_end = full_begin
    return begin, end, full_begin, full_end


@triton.jit
def positions_of(ptr, start, i, count, shift):
    """Position of tokens i of a sequence that starts at `start` and has `count`."""
    place = i + shift
    if ptr is not None:
        place = tl.load(ptr + start + i, mask=(i >= 0) & (i < count), other=0)
    return place


@triton.jit
def rows_at(token, head, stride_t, stride_h):
    """Where the vectors of `token` (a vector) and `head` (a vector or one) begin."""
    return tl.cast(token, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_tile(ptr, rows, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: the vectors that begin at `rows`, zeros where not live."""
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, token, head, HEADS: tl.constexpr, live, tile, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write [rows, BLOCK_D] into a contiguous [T, HEADS, D]."""
    d = tl.arange(0, BLOCK_D)
    rows = (tl.cast(token, tl.int64) * HEADS + head) * D
    mask = live[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + rows[:, None] + d[None, :], tile, mask=mask)


@triton.jit
def rows_of(row, h, PACK: tl.constexpr):
    """Token and head of rows of a tile; h counts groups of PACK heads."""
    token = row
    head = h
    if PACK > 1:
        token = row // PACK
        head = h * PACK + row % PACK
    return token, head


@triton.jit
def in_window(row_positions, key_positions, left, right):
    """[rows, keys] (or transposed, by the shapes given): does the row see the key?"""
    distance = key_positions - row_positions
    return (distance >= -left) & (distance <= right)


@triton.jit
def find_segments(cu_ptr, first, sequences, start, stop, token, SEQUENCES: tl.constexpr):
    """Tokens [begin, end) of the sequence that each token of [start, stop) belongs to, where the
    span holds the sequences first .. first + SEQUENCES - 1."""
    begin = token * 0 + start
    end = token * 0 + stop
    for i in tl.static_range(1, SEQUENCES):
        cut = tl.load(cu_ptr + tl.minimum(first + i, sequences))
        cut = tl.minimum(tl.maximum(cut, start), stop)
        begin = tl.where(token >= cut, tl.maximum(begin, cut), begin)
        end = tl.where(token < cut, tl.minimum(end, cut), end)
    return begin, end


@triton.jit
def find_packed(cu_ptr, sequences, total, program, SEQUENCES: tl.constexpr):
    """First sequence of a program that takes SEQUENCES whole ones, and their tokens; behind the
    last sequence, nothing."""
    first = program * SEQUENCES
    start, _ = find_span(cu_ptr, first, sequences, total)
    last = tl.minimum(first + SEQUENCES, sequences)
    stop = tl.minimum(tl.maximum(tl.load(cu_ptr + last), start), total)
    return first, start, stop


@triton.jit
def cut_too_long(start, stop, BLOCK: tl.constexpr):
    """The part of a span to compute, and the rest to poison: all or nothing of it."""
    fits = stop - start <= BLOCK
    return tl.where(fits, stop, start), tl.where(fits, start, stop)


@triton.jit
def packed_mask(
    cu_ptr, positions_ptr, first, sequences, start, stop, left, right,
    BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """For rows and keys of a tile of whole sequences: [rows, keys] seen, and on the diagonal."""
    row = start + tl.arange(0, BLOCK)
    key = start + tl.arange(0, BLOCK)
    seen = (key < stop)[None, :] & (row < stop)[:, None]
    if SEQUENCES > 1:
        row_begin, _ = find_segments(cu_ptr, first, sequences, start, stop, row, SEQUENCES)
        key_begin, _ = find_segments(cu_ptr, first, sequences, start, stop, key, SEQUENCES)
        seen = seen & (row_begin[:, None] == key_begin[None, :])
    row_at = positions_of(positions_ptr, 0, row, stop, 0)[:, None]
    key_at = positions_of(positions_ptr, 0, key, stop, 0)[None, :]
    if BOUNDED:
        seen = seen & in_window(row_at, key_at, left, right)
    return seen, row_at == key_at


@triton.jit
def packed_weights(
    cu_ptr, first, sequences, start, stop, token,
    HEADS: tl.constexpr, SEQUENCES: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """What turns sums over rows and heads into means, for each token of the tile."""
    begin, end = find_segments(cu_ptr, first, sequences, start, stop, token, SEQUENCES)
    return 1.0 / (tl.maximum(end - begin, 1) * (1.0 if PER_HEAD else HEADS))
