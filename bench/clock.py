# SPDX-License-Identifier: Apache-2.0
"""Seconds per call: by the host's clock, or by a GPU's own events with its cache emptied."""

import time
from collections.abc import Callable

import torch

LONG_SECONDS = 2e-2  # what others left in the caches costs a call about a millisecond at most


def host(call: Callable[[], object], calls: int) -> float:
    """Mean over `calls` calls in a row, after as many untimed ones: caches are as warm as
    repetition makes them. A call that takes long is timed at once.
    """
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > LONG_SECONDS:
        return first
    for _ in range(calls - 1):
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class Cuda:
    """Mean over `calls` calls, each between two events and after a pass over a buffer of several
    times the L2 cache: inputs come from memory, as between the layers of a model, and the host
    issues the call while the pass runs, so that launch latency is not counted.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(4 * l2, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


def of(device: str) -> Callable[[Callable[[], object], int], float]:
    """The clock for work on "cpu" or "cuda"."""
    return Cuda() if device == "cuda" else host
