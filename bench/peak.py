# SPDX-License-Identifier: Apache-2.0
"""The roof: how fast this machine multiplies and adds in registers, and reads memory."""

import ctypes
import time
from pathlib import Path

import torch

from bench.runner import num_threads
from lean_kernels import _extension

LIBRARY = Path(_extension.__file__).with_name("_C.abi3.so")
_READ_BYTES = 256 << 20  # beyond any last-level cache of a desktop or small server


def fma_peak(threads: int, seconds: float = 0.3) -> float | None:
    """Measured float32 fused multiply-add peak in GFLOP/s, or None without the C++ kernels.

    Of the instruction set in use, at its vector width.
    """
    if _extension.load_cpu() is not None:
        return None
    measure = ctypes.CDLL(str(LIBRARY)).lean_kernels_fma_peak
    measure.restype, measure.argtypes = ctypes.c_double, [ctypes.c_double]
    with num_threads(threads):
        return measure(seconds) / 1e9


def read_bandwidth(threads: int) -> float:
    """GB/s at which a sum reads an array larger than the caches; the best of several passes."""
    array = torch.ones(_READ_BYTES // 4)
    best = float("inf")
    with num_threads(threads):
        for _ in range(5):
            start = time.perf_counter()
            array.sum()
            best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best / 1e9


def roof(threads: int) -> dict[str, float | None]:
    """Peaks of one core and of the run's threads; GFLOP/s are None when unknown."""
    return {
        "fma_gflops_1_thread": fma_peak(1),
        "fma_gflops": fma_peak(threads),
        "read_gb_per_s": read_bandwidth(threads),
    }
