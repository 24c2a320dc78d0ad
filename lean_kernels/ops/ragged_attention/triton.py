# SPDX-License-Identifier: Apache-2.0
"""Launches the Triton kernels of ragged_attention; not yet run on hardware.

Which kernels run follows from shapes and `max_seqlen` alone; nothing here waits for the device or
reads cu_seqlens on the host, so all of it can be captured in a CUDA graph. Results never depend on
that choice, with one exception: `max_seqlen` must be true. Sequences longer than it may come back
as NaN, in outputs, scores and gradients.

    longest     output                 output and scores           gradients
    <= 64       one packed kernel      the same                    one packed kernel
    <= 256      tiles                  one kernel, keys resident   rows, then keys
    > 256       tiles                  tiles, then scores          rows, then keys
    >= 1024     torch's varlen_attn    varlen_attn, then scores    rows, then keys

Limits are lower for wide heads and float32 (`triton_call.config`), and no limit is known without
`max_seqlen`, so give it. float32 products are exact (IEEE) unless
`torch.backends.cuda.matmul.fp32_precision` is "tf32": sums of many products in three TF32 parts
would not stay within 1e-6, for tensor cores do not round their sums to nearest.
"""

import torch
import triton
from torch import Tensor

from lean_kernels.ops.ragged_attention import triton_varlen
from lean_kernels.ops.ragged_attention.triton_backward import (
    _grad_keys_kernel,
    _grad_packed_kernel,
    _grad_query_kernel,
)
from lean_kernels.ops.ragged_attention.triton_call import (
    Call,
    call_of,
    config_of,
    contiguous_rows,
    heads_per_program,
    most_tiles,
)
from lean_kernels.ops.ragged_attention.triton_forward import (
    _packed_kernel,
    _resident_kernel,
    _scores_kernel,
    _tiles_kernel,
)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    key_positions: Tensor | None,
    max_seqlen: int,
    scale: float,
    left: int,
    right: int,
    key_scores: int,
    per_head: bool,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H, D], LSE float32 [T, H], scores float32 [T_k], [T_k, H] or none; see
    `op.ragged_attention`. `key_scores` is the position in `op.KEY_SCORES`; -1: no max_seqlen, no
    window."""
    call = call_of(
        query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions,
        max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
    )  # fmt: skip
    options = {"dtype": torch.float32, "device": query.device}
    total_k, heads = len(key), call.heads
    if not key_scores:
        scores = torch.empty((0, heads) if per_head else (0,), **options)
    elif len(query) == 0 or total_k == 0:
        scores = torch.zeros((total_k, heads) if per_head else (total_k,), **options)
    if len(query) == 0:
        return query.new_empty(query.shape), torch.empty(0, heads, **options), scores
    packed, resident = config_of("packed", call), config_of("resident", call)
    if packed or (resident and key_scores):
        return _one_pass(call, packed, resident)
    by_torch = triton_varlen.fits(call, max_seqlen)
    out, lse = triton_varlen.forward(call) if by_torch else _by_tiles(call)
    if key_scores and total_k:
        scores = _score_keys(call, lse)
    return out, lse, scores


def _empty_results(call: Call) -> tuple[Tensor, Tensor]:
    shape, device = call.query.shape, call.query.device
    out = torch.empty(shape, dtype=call.query.dtype, device=device)
    return out, torch.empty(shape[:2], dtype=torch.float32, device=device)


def _empty_scores(call: Call, parts: int) -> Tensor:
    shape = (len(call.key), call.heads) if call.per_head else (parts, len(call.key))
    return torch.empty(shape, dtype=torch.float32, device=call.query.device)


def _sum_parts(call: Call, scores: Tensor) -> Tensor:
    if call.per_head:
        return scores
    return scores[0] if len(scores) == 1 else scores.sum(0)


def _one_pass(call: Call, packed: dict | None, resident: dict | None):
    query, key, value = call.query, call.key, call.value
    out, lse = _empty_results(call)
    constants = call.constants(scored=True)
    if packed:
        count = max(1, min(8, packed["BLOCK"] // call.longest))
        programs, units = max(1, triton.cdiv(call.sequences, count)), call.heads
        constants["SEQUENCES"] = count
    else:
        pack = 1 if call.per_head else call.group
        programs, units = max(1, call.sequences), call.heads // pack
        constants["PACK"] = pack
    per_program = heads_per_program(units, programs)
    scores = _empty_scores(call, units // per_program) if call.key_scores else None
    kernel = _packed_kernel if packed else _resident_kernel
    with torch.cuda.device_of(query):
        kernel[(programs, units // per_program)](
            query,
            key,
            value,
            out,
            lse,
            scores,
            *call.schedule(cu_k=False),
            call.scale2,
            *call.strides(query, key, value),
            HEADS_PER_PROGRAM=per_program,
            **constants,
            **(packed or resident),
        )
    if scores is None:
        empty = (0, call.heads) if call.per_head else (0,)
        return out, lse, torch.empty(empty, dtype=torch.float32, device=query.device)
    return out, lse, _sum_parts(call, scores)


def _by_tiles(call: Call) -> tuple[Tensor, Tensor]:
    query, key, value, pack = call.query, call.key, call.value, call.group
    out, lse = _empty_results(call)
    tiles = config_of("tiles", call, pack)
    count = most_tiles(len(query) * pack, call.sequences, tiles["BLOCK_M"])
    with torch.cuda.device_of(query):
        _tiles_kernel[(count, call.heads // pack)](
            query,
            key,
            value,
            out,
            lse,
            *call.schedule(),
            call.scale2,
            *call.strides(query, key, value),
            PACK=pack,
            **call.constants(scored=False),
            **tiles,
        )
    return out, lse


def _score_keys(call: Call, lse: Tensor) -> Tensor:
    query, key, pack = call.query, call.key, 1 if call.per_head else call.group
    tiles, units = config_of("scores", call, pack), call.heads // pack
    count = most_tiles(len(key), call.sequences, tiles["BLOCK_N"])
    per_program = heads_per_program(units, count)
    scores = _empty_scores(call, units // per_program)
    with torch.cuda.device_of(query):
        _scores_kernel[(count, units // per_program)](
            query,
            key,
            lse,
            scores,
            *call.schedule(),
            call.scale2,
            *call.strides(query, key),
            PACK=pack,
            HEADS_PER_PROGRAM=per_program,
            **call.constants(scored=True),
            **tiles,
        )
    return _sum_parts(call, scores)


def grad(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    key_positions: Tensor | None,
    max_seqlen: int,
    scale: float,
    left: int,
    right: int,
    key_scores: int,
    per_head: bool,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for those of out and (or None) scores; see `forward`."""
    call = call_of(
        query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions,
        max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
    )  # fmt: skip
    results = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
    )
    if len(query) == 0 or len(key) == 0:
        return tuple(t.zero_() for t in results)
    query, key, value, grad_out = call.query, call.key, call.value, contiguous_rows(grad_out)
    score_strides = (0, 0)
    if grad_scores is not None:
        score_strides = (*grad_scores.stride(), 0)[:2]
    tail = (
        *(call.scale, call.scale2),
        *call.strides(query, key, value, grad_out),
        *score_strides,
    )
    constants = call.constants(scored=True)
    packed = config_of("grad_packed", call)
    with torch.cuda.device_of(query):
        if packed:
            count = max(1, min(8, packed["BLOCK"] // call.longest))
            programs, units = max(1, triton.cdiv(call.sequences, count)), key.shape[1]
            per_program = heads_per_program(units, programs)
            _grad_packed_kernel[(programs, units // per_program)](
                *(query, key, value, grad_out, grad_scores, *results),
                *call.schedule(cu_k=False),
                *tail,
                HEADS_PER_PROGRAM=per_program,
                SEQUENCES=count,
                **constants,
                **packed,
            )
            return results
        dq, dk, dv = results
        delta = torch.empty(lse.shape, dtype=torch.float32, device=query.device)
        tiles = config_of("grad_query", call, call.group)
        count = most_tiles(len(query) * call.group, call.sequences, tiles["BLOCK_M"])
        _grad_query_kernel[(count, key.shape[1])](
            *(query, key, value, out, lse, grad_out, grad_scores, dq, delta),
            *call.schedule(),
            *tail,
            PACK=call.group,
            **constants,
            **tiles,
        )
        tiles = config_of("grad_keys", call, call.group)
        count = most_tiles(len(key), call.sequences, tiles["BLOCK_N"])
        _grad_keys_kernel[(count, key.shape[1])](
            *(query, key, value, lse, delta, grad_out, grad_scores, dk, dv),
            *call.schedule(),
            *tail,
            **constants,
            **tiles,
        )
    return results
