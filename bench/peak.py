# SPDX-License-Identifier: Apache-2.0
"""The roof: how fast this machine multiplies and adds in registers, and reads memory."""

import time

import torch

from lean_kernels import _extension

_READ_BYTES = 256 << 20  # beyond any last-level cache of a desktop or small server


def fma_peak(threads: int) -> float | None:
    """Measured float32 fused multiply-add peak in GFLOP/s, or None without the C++ kernels."""
    measure = getattr(_extension, "fma_peak", None)
    if measure is None or _extension.load_cpu() is not None:
        return None
    return measure(threads)


def read_bandwidth(threads: int) -> float:
    """GB/s at which a sum reads an array larger than the caches; the best of several passes."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        array = torch.ones(_READ_BYTES // 4)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            array.sum()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return _READ_BYTES / best / 1e9


def roof(threads: int) -> dict[str, float | None]:
    """Peaks of one core and of the run's threads; GFLOP/s are None when unknown."""
    return {
        "fma_gflops_1_thread": fma_peak(1),
        "fma_gflops": fma_peak(threads),
        "read_gb_per_s": read_bandwidth(threads),
    }
