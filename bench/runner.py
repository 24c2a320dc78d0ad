# SPDX-License-Identifier: Apache-2.0
"""Checks competitors against float64, then times them interleaved.

Each round takes one sample of every competitor, so that noise on the machine hits all alike, and a
ratio is the median over rounds of the ratio within a round. Caches are as warm as repetition makes
them: a short call is repeated until the clock can resolve it, after as many untimed ones. On a GPU
its own events are the clock, and every call finds the L2 cache cold (`clock.Cuda`).
"""

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import clock
from bench.registry import Case, Competitor, Options, Workload

MIN_ROUNDS, MAX_ROUNDS = 5, 200
SAMPLE_SECONDS = 2e-3
STANDARD_ERROR = 0.004  # of every median, relative: rounds stop early below it


class WrongResult(Exception):
    """A competitor does not compute what it should, so that its time means nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round."""

    seconds: tuple[float, ...]
    calls_per_sample: int

    @cached_property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @cached_property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile."""
        low, high = np.percentile(self.seconds, (20, 80))
        return float(low), float(high)

    @property
    def standard_error(self) -> float:
        """Relative, of the median, from the spread of a normal distribution."""
        low, high = self.spread
        return 1.2533 * (high - low) / 1.6832 / len(self.seconds) ** 0.5 / self.median


def ratio(theirs: Timing, ours: Timing) -> float:
    """Median over the rounds both took part in of their time over ours."""
    return float(np.median([a / b for a, b in zip(theirs.seconds, ours.seconds, strict=False)]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values, in float64; inf for a wrong shape."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    difference = actual.detach().to(expected.device).double() - expected
    scale = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    error = float(difference.square().mean().sqrt() / scale)
    return error if error == error else float("inf")


@contextmanager
def num_threads(count: int):
    """Torch's intra-op threads within the block."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(competitors: Mapping[str, Competitor], threads: int) -> dict[str, float]:
    """Largest relative error of each competitor. Raises WrongResult above a tolerance."""
    errors = {}
    for name, competitor in competitors.items():
        with num_threads(competitor.threads or threads):
            actual = competitor.call()
        actual = (actual,) if isinstance(actual, Tensor) else tuple(actual)
        if len(actual) != len(competitor.expected):
            raise WrongResult(
                f"{name}: returned {len(actual)} tensors, expected {len(competitor.expected)}"
            )
        errors[name] = max(
            relative_error(*pair) for pair in zip(actual, competitor.expected, strict=True)
        )
        if not errors[name] <= competitor.tolerance:
            raise WrongResult(
                f"{name}: relative RMS error {errors[name]:.2e} against float64, "
                f"at most {competitor.tolerance:.2e} allowed; refusing to time it"
            )
    return errors


def measure(
    competitors: Mapping[str, Competitor],
    *,
    threads: int,
    budget: float,
    settle: float = 0.0,
    clock: Callable[[Callable, int], float] = clock.host,
) -> dict[str, Timing]:
    """Time the competitors round-robin for about `budget` seconds, and at least MIN_ROUNDS.

    A competitor that has used its equal share of the budget sits out later rounds, so that a slow
    one does not cost the others their precision.
    """

    def sample(competitor: Competitor, calls: int) -> float:
        if settle:
            time.sleep(settle)
        with num_threads(competitor.threads or threads):
            return clock(competitor.call, calls)

    calls, seconds, used = {}, {}, {}
    for name, competitor in competitors.items():
        sample(competitor, 1)
        once = sample(competitor, 1)
        calls[name] = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
        seconds[name], used[name] = [], 0.0
    share = budget / len(competitors)
    active = list(competitors)
    while True:
        for name in active:
            start = time.perf_counter()
            seconds[name].append(sample(competitors[name], calls[name]))
            used[name] += time.perf_counter() - start
        done = len(seconds[active[0]])
        if done < MIN_ROUNDS:
            continue
        timings = [Timing(tuple(seconds[name]), calls[name]) for name in active]
        precise = all(timing.standard_error < STANDARD_ERROR for timing in timings)
        if precise or done >= MAX_ROUNDS or sum(used.values()) >= budget:
            break
        # Ours, the first, stays to the end: every ratio is taken against it.
        ours, *others = active
        active = [ours, *(name for name in others if used[name] < share)]
        if others and len(active) == 1:
            break
    return {name: Timing(tuple(seconds[name]), calls[name]) for name in competitors}


def run_config(
    case: Case, config: Any, options: Options, *, budget: float, roof: float | None = None
) -> dict:
    """Check and time one configuration; the record that goes into the JSON report.

    `roof` is the machine's float32 multiply-add peak in GFLOP/s at the threads of the run. Other
    dtypes are not held against it: their products may have instructions, and a peak, of their own.
    """
    record: dict = {"config": asdict(config)}
    workload: Workload = case.prepare(config, options)
    competitors = workload.competitors
    record["facts"] = dict(workload.facts)
    if workload.ideal is not None:
        record["ideal"] = workload.ideal
    try:
        with torch.set_grad_enabled(workload.grad):
            errors = check(competitors, options.threads)
            timings = measure(
                competitors,
                threads=options.threads,
                budget=budget,
                settle=workload.settle,
                clock=clock.of(options.device),
            )
    except WrongResult as problem:
        return record | {"refused": str(problem)}
    ours = next(iter(competitors))
    record["competitors"] = {
        name: {
            "median_s": timing.median,
            "p20_s": timing.spread[0],
            "p80_s": timing.spread[1],
            "rounds": len(timing.seconds),
            "calls_per_sample": timing.calls_per_sample,
            "threads": competitors[name].threads or options.threads,
            "error": errors[name],
            "tolerance": competitors[name].tolerance,
        }
        for name, timing in timings.items()
    }
    record["ours"] = ours
    record["ratios"] = {
        name: ratio(timing, timings[ours]) for name, timing in timings.items() if name != ours
    }
    if workload.flops is not None:
        record["gflops"] = workload.flops / timings[ours].median / 1e9
        if roof is not None and workload.dtype == "float32":
            record["peak_fraction"] = record["gflops"] / roof
    return record
