# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that compute attention and what each key received.

_tiles_kernel     any lengths; a tile of rows stays, key tiles pass by (online softmax)
_scores_kernel    any lengths; a tile of keys stays, row tiles pass by, with the saved LSE
_packed_kernel    short sequences; whole sequences per program, output and scores in one pass
_resident_kernel  middle lengths; all keys of one sequence stay, output and scores in one pass

Logits are kept in powers of two: scale2 = scale * log2(e), and it is positive (the launcher puts a
negative sign into NEGATE). Masked logits are -inf; a row that sees no key gets zeros, and LSE -inf.
"""

import triton
import triton.language as tl

from lean_kernels.ops.ragged_attention.triton_schedule import (
    LN2,
    VARYING,
    cut_too_long,
    find_packed,
    find_seen,
    find_span,
    find_tile,
    in_window,
    load_tile,
    packed_mask,
    packed_weights,
    positions_of,
    rows_at,
    rows_of,
    store_tile,
)


@triton.jit(do_not_specialize=VARYING)
def _tiles_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [total, HEADS, D], contiguous
    lse_ptr,  # [total, HEADS], contiguous
    cu_ptr,
    cu_k_ptr,  # or None: as cu_ptr
    positions_ptr,  # or None
    key_positions_ptr,  # or None: consecutive, or where the queries are, the same
    sequences,
    total,
    total_k,
    left,
    right,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, start, stop, first = find_tile(cu_ptr, sequences, total, tl.program_id(0), PACK, BLOCK_M)
    h = tl.program_id(1)
    tokens = stop - start
    if first >= tokens * PACK:
        return
    k_start = start
    keys = tokens
    if cu_k_ptr is not None:
        k_start, k_stop = find_span(cu_k_ptr, b, sequences, total_k)
        keys = k_stop - k_start
    keys = tl.where(b < sequences, keys, 0)

    token, head = rows_of(first + tl.arange(0, BLOCK_M), h, PACK)
    live = token < tokens
    kv_head = h * PACK // GROUP
    q_rows = rows_at(start + token, head, stride_qt, stride_qh)
    q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
    shift = keys - tokens  # the last query stands at the last key
    first_token = first // PACK
    last_token = tl.minimum((first + BLOCK_M - 1) // PACK, tokens - 1)
    begin, end, full_begin, full_end = find_seen(
        positions_of(positions_ptr, start, first_token, tokens, shift),
        positions_of(positions_ptr, start, last_token, tokens, shift),
        keys,
        left,
        right,
        None if key_positions_ptr is None else key_positions_ptr + k_start,
        BOUNDED,
    )

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(begin, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        known = key < end
        k_rows = rows_at(k_start + key, kv_head, stride_kt, stride_kh)
        k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if NEGATE:
            s = -s
        if (block < full_begin) | (block + BLOCK_N > full_end):
            seen = known[None, :]
            if BOUNDED:
                row_at = positions_of(positions_ptr, start, token, tokens, shift)
                key_at = positions_of(key_positions_ptr, k_start, key, keys, 0)
                seen = seen & in_window(row_at[:, None], key_at[None, :], left, right)
            s = tl.where(seen, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale2)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s * scale2 - base[:, None])
        faded = tl.exp2(top - base)
        mass = mass * faded + tl.sum(p, 1)
        acc = acc * faded[:, None]
        v_rows = rows_at(k_start + key, kv_head, stride_vt, stride_vh)
        v = load_tile(v_ptr, v_rows, known, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    acc = acc * tl.where(mass == 0, 0.0, 1.0 / mass)[:, None]
    lse = (top + tl.log2(tl.where(mass == 0, 1.0, mass))) * LN2
    store_tile(out_ptr, start + token, head, HEADS, live, acc, D, BLOCK_D)
    tl.store(lse_ptr + tl.cast(start + token, tl.int64) * HEADS + head, lse, mask=live)


@triton.jit(do_not_specialize=[*VARYING, "parts"])
def _scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,  # [total, HEADS]
    scores_ptr,  # [total_k, HEADS] if PER_HEAD, else [grid 1, total_k]
    cu_ptr,
    cu_k_ptr,
    positions_ptr,
    key_positions_ptr,
    sequences,
    total,
    total_k,
    left,
    right,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,  # in groups of PACK
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEGATE: tl.constexpr,
    MEAN: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    key_cu_ptr = cu_ptr if cu_k_ptr is None else cu_k_ptr
    b, k_start, k_stop, first = find_tile(
        key_cu_ptr, sequences, total_k, tl.program_id(0), 1, BLOCK_N
    )
    part = tl.program_id(1)
    keys = k_stop - k_start
    if first >= keys:
        return
    start = k_start
    tokens = keys
    if cu_k_ptr is not None:
        start, stop = find_span(cu_ptr, b, sequences, total)
        tokens = stop - start
    tokens = tl.where(b < sequences, tokens, 0)

    key = first + tl.arange(0, BLOCK_N)
    known = key < keys
    shift = keys - tokens
    last = tl.minimum(first + BLOCK_N, keys) - 1
    # A key's rows are those that see it: before and after change places.
    back = 0 if positions_ptr is not None else shift
    key_first = positions_of(key_positions_ptr, k_start, first, keys, 0)
    key_last = positions_of(key_positions_ptr, k_start, last, keys, 0)
    begin, end, full_begin, full_end = find_seen(
        key_first - back,
        key_last - back,
        tokens,
        right,
        left,
        None if positions_ptr is None else positions_ptr + start,
        BOUNDED,
    )
    if EXCLUDE_DIAGONAL and positions_ptr is not None:
        full_end = full_begin

    received = tl.zeros((BLOCK_N,), tl.float32)
    for n in range(HEADS_PER_PROGRAM):
        h = part * HEADS_PER_PROGRAM + n
        kv_head = h * PACK // GROUP
        k_rows = rows_at(k_start + key, kv_head, stride_kt, stride_kh)
        k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
        column = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(begin * PACK, end * PACK, BLOCK_M):
            token, head = rows_of(block + tl.arange(0, BLOCK_M), h, PACK)
            live = token < end
            q_rows = rows_at(start + token, head, stride_qt, stride_qh)
            q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
            at = tl.cast(start + token, tl.int64) * HEADS + head
            lse2 = tl.load(lse_ptr + at, mask=live, other=float("inf")) / LN2
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if NEGATE:
                s = -s
            p = tl.exp2(s * scale2 - lse2[None, :])  # rows that are not there: exp2(-inf)
            first_token = block // PACK
            last_token = (block + BLOCK_M - 1) // PACK
            edge = (first_token < full_begin) | (last_token >= full_end)
            if EXCLUDE_DIAGONAL and positions_ptr is None:
                edge = edge | ((first_token + shift <= last) & (last_token + shift >= first))
            if BOUNDED or EXCLUDE_DIAGONAL:  # noqa: SIM102, one is known while compiling
                if edge:
                    row_at = positions_of(positions_ptr, start, token, tokens, shift)[None, :]
                    key_at = positions_of(key_positions_ptr, k_start, key, keys, 0)[:, None]
                    counted = live[None, :] & known[:, None]
                    if BOUNDED:
                        counted = counted & in_window(row_at, key_at, left, right)
                    if EXCLUDE_DIAGONAL:
                        counted = counted & (row_at != key_at)
                    p = tl.where(counted, p, 0.0)
            column += tl.sum(p, 1)
        if MEAN:
            column = column / (tl.maximum(tokens, 1) * (1.0 if PER_HEAD else HEADS))
        if PER_HEAD:
            at = tl.cast(k_start + key, tl.int64) * HEADS + h
            tl.store(scores_ptr + at, column, mask=known)
        received += column
    if not PER_HEAD:
        at = tl.cast(part, tl.int64) * total_k + k_start + key
        tl.store(scores_ptr + at, received, mask=known)


@triton.jit
def _softmax(s, scale2):
    """Rows of probabilities, and their LSE; zeros and -inf where all of s is -inf."""
    top = tl.max(s, 1) * scale2
    base = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(s * scale2 - base[:, None])
    mass = tl.sum(p, 1)
    p = p * tl.where(mass == 0, 0.0, 1.0 / mass)[:, None]
    return p, (top + tl.log2(tl.where(mass == 0, 1.0, mass))) * LN2


@triton.jit
def _fill(
    out_ptr, lse_ptr, scores_ptr, begin, stop, step, value, lse_value, part, total,
    HEADS: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Write `value` as the results of the heads of a program, BLOCK tokens in every `step`."""
    for block in range(begin, stop, step):
        token = block + tl.arange(0, BLOCK)
        live = token < stop
        column = tl.full((BLOCK,), 0.0, tl.float32) + value
        for n in range(HEADS_PER_PROGRAM):
            h = part * HEADS_PER_PROGRAM + n
            tile = tl.full((BLOCK, BLOCK_D), 0.0, tl.float32) + value
            store_tile(out_ptr, token, h, HEADS, live, tile, D, BLOCK_D)
            at = tl.cast(token, tl.int64) * HEADS + h
            tl.store(lse_ptr + at, tl.full((BLOCK,), 0.0, tl.float32) + lse_value, mask=live)
            if scores_ptr is not None and PER_HEAD:
                tl.store(scores_ptr + at, column, mask=live)
        if scores_ptr is not None and not PER_HEAD:
            tl.store(scores_ptr + tl.cast(part, tl.int64) * total + token, column, mask=live)


