# SPDX-License-Identifier: Apache-2.0
"""One call of ragged_attention's Triton kernels: its arguments, checked, and the tiles to cut it
into."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lean_kernels import _tuning
from lean_kernels.ops._triton import check_device, check_interpreted

# Triton 3.10 changes the default, and with it the last bit of results.
OPTIONS = {"enable_fp_fusion": True}
# The interpreter takes the bits of a bfloat16 for an integer.
_INTERPRETER_DTYPES = (torch.float32, torch.float16)
_UNBOUNDED = 2**31 - 1
# Programs that fill a large GPU (132 to 144 processors, several programs each).
_PROGRAMS = 512


class Call(NamedTuple):
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
        return constants | OPTIONS


def call_of(
    query, key, value, cu, cu_k, positions, key_positions,
    max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
) -> Call:  # fmt: skip
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
    check_device("ragged_attention", query)
    check_interpreted("ragged_attention", query.dtype, _INTERPRETER_DTYPES)
    total = len(query)
    if left < 0 and right < 0 and not exclude_diagonal:
        positions = key_positions = None
    query, key, value = (contiguous_rows(t) for t in (query, key, value))
    cu, cu_k, positions, key_positions = (
        t if t is None else t.contiguous() for t in (cu, cu_k, positions, key_positions)
    )
    longest = total if max_seqlen < 0 else max(1, min(max_seqlen, total))
    return Call(
        query, key, value, cu, cu_k, positions, key_positions,
        longest, scale, left, right, key_scores, per_head, exclude_diagonal,
    )  # fmt: skip


def contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def most_tiles(total: int, sequences: int, block: int) -> int:
    """At least the tiles that `triton_schedule` gives to any sequences of `total` rows."""
    return total // block + sequences + 1


def heads_per_program(heads: int, programs: int) -> int:
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


def block_d_of(call: Call) -> int:
    return max(16, triton.next_power_of_2(call.query.shape[2]))


def config_of(kernel: str, call: Call, pack: int = 1) -> dict | None:
    table = _tuning.table("ragged_attention", call.query.device)
    shared = table, call.query.dtype, block_d_of(call)
    if kernel in ("packed", "resident", "grad_packed"):
        if call.cu_k is not None:
            return None  # max_seqlen may not count their keys
        return config(kernel, *shared, call.longest, call.longest)
    typical = triton.cdiv(len(call.query), max(1, call.sequences))
    keys = triton.cdiv(len(call.key), max(1, call.sequences))
    return config(kernel, *shared, min(typical, call.longest) * pack, keys)
