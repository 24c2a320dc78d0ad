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

Limits are lower for wide heads and float32 (`config`), and no limit is known without
`max_seqlen`, so give it. float32 products are exact (IEEE) unless
`torch.backends.cuda.matmul.fp32_precision` is "tf32": sums of many products in three TF32 parts
would not stay within 1e-6, for tensor cores do not round their sums to nearest.
"""

import inspect
import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lean_kernels import _tuning
from lean_kernels.ops.ragged_attention.triton_backward import (
    _grad_keys_kernel,
    _grad_packed_kernel,
    _grad_query_kernel,
)
from lean_kernels.ops.ragged_attention.triton_forward import (
    _finish_kernel,
    _packed_kernel,
    _resident_kernel,
    _scores_kernel,
    _tiles_kernel,
)

# Triton 3.10 changes the default, and with it the last bit of results.
_OPTIONS = {"enable_fp_fusion": True}
_INTERPRETED = triton.knobs.runtime.interpret
# The interpreter takes the bits of a bfloat16 for an integer.
_INTERPRETER_DTYPES = (torch.float32, torch.float16)
_UNBOUNDED = 2**31 - 1
# Programs that fill a large GPU (132 to 144 processors, several programs each).
_PROGRAMS = 512
# From here on torch's kernel, written for one architecture, beats anything Triton makes.
_VARLEN_FROM = 1024


class _Call(NamedTuple):
    """What every kernel of one call shares."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu: Tensor
    cu_k: Tensor | None
    positions: Tensor | None
    key_positions: Tensor | None
    longest: int  # no sequence is longer
    scale: float
    left: int
    right: int
    key_scores: int
    per_head: bool
    exclude_diagonal: bool

    @property
    def sequences(self) -> int:
        return self.cu.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def bounded(self) -> bool:
        return self.left >= 0 or self.right >= 0

    @property
    def window(self) -> tuple[int, int]:
        return tuple(_UNBOUNDED if size < 0 else min(size, _UNBOUNDED)
                     for size in (self.left, self.right))  # fmt: skip

    @property
    def scale2(self) -> float:
        # Zero times a masked logit would be NaN.
        return max(abs(self.scale), 1e-30) * math.log2(math.e)

    def schedule(self, cu_k: bool = True) -> tuple:
        """Arguments from cu_ptr to right, without those of separate keys where cu_k is false."""
        total, total_k = len(self.query), len(self.key)
        if not cu_k:
            return self.cu, self.positions, self.sequences, total, *self.window
        places = self.positions, self.positions if self.cu_k is None else self.key_positions
        return self.cu, self.cu_k, *places, self.sequences, total, total_k, *self.window

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        return tuple(size for t in tensors for size in t.stride()[:2])

    def constants(self, scored: bool) -> dict:
        dim = self.query.shape[2]
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        constants = {
            "HEADS": self.heads,
            "GROUP": self.group,
            "D": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BOUNDED": self.bounded,
            "NEGATE": self.scale < 0,
            "PRECISION": "tf32" if tf32 and self.query.dtype == torch.float32 else "ieee",
        }
        if scored:
            constants["MEAN"] = self.key_scores == 2
            constants["PER_HEAD"] = self.per_head
            constants["EXCLUDE_DIAGONAL"] = self.exclude_diagonal
        return constants | _OPTIONS