@triton.jit
def fill_rest(
    out_ptr, lse_ptr, scores_ptr, cu_ptr, sequences, total, start, bad_stop, part,
    HEADS: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """NaN for sequences longer than the caller's max_seqlen, zeros behind the last sequence."""
    nan = float("nan")
    _fill(
        out_ptr, lse_ptr, scores_ptr, start, bad_stop, BLOCK, nan, nan, part, total,
        HEADS, HEADS_PER_PROGRAM, D, BLOCK_D, BLOCK, PER_HEAD,
    )  # fmt: skip
    behind, _ = find_span(cu_ptr, sequences, sequences, total)
    _fill(
        out_ptr, lse_ptr, scores_ptr, behind + tl.program_id(0) * BLOCK, total,
        tl.num_programs(0) * BLOCK, 0.0, -float("inf"), part, total,
        HEADS, HEADS_PER_PROGRAM, D, BLOCK_D, BLOCK, PER_HEAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _packed_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,  # [total, HEADS] if PER_HEAD, else [grid 1, total]; None: no scores
    cu_ptr,
    positions_ptr,
    sequences,
    total,
    left,
    right,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    SEQUENCES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEGATE: tl.constexpr,
    MEAN: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, start, stop = find_packed(cu_ptr, sequences, total, tl.program_id(0), SEQUENCES)
    part = tl.program_id(1)
    stop, bad_stop = cut_too_long(start, stop, BLOCK)
    fill_rest(
        out_ptr, lse_ptr, scores_ptr, cu_ptr, sequences, total, start, bad_stop, part,
        HEADS, HEADS_PER_PROGRAM, D, BLOCK_D, 16, PER_HEAD,
    )  # fmt: skip
    token = start + tl.arange(0, BLOCK)
    live = token < stop
    seen, diagonal = packed_mask(
        cu_ptr, positions_ptr, first, sequences, start, stop, left, right,
        BLOCK, SEQUENCES, BOUNDED,
    )  # fmt: skip
    received = tl.zeros((BLOCK,), tl.float32)
    for n in range(HEADS_PER_PROGRAM):
        h = part * HEADS_PER_PROGRAM + n
        q_rows = rows_at(token, h, stride_qt, stride_qh)
        k_rows = rows_at(token, h // GROUP, stride_kt, stride_kh)
        q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
        k = load_tile(k_ptr, k_rows, live, D, BLOCK_D)
        v = load_tile(v_ptr, rows_at(token, h // GROUP, stride_vt, stride_vh), live, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if NEGATE:
            s = -s
        p, lse = _softmax(tl.where(seen, s, -float("inf")), scale2)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        store_tile(out_ptr, token, h, HEADS, live, out, D, BLOCK_D)
        tl.store(lse_ptr + tl.cast(token, tl.int64) * HEADS + h, lse, mask=live)
        if scores_ptr is not None:
            if EXCLUDE_DIAGONAL:
                p = tl.where(diagonal, 0.0, p)
            column = tl.sum(p, 0)
            if MEAN:
                column *= packed_weights(
                    cu_ptr, first, sequences, start, stop, token, HEADS, SEQUENCES, PER_HEAD
                )
            if PER_HEAD:
                at = tl.cast(token, tl.int64) * HEADS + h
                tl.store(scores_ptr + at, column, mask=live)
            received += column
    if scores_ptr is not None and not PER_HEAD:
        tl.store(scores_ptr + tl.cast(part, tl.int64) * total + token, received, mask=live)


@triton.jit
def _resident_heads(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scores_ptr, positions_ptr,
    start, tokens, total, part, left, right, scale2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, NEGATE: tl.constexpr, MEAN: tl.constexpr, PER_HEAD: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = tl.arange(0, BLOCK_N)
    key_at = positions_of(positions_ptr, start, key, tokens, 0)[None, :]
    received = tl.zeros((BLOCK_N,), tl.float32)
    for n in range(HEADS_PER_PROGRAM):
        h = part * HEADS_PER_PROGRAM + n
        kv_head = h * PACK // GROUP
        known = key < tokens
        k_rows = rows_at(start + key, kv_head, stride_kt, stride_kh)
        v_rows = rows_at(start + key, kv_head, stride_vt, stride_vh)
        k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
        v = load_tile(v_ptr, v_rows, known, D, BLOCK_D)
        column = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(0, tokens * PACK, BLOCK_M):
            token, head = rows_of(block + tl.arange(0, BLOCK_M), h, PACK)
            live = token < tokens
            q_rows = rows_at(start + token, head, stride_qt, stride_qh)
            q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if NEGATE:
                s = -s
            row_at = positions_of(positions_ptr, start, token, tokens, 0)[:, None]
            seen = known[None, :] & live[:, None]
            if BOUNDED:
                seen = seen & in_window(row_at, key_at, left, right)
            p, lse = _softmax(tl.where(seen, s, -float("inf")), scale2)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            store_tile(out_ptr, start + token, head, HEADS, live, out, D, BLOCK_D)
            tl.store(lse_ptr + tl.cast(start + token, tl.int64) * HEADS + head, lse, mask=live)
            if EXCLUDE_DIAGONAL:
                p = tl.where(row_at == key_at, 0.0, p)
            column += tl.sum(p, 0)
        if MEAN:
            column = column / (tl.maximum(tokens, 1) * (1.0 if PER_HEAD else HEADS))
        if PER_HEAD:
            at = tl.cast(start + key, tl.int64) * HEADS + h
            tl.store(scores_ptr + at, column, mask=known)
        received += column
    if not PER_HEAD:
        at = tl.cast(part, tl.int64) * total + start + key
        tl.store(scores_ptr + at, received, mask=key < tokens)


@triton.jit(do_not_specialize=VARYING)
def _resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,  # [total, HEADS] if PER_HEAD, else [grid 1, total]
    cu_ptr,
    positions_ptr,
    sequences,
    total,
    left,
    right,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,  # in groups of PACK
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    NEGATE: tl.constexpr,
    MEAN: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EXCLUDE_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, stop = find_span(cu_ptr, tl.program_id(0), sequences, total)
    stop = tl.where(tl.program_id(0) < sequences, stop, start)
    part = tl.program_id(1)
    stop, bad_stop = cut_too_long(start, stop, BLOCK_N)
    fill_rest(
        out_ptr, lse_ptr, scores_ptr, cu_ptr, sequences, total, start, bad_stop, part,
        HEADS, HEADS_PER_PROGRAM * PACK, D, BLOCK_D, 16, PER_HEAD,
    )  # fmt: skip
    tokens = stop - start
    # The narrowest tile that holds the keys: half the tile is half the work.
    if tokens <= BLOCK_N // 2:
        _resident_heads(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scores_ptr, positions_ptr,
            start, tokens, total, part, left, right, scale2,
            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
            HEADS, GROUP, PACK, HEADS_PER_PROGRAM, D, BLOCK_D, BLOCK_M, BLOCK_N // 2,
            BOUNDED, NEGATE, MEAN, PER_HEAD, EXCLUDE_DIAGONAL, PRECISION,
        )  # fmt: skip
    else:
        _resident_heads(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scores_ptr, positions_ptr,
            start, tokens, total, part, left, right, scale2,
            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
            HEADS, GROUP, PACK, HEADS_PER_PROGRAM, D, BLOCK_D, BLOCK_M, BLOCK_N,
            BOUNDED, NEGATE, MEAN, PER_HEAD, EXCLUDE_DIAGONAL, PRECISION,
        )  # fmt: skip
