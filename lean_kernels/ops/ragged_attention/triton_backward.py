# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the gradients, of the output and of the scores.

With p the probabilities, G = dO Vᵀ + w g (g the gradient of the scores, w how much a probability
counts in them) and delta = sum over keys of p G: dS = p (G - delta), dQ = dS K, dK = dSᵀ Q,
dV = pᵀ dO. Nothing is added by atomics: each gradient is written once, by one program.

_grad_query_kernel   any lengths; a tile of rows stays, key tiles pass by; also leaves delta
_grad_keys_kernel    any lengths; a tile of keys stays, the rows of every head of its group pass by
_grad_packed_kernel  short sequences; all three in one program, from a softmax done again
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


@triton.jit
def _score_gradient(
    ptr, key, head, live, stride_t, stride_h, tokens, PER_HEAD: tl.constexpr, MEAN: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum that is `key`'s score, for keys and heads of shapes that broadcast."""
    at = tl.cast(key, tl.int64) * stride_t
    if PER_HEAD:
        at = at + tl.cast(head, tl.int64) * stride_h
    g = tl.load(ptr + at, mask=live, other=0.0)
    if MEAN:
        g = g / (tl.maximum(tokens, 1) * (1.0 if PER_HEAD else HEADS))
    return g.to(tl.float32)


@triton.jit
def _probabilities(s, scale2, lse, seen):
    """exp(logits - lse), both broadcast alike, and 0 where not seen."""
    lse2 = tl.where(lse == -float("inf"), 0.0, lse / LN2)
    return tl.where(seen, tl.exp2(s * scale2 - lse2), 0.0)


@triton.jit(do_not_specialize=VARYING)
def _grad_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [total, HEADS, D], contiguous
    lse_ptr,  # [total, HEADS]
    grad_ptr,
    grad_scores_ptr,  # or None
    dq_ptr,  # [total, HEADS, D], contiguous
    delta_ptr,  # [total, HEADS]
    cu_ptr,
    cu_k_ptr,
    positions_ptr,
    key_positions_ptr,
    sequences,
    total,
    total_k,
    left,
    right,
    scale,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_st,
    stride_sh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
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
    at = tl.cast(start + token, tl.int64) * HEADS + head
    kv_head = h * PACK // GROUP
    q_rows = rows_at(start + token, head, stride_qt, stride_qh)
    grad_rows = rows_at(start + token, head, stride_gt, stride_gh)
    q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
    grad = load_tile(grad_ptr, grad_rows, live, D, BLOCK_D)
    out = load_tile(out_ptr, at * D, live, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    lse = tl.load(lse_ptr + at, mask=live, other=-float("inf"))
    shift = keys - tokens
    row_at = positions_of(positions_ptr, start, token, tokens, shift)[:, None]
    last_token = tl.minimum((first + BLOCK_M - 1) // PACK, tokens - 1)
    begin, end, _, _ = find_seen(
        positions_of(positions_ptr, start, first // PACK, tokens, shift),
        positions_of(positions_ptr, start, last_token, tokens, shift),
        keys,
        left,
        right,
        None if key_positions_ptr is None else key_positions_ptr + k_start,
        BOUNDED,
    )

    if grad_scores_ptr is not None:
        for block in range(begin, end, BLOCK_N):
            key = block + tl.arange(0, BLOCK_N)
            known = key < end
            k_rows = rows_at(k_start + key, kv_head, stride_kt, stride_kh)
            k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if NEGATE:
                s = -s
            key_at = positions_of(key_positions_ptr, k_start, key, keys, 0)[None, :]
            seen = known[None, :] & live[:, None]
            if BOUNDED:
                seen = seen & in_window(row_at, key_at, left, right)
            if EXCLUDE_DIAGONAL:
                seen = seen & (row_at != key_at)
            p = _probabilities(s, scale2, lse[:, None], seen)
            g = _score_gradient(
                grad_scores_ptr, (k_start + key)[None, :],
                head[:, None] if PER_HEAD and PACK > 1 else h, known[None, :],
                stride_st, stride_sh, tokens, PER_HEAD, MEAN, HEADS,
            )  # fmt: skip
            delta += tl.sum(p * g, 1)
    tl.store(delta_ptr + at, delta, mask=live)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(begin, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        known = key < end
        k_rows = rows_at(k_start + key, kv_head, stride_kt, stride_kh)
        v_rows = rows_at(k_start + key, kv_head, stride_vt, stride_vh)
        k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
        v = load_tile(v_ptr, v_rows, known, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if NEGATE:
            s = -s
        key_at = positions_of(key_positions_ptr, k_start, key, keys, 0)[None, :]
        seen = known[None, :] & live[:, None]
        if BOUNDED:
            seen = seen & in_window(row_at, key_at, left, right)
        p = _probabilities(s, scale2, lse[:, None], seen)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        if grad_scores_ptr is not None:
            g = _score_gradient(
                grad_scores_ptr, (k_start + key)[None, :],
                head[:, None] if PER_HEAD and PACK > 1 else h, known[None, :],
                stride_st, stride_sh, tokens, PER_HEAD, MEAN, HEADS,
            )  # fmt: skip
            if EXCLUDE_DIAGONAL:
                g = tl.where(row_at != key_at, g, 0.0)
            dp += g
        acc = tl.dot((p * dp).to(k.dtype), k, acc, input_precision=PRECISION)
    store_tile(dq_ptr, start + token, head, HEADS, live, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _grad_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_ptr,
    grad_scores_ptr,
    dk_ptr,  # [total_k, HEADS / GROUP, D], contiguous
    dv_ptr,
    cu_ptr,
    cu_k_ptr,
    positions_ptr,
    key_positions_ptr,
    sequences,
    total,
    total_k,
    left,
    right,
    scale,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_st,
    stride_sh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    kv_head = tl.program_id(1)
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
    k_rows = rows_at(k_start + key, kv_head, stride_kt, stride_kh)
    v_rows = rows_at(k_start + key, kv_head, stride_vt, stride_vh)
    k = load_tile(k_ptr, k_rows, known, D, BLOCK_D)
    v = load_tile(v_ptr, v_rows, known, D, BLOCK_D)
    shift = keys - tokens
    back = 0 if positions_ptr is not None else shift
    last = tl.minimum(first + BLOCK_N, keys) - 1
    begin, end, _, _ = find_seen(
        positions_of(key_positions_ptr, k_start, first, keys, 0) - back,
        positions_of(key_positions_ptr, k_start, last, keys, 0) - back,
        tokens,
        right,
        left,
        None if positions_ptr is None else positions_ptr + start,
        BOUNDED,
    )
    key_at = positions_of(key_positions_ptr, k_start, key, keys, 0)[:, None]
    g = tl.zeros((BLOCK_N, 1), tl.float32)
    if grad_scores_ptr is not None and not PER_HEAD:
        g = _score_gradient(
            grad_scores_ptr, (k_start + key)[:, None], 0, known[:, None],
            stride_st, stride_sh, tokens, PER_HEAD, MEAN, HEADS,
        )  # fmt: skip

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for block in range(begin * GROUP, end * GROUP, BLOCK_M):
        token, head = rows_of(block + tl.arange(0, BLOCK_M), kv_head, GROUP)
        live = token < end
        at = tl.cast(start + token, tl.int64) * HEADS + head
        q_rows = rows_at(start + token, head, stride_qt, stride_qh)
        grad_rows = rows_at(start + token, head, stride_gt, stride_gh)
        q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
        grad = load_tile(grad_ptr, grad_rows, live, D, BLOCK_D)
        lse = tl.load(lse_ptr + at, mask=live, other=-float("inf"))
        delta = tl.load(delta_ptr + at, mask=live, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if NEGATE:
            s = -s
        row_at = positions_of(positions_ptr, start, token, tokens, shift)[None, :]
        seen = live[None, :] & known[:, None]
        if BOUNDED:
            seen = seen & in_window(row_at, key_at, left, right)
        p = _probabilities(s, scale2, lse[None, :], seen)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
        if grad_scores_ptr is not None:
            if PER_HEAD:
                weighted = _score_gradient(
                    grad_scores_ptr, (k_start + key)[:, None],
                    head[None, :] if GROUP > 1 else head, seen,
                    stride_st, stride_sh, tokens, PER_HEAD, MEAN, HEADS,
                )  # fmt: skip
            else:
                weighted = tl.broadcast_to(g, (BLOCK_N, BLOCK_M))
            if EXCLUDE_DIAGONAL:
                weighted = tl.where(row_at != key_at, weighted, 0.0)
            dp += weighted
        dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
    HEADS_K: tl.constexpr = HEADS // GROUP
    store_tile(dk_ptr, k_start + key, kv_head, HEADS_K, known, dk * scale, D, BLOCK_D)
    store_tile(dv_ptr, k_start + key, kv_head, HEADS_K, known, dv, D, BLOCK_D)


@triton.jit
def _fill_gradients(
    dq_ptr, dk_ptr, dv_ptr, begin, stop, step, value, part,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HEADS_K: tl.constexpr = HEADS // GROUP
    for block in range(begin, stop, step):
        token = block + tl.arange(0, BLOCK)
        live = token < stop
        tile = tl.full((BLOCK, BLOCK_D), 0.0, tl.float32) + value
        for n in range(HEADS_PER_PROGRAM):
            kv_head = part * HEADS_PER_PROGRAM + n
            store_tile(dk_ptr, token, kv_head, HEADS_K, live, tile, D, BLOCK_D)
            store_tile(dv_ptr, token, kv_head, HEADS_K, live, tile, D, BLOCK_D)
            for i in range(GROUP):
                store_tile(dq_ptr, token, kv_head * GROUP + i, HEADS, live, tile, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _grad_packed_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    grad_scores_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cu_ptr,
    positions_ptr,
    sequences,
    total,
    left,
    right,
    scale,
    scale2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_st,
    stride_sh,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,  # key heads
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
    _fill_gradients(
        dq_ptr, dk_ptr, dv_ptr, start, bad_stop, 16, float("nan"), part,
        HEADS, GROUP, HEADS_PER_PROGRAM, D, BLOCK_D, 16,
    )  # fmt: skip
    behind, _ = find_span(cu_ptr, sequences, sequences, total)
    _fill_gradients(
        dq_ptr, dk_ptr, dv_ptr, behind + tl.program_id(0) * 16, total, tl.num_programs(0) * 16,
        0.0, part, HEADS, GROUP, HEADS_PER_PROGRAM, D, BLOCK_D, 16,
    )  # fmt: skip
    token = start + tl.arange(0, BLOCK)
    live = token < stop
    seen, diagonal = packed_mask(
        cu_ptr, positions_ptr, first, sequences, start, stop, left, right,
        BLOCK, SEQUENCES, BOUNDED,
    )  # fmt: skip
    HEADS_K: tl.constexpr = HEADS // GROUP
    for n in range(HEADS_PER_PROGRAM):
        kv_head = part * HEADS_PER_PROGRAM + n
        k_rows = rows_at(token, kv_head, stride_kt, stride_kh)
        v_rows = rows_at(token, kv_head, stride_vt, stride_vh)
        k = load_tile(k_ptr, k_rows, live, D, BLOCK_D)
        v = load_tile(v_ptr, v_rows, live, D, BLOCK_D)
        dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for i in range(GROUP):
            h = kv_head * GROUP + i
            q_rows = rows_at(token, h, stride_qt, stride_qh)
            grad_rows = rows_at(token, h, stride_gt, stride_gh)
            q = load_tile(q_ptr, q_rows, live, D, BLOCK_D)
            grad = load_tile(grad_ptr, grad_rows, live, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.where(seen, -s if NEGATE else s, -float("inf"))
            top = tl.max(s, 1)
            p = tl.exp2((s - tl.where(top == -float("inf"), 0.0, top)[:, None]) * scale2)
            mass = tl.sum(p, 1)
            p = p * tl.where(mass == 0, 0.0, 1.0 / mass)[:, None]
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if grad_scores_ptr is not None:
                g = _score_gradient(
                    grad_scores_ptr, token, h, live, stride_st, stride_sh, stop,
                    PER_HEAD, False, HEADS,
                )  # fmt: skip
                if MEAN:
                    g *= packed_weights(
                        cu_ptr, first, sequences, start, stop, token, HEADS, SEQUENCES, PER_HEAD
                    )
                g = tl.broadcast_to(tl.where(live, g, 0.0)[None, :], (BLOCK, BLOCK))
                if EXCLUDE_DIAGONAL:
                    g = tl.where(diagonal, 0.0, g)
                dp += g
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, input_precision=PRECISION) * scale
            store_tile(dq_ptr, token, h, HEADS, live, dq, D, BLOCK_D)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        store_tile(dk_ptr, token, kv_head, HEADS_K, live, dk * scale, D, BLOCK_D)
        store_tile(dv_ptr, token, kv_head, HEADS_K, live, dv, D, BLOCK_D)
