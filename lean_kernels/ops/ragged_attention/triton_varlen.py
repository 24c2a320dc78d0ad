# SPDX-License-Identifier: Apache-2.0
"""Long sequences by torch's own kernel, and a Triton kernel for what it leaves to do."""

import inspect
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops.ragged_attention.triton_call import OPTIONS, Call, block_d_of
from lean_kernels.ops.ragged_attention.triton_schedule import count_up_to, find_span, store_tile

# From here on torch's kernel, written for one architecture, beats anything Triton makes.
_VARLEN_FROM = 1024


@triton.jit(do_not_specialize=["sequences", "total", "longest"])
def _finish_kernel(
    out_ptr,  # [total, HEADS, D], contiguous; corrected in place
    from_ptr,  # LSE [HEADS, total] in strides
    lse_ptr,  # LSE [total, HEADS], contiguous
    cu_ptr,
    sequences,
    total,
    longest,
    stride_fh,
    stride_ft,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    token = first + tl.arange(0, BLOCK)
    b = tl.maximum(count_up_to(cu_ptr, sequences + 1, first, 1, 0) - 1, 0)
    start, stop = find_span(cu_ptr, b, sequences, total)
    behind, _ = find_span(cu_ptr, sequences, sequences, total)
    # No sequence that begins inside the block can pass `longest` inside it: longest >= BLOCK.
    wrong = (b < sequences) & (token >= start + longest) & (token < stop)
    value = tl.where(wrong, float("nan"), 0.0)
    written = (token < behind) & (token < total) & (wrong == 0)
    h = tl.arange(0, BLOCK_H)
    mask = (token < total)[:, None] & (h < HEADS)[None, :]
    at = tl.cast(token, tl.int64)[:, None] * stride_ft + tl.cast(h, tl.int64)[None, :] * stride_fh
    lse = tl.load(from_ptr + at, mask=mask & written[:, None], other=float("inf"))
    lse = tl.where(lse == float("inf"), -float("inf"), lse) + value[:, None]
    tl.store(lse_ptr + tl.cast(token, tl.int64)[:, None] * HEADS + h[None, :], lse, mask=mask)
    rest = (token < total) & (written == 0)
    if tl.sum(rest.to(tl.int32), 0) > 0:
        tile = tl.zeros((BLOCK, BLOCK_D), tl.float32) + value[:, None]
        for n in range(HEADS):
            store_tile(out_ptr, token, n, HEADS, rest, tile, D, BLOCK_D)


@cache
def _varlen_attn():
    """torch's own kernel, its request for the LSE, and whether it knows grouped heads; None where
    this torch lacks it, or its windows."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"return_aux", "scale", "window_size"} <= set(known):
        return None
    return varlen_attn, AuxRequest(lse=True), "enable_gqa" in known


@cache
def _runs_varlen(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(call: Call, max_seqlen: int) -> bool:
    """Whether torch's kernel takes this call, and is likely to be the faster one."""
    known = max_seqlen >= 0 or call.sequences == 1
    if not known or call.longest < _VARLEN_FROM or not _runs_varlen(call.query.device):
        return False
    if call.query.dtype == torch.float32 or call.query.shape[2] % 8 or _varlen_attn() is None:
        return False
    if call.cu_k is not None or (call.bounded and call.positions is not None):
        return False
    if call.group > 1 and not _varlen_attn()[2]:
        return False
    # It reads sixteen bytes at a time.
    return all(
        t.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in t.stride()[:2])
        for t in (call.query, call.key, call.value)
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out and LSE of `triton.forward`, for a call that fits."""
    varlen_attn, request, grouped = _varlen_attn()
    out, by_head = varlen_attn(
        *(call.query, call.key, call.value, call.cu, call.cu, call.longest, call.longest),
        return_aux=request,
        scale=call.scale,
        window_size=(call.left, call.right),
        **({"enable_gqa": True} if grouped and call.group > 1 else {}),
    )
    out = out.contiguous()
    total, heads, dim = out.shape
    lse = torch.empty(total, heads, dtype=torch.float32, device=out.device)
    block = 64
    with torch.cuda.device_of(out):
        _finish_kernel[(triton.cdiv(total, block),)](
            *(out, by_head, lse, call.cu, call.sequences, total, call.longest),
            *by_head.stride(),
            HEADS=heads,
            BLOCK_H=triton.next_power_of_2(heads),
            D=dim,
            BLOCK_D=block_d_of(call),
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )
    return out, lse
