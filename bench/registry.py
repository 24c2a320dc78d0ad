# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is made of.

A case is a module `bench/<name>.py` with a `CASE`. It turns a configuration (a frozen dataclass of
plain values) into a `Workload`: competitors that compute the same thing, the first of them ours.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

CASES = (
    "bert_encoder",
    "block_sparse_linear",
    "early_exit",
    "low_rank_embedding",
    "ngram_embedding_bag",
    "ragged_attention",
    "tensor_product_embedding",
    "tensor_train_embedding",
    "token_compaction",
    "token_dropping",
)

# Run one after another under one name.
GROUPS = {
    "embeddings": (
        "low_rank_embedding",
        "tensor_product_embedding",
        "tensor_train_embedding",
        "ngram_embedding_bag",
    ),
}


@dataclass(frozen=True)
class Competitor:
    """One way to compute the workload.

    `call` returns a tensor or a tuple of tensors, compared with the float64 `expected` in the same
    order; it is timed only if every relative RMS error is at most `tolerance`.
    """

    call: Callable[[], Tensor | Sequence[Tensor]]
    expected: Sequence[Tensor]
    tolerance: float
    threads: int | None = None  # None: those of the run


@dataclass(frozen=True)
class Workload:
    """A configuration made concrete. Ratios are times relative to the first competitor, ours."""

    competitors: Mapping[str, Competitor]
    flops: float | None = None  # of the kept work, per call
    dtype: str = "float32"  # of the numbers multiplied; the roof is float32's
    ideal: float | None = None  # the speed-up over "dense" if time went with the kept work
    facts: Mapping[str, float] = field(default_factory=dict)  # anything else worth reporting
    grad: bool = False  # False: called under torch.no_grad()
    settle: float = 0.0  # seconds of rest before a sample, for runtimes whose idle threads spin


@dataclass(frozen=True)
class Options:
    """What holds for a whole run."""

    threads: int
    device: str = "cpu"
    impl: str | None = None  # None: the layer as users call it


@dataclass(frozen=True)
class Requirement:
    """A promised number: `value(record)` must be at least (or at most) `bound(record)`.

    `value` raises KeyError where the record lacks a competitor it needs.
    """

    what: str
    required: str
    configs: Callable[[], Sequence[Any]]
    value: Callable[[Mapping], float]
    bound: Callable[[Mapping], float]
    at_most: bool = False

    def margin(self, record: Mapping) -> float:
        """Not below 0 where the requirement is met; the smallest is the worst configuration."""
        distance = self.value(record) - self.bound(record)
        return -distance if self.at_most else distance


@dataclass(frozen=True)
class Case:
    """`suites` name lists of configurations; `table` is the field one table is printed per.

    `budget`: seconds of timing a configuration is worth.
    """

    name: str
    suites: Mapping[str, Callable[[], Sequence[Any]]]
    prepare: Callable[[Any, Options], Workload]
    requirements: Sequence[Requirement] = ()
    table: str | None = None
    budget: float = 1.0


def load(name: str) -> Case:
    """The case of that name; ValueError lists the known ones."""
    if name not in CASES:
        known = ", ".join((*CASES, *GROUPS))
        raise ValueError(f"unknown benchmark case {name!r}; expected one of {known}")
    return importlib.import_module(f"bench.{name}").CASE


def select(case: Case, suite: str, only: Sequence[str] = ()) -> list[Any]:
    """Distinct configurations of a suite that pass every filter `field=value[,value...]`."""
    if suite not in case.suites:
        raise ValueError(
            f"{case.name}: unknown suite {suite!r}; expected one of {', '.join(case.suites)}"
        )
    configs = list(dict.fromkeys(case.suites[suite]()))
    for text in only:
        name, _, values = text.partition("=")
        present = sorted({str(asdict(config).get(name)) for config in configs})
        if name not in asdict(configs[0]):
            known = ", ".join(asdict(configs[0]))
            raise ValueError(f"{case.name}: cannot filter by {text!r}; fields are {known}")
        wanted = set(values.split(","))
        kept = [config for config in configs if str(asdict(config)[name]) in wanted]
        if not kept:
            raise ValueError(
                f"{case.name}: no configuration of suite {suite!r} has {text}; "
                f"{name} takes {', '.join(present)} there"
            )
        configs = kept
    return configs
