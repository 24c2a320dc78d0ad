# SPDX-License-Identifier: Apache-2.0
"""What Triton launchers share, whatever the op. Imported by them alone: it imports triton."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def check_device(op: str, tensor: Tensor) -> None:
    """Raise RuntimeError for a tensor on CPU, unless Triton's interpreter runs."""
    if not INTERPRETED and tensor.device.type == "cpu":
        raise RuntimeError(
            f"{op}: impl 'triton' needs tensors on a GPU, got cpu; move them, use impl 'cpu', or "
            "debug with TRITON_INTERPRET=1 in the environment"
        )


def check_interpreted(op: str, dtype: torch.dtype, right: tuple[torch.dtype, ...]) -> None:
    """Raise RuntimeError where Triton's interpreter runs and does not multiply `dtype` right."""
    if INTERPRETED and dtype not in right:
        raise RuntimeError(
            f"{op}: Triton's interpreter multiplies {dtype} wrongly; debug in float32"
        )


def float64_bits(value: float) -> int:
    """What a kernel's `float64_of` turns back: a float argument would be rounded to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def float64_of(bits):
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