def _call(
    query, key, value, cu, cu_k, positions, key_positions,
    max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
) -> _Call:  # fmt: skip
    if query.dtype == torch.float64:
        raise ValueError(
            "ragged_attention: impl 'triton' takes float32, bfloat16 and float16, got float64; "
            "use impl 'reference'"
        )
    if query.shape[2] > 256:
        raise ValueError(
            f"ragged_attention: impl 'triton' takes heads of up to 256 dimensions, got "
            f"{query.shape[2]}; use impl 'reference'"
        )
    if not _INTERPRETED and query.device.type == "cpu":
        raise RuntimeError(
            "ragged_attention: impl 'triton' needs tensors on a GPU, got cpu; move them, "
            "use impl 'cpu', or debug with TRITON_INTERPRET=1 in the environment"
        )
    if _INTERPRETED and query.dtype not in _INTERPRETER_DTYPES:
        raise RuntimeError(
            f"ragged_attention: Triton's interpreter multiplies {query.dtype} wrongly; "
            f"debug in float32"
        )
    total = len(query)
    if left < 0 and right < 0 and not exclude_diagonal:
        positions = key_positions = None
    query, key, value = (_rows(t) for t in (query, key, value))
    cu, cu_k, positions, key_positions = (
        t if t is None else t.contiguous() for t in (cu, cu_k, positions, key_positions)
    )
    longest = total if max_seqlen < 0 else max(1, min(max_seqlen, total))
    return _Call(
        query, key, value, cu, cu_k, positions, key_positions,
        longest, scale, left, right, key_scores, per_head, exclude_diagonal,
    )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _tiles(total: int, sequences: int, block: int) -> int:
    """At least the tiles that `triton_schedule` gives to any sequences of `total` rows."""
    return total // block + sequences + 1


