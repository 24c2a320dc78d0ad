# SPDX-License-Identifier: Apache-2.0
"""Finds the fastest tile sizes of an op's Triton kernels on the GPU at hand.

An op that can be tuned has a module `ops/<op>/tuning.py` with `problems(device)`: choices to make,
one after the other, each measured with the earlier ones in force.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_kernels import _tuning

OPS = ("block_sparse_linear", "ragged_attention")


@dataclass(frozen=True)
class Problem:
    """One choice: of `candidates`, entries for the op's table, that with which `calls` are fastest.

    The first candidate is what runs untuned, and judges the others: a call must return the same
    with each, to `tolerance` (relative RMS).
    """

    what: str
    candidates: Sequence[_tuning.Table]
    calls: Sequence[Callable[[], Tensor]]
    tolerance: float = 1e-2


@dataclass(frozen=True)
class Choice:
    """What was found for a problem."""

    problem: Problem
    best: _tuning.Table
    speedup: float  # over the first candidate, geometric mean over the calls
    refused: int  # of the candidates: too large for the device, or wrong


def problems(op: str, device: torch.device) -> Iterable[Problem]:
    """The choices of an op. ValueError for one that has none."""
    if op not in OPS:
        raise ValueError(f"tune: unknown op {op!r}; expected one of {', '.join(OPS)}")
    return importlib.import_module(f"lean_kernels.ops.{op}.tuning").problems(device)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-300))


def _results(problem: Problem) -> list[Tensor] | None:
    """What the calls return; None where the tiles do not fit the device."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return [call() for call in problem.calls]
    except (OutOfResources, PTXASError):
        return None


def choose(op: str, problem: Problem, seconds: Callable[[Callable], float]) -> Choice:
    """Measure the candidates of a problem; `seconds` times a call.

    Raises:
        RuntimeError: not even the first candidate runs here.
    """
    times = []  # of the candidates, one per call; None where refused
    for candidate in problem.candidates:
        with _tuning.override(op, candidate):
            results = _results(problem)
            if not times:
                if results is None:
                    raise RuntimeError(f"tune: {op}: {problem.what}: the untuned tiles do not run")
                expected = results
            right = results is not None and all(
                _error(*pair) <= problem.tolerance for pair in zip(results, expected, strict=True)
            )
            times.append([seconds(call) for call in problem.calls] if right else None)

    def speedup(of: list[float] | None) -> float:
        if of is None:
            return 0.0
        return math.prod(a / b for a, b in zip(times[0], of, strict=True)) ** (1 / len(of))

    speedups = [speedup(of) for of in times]
    best = max(range(len(times)), key=speedups.__getitem__)
    return Choice(problem, problem.candidates[best], speedups[best], times.count(None))


def tune(
    op: str,
    seconds: Callable[[Callable], float],
    choices: Iterable[Problem],
    report: Callable[[int, Choice], None] = lambda done, choice: None,
) -> _tuning.Table:
    """The entries for an op's table that were fastest."""
    table: _tuning.Table = {}
    remaining = iter(choices)
    for done in itertools.count(1):
        with _tuning.override(op, table):
            problem = next(remaining, None)
            if problem is None:
                return table
            choice = choose(op, problem, seconds)
        report(done, choice)
        table = _tuning.merge(table, choice.best)