def _heads_per_program(heads: int, programs: int) -> int:
    """As many as leave enough programs: they share what is looked up and added up."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    return max((n for n in fitting if programs * (heads // n) >= _PROGRAMS), default=1)


def _clamp(size: int, low: int, high: int) -> int:
    """The power of two at or above `size`, within [low, high]."""
    return min(max(triton.next_power_of_2(size), low), high)


def config(
    kernel: str, table: dict, dtype: torch.dtype, block_d: int, rows: int, keys: int
) -> dict | None:
    """Tile sizes and launch options of one kernel; None: it cannot hold such sequences.

    Args:
        kernel: "tiles", "scores", "packed", "resident", "grad_query", "grad_keys", "grad_packed".
        table: by dtype ("half" or "float32"), kernel and largest BLOCK_D, [BLOCK_M, BLOCK_N, warps,
            stages]. Those shipped, configs/<architecture>.json, are the largest tiles that spill no
            registers and fit the shared memory: 227 KiB on sm_90, 64 KiB on gfx942, and 99 KiB for
            sm_80, whose table serves every other CUDA device. None is tuned on hardware.
        dtype: of the query.
        block_d: head dimension, rounded up to a power of two.
        rows, keys: of a typical sequence; for "packed", "resident" and "grad_packed" of the
            longest one. Rows of the heads that a tile holds side by side all count.
    """
    of_kernel = table["half" if dtype.itemsize == 2 else "float32"].get(kernel, {})
    widest = next((of_kernel[d] for d in of_kernel if block_d <= int(d)), None)
    whole = kernel in ("packed", "resident", "grad_packed")
    if widest is None or (whole and keys > widest[1]):
        return None
    block_m, block_n, warps, stages = widest
    if kernel == "resident":
        narrow = _clamp(keys, 128, block_n)
        return {"BLOCK_M": block_m, "BLOCK_N": narrow, "num_warps": warps * narrow // block_n,
                "num_stages": stages}  # fmt: skip
    # Narrow tiles leave less to share: a warp per 512 logits of 64 dimensions, or its equal.
    size = _clamp(rows, 16, block_m) * _clamp(keys, 16, block_n) * max(64, block_d) // 64
    if dtype.itemsize == 2:
        warps = min(warps, max(1, size // (512 if kernel in ("tiles", "packed") else 256)))
    options = {"num_warps": warps, "num_stages": stages}
    if whole:
        return {"BLOCK": _clamp(keys, 16, block_n), **options}
    return {"BLOCK_M": _clamp(rows, 16, block_m), "BLOCK_N": _clamp(keys, 16, block_n), **options}


def _block_d(call: _Call) -> int:
    return max(16, triton.next_power_of_2(call.query.shape[2]))


def _config(kernel: str, call: _Call, pack: int = 1) -> dict | None:
    table = _tuning.table("ragged_attention", call.query.device)
    shared = table, call.query.dtype, _block_d(call)
    if kernel in ("packed", "resident", "grad_packed"):
        if call.cu_k is not None:
            return None  # max_seqlen may not count their keys
        return config(kernel, *shared, call.longest, call.longest)
    typical = triton.cdiv(len(call.query), max(1, call.sequences))
    keys = triton.cdiv(len(call.key), max(1, call.sequences))
    return config(kernel, *shared, min(typical, call.longest) * pack, keys)


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
    call = _call(
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
    packed, resident = _config("packed", call), _config("resident", call)
    if packed or (resident and key_scores):
        return _one_pass(call, packed, resident)
    out, lse = _varlen(call) if _varlen_fits(call, max_seqlen) else _by_tiles(call)
    if key_scores and total_k:
        scores = _score_keys(call, lse)
    return out, lse, scores


def _empty_results(call: _Call) -> tuple[Tensor, Tensor]:
    shape, device = call.query.shape, call.query.device
    out = torch.empty(shape, dtype=call.query.dtype, device=device)
    return out, torch.empty(shape[:2], dtype=torch.float32, device=device)


def _empty_scores(call: _Call, parts: int) -> Tensor:
    shape = (len(call.key), call.heads) if call.per_head else (parts, len(call.key))
    return torch.empty(shape, dtype=torch.float32, device=call.query.device)


def _sum_parts(call: _Call, scores: Tensor) -> Tensor:
    if call.per_head:
        return scores
    return scores[0] if len(scores) == 1 else scores.sum(0)


def _one_pass(call: _Call, packed: dict | None, resident: dict | None):
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
    per_program = _heads_per_program(units, programs)
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


def _by_tiles(call: _Call) -> tuple[Tensor, Tensor]:
    query, key, value, pack = call.query, call.key, call.value, call.group
    out, lse = _empty_results(call)
    tiles = _config("tiles", call, pack)
    count = _tiles(len(query) * pack, call.sequences, tiles["BLOCK_M"])
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


def _score_keys(call: _Call, lse: Tensor) -> Tensor:
    query, key, pack = call.query, call.key, 1 if call.per_head else call.group
    tiles, units = _config("scores", call, pack), call.heads // pack
    count = _tiles(len(key), call.sequences, tiles["BLOCK_N"])
    per_program = _heads_per_program(units, count)
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


def _varlen_fits(call: _Call, max_seqlen: int) -> bool:
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


def _varlen(call: _Call) -> tuple[Tensor, Tensor]:
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
            BLOCK_D=_block_d(call),
            BLOCK=block,
            num_warps=4,
            **_OPTIONS,
        )
    return out, lse


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
    call = _call(
        query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions,
        max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
    )  # fmt: skip
    results = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
    )
    if len(query) == 0 or len(key) == 0:
        return tuple(t.zero_() for t in results)
    query, key, value, grad_out = call.query, call.key, call.value, _rows(grad_out)
    score_strides = (0, 0)
    if grad_scores is not None:
        score_strides = (*grad_scores.stride(), 0)[:2]
    tail = (
        *(call.scale, call.scale2),
        *call.strides(query, key, value, grad_out),
        *score_strides,
    )
    constants = call.constants(scored=True)
    packed = _config("grad_packed", call)
    with torch.cuda.device_of(query):
        if packed:
            count = max(1, min(8, packed["BLOCK"] // call.longest))
            programs, units = max(1, triton.cdiv(call.sequences, count)), key.shape[1]
            per_program = _heads_per_program(units, programs)
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
        tiles = _config("grad_query", call, call.group)
        count = _tiles(len(query) * call.group, call.sequences, tiles["BLOCK_M"])
        _grad_query_kernel[(count, key.shape[1])](
            *(query, key, value, out, lse, grad_out, grad_scores, dq, delta),
            *call.schedule(),
            *tail,
            PACK=call.group,
            **constants,
            **tiles,
        )
        tiles = _config("grad_keys", call, call.group)
        count = _tiles(len(key), call.sequences, tiles["BLOCK_N"])
        _grad_keys_kernel[(count, key.shape[1])](
            *(query, key, value, lse, delta, grad_out, grad_scores, dk, dv),
            *call.schedule(),
            *tail,
            **constants,
            **tiles,
        )
    return results
