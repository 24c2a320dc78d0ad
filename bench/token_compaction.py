# SPDX-License-Identifier: Apache-2.0
"""Case token_compaction: dropping tokens and normalising what stays, against torch's own steps.

`copy` is torch's copy_ of as many bytes as ours reads and writes, the roof of both.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.ops import add_layer_norm, compact_tokens, gather_tokens, select_tokens
from lean_kernels.ops.token_selection import kept_count

EPS = 1e-12
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Config:
    """`tokens` in sequences of `length`, of which `keep` stay; D `features`."""

    step: str = "compact"  # compact, norm, norm_kept
    tokens: int = 8192
    length: int = 128
    features: int = 768
    keep: float = 0.5
    dtype: str = "float32"


def _copy(elements: int, result: torch.Tensor) -> Competitor:
    """Copies `elements` and returns what the others compute."""
    source = torch.ones(elements, dtype=result.dtype, device=result.device)
    target = torch.zeros_like(source)

    def call():
        target.copy_(source)
        return result

    return Competitor(call, (result.double(),), 0.0)


def _compact(c: Config, options: Options, dtype: torch.dtype) -> Workload:
    batch = c.tokens // c.length
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(batch, c.length, generator=generator)
    scores[:, 0] = 2.0  # the first is kept, by torch too
    hidden = torch.randn(c.tokens, c.features, generator=generator).to(dtype)
    cu = torch.arange(batch + 1, dtype=torch.int32) * c.length
    scores, hidden, cu = (t.to(options.device) for t in (scores, hidden, cu))
    kept = kept_count(c.keep, c.length)
    first = torch.arange(batch, device=options.device)[:, None] * c.length
    flat = scores.view(-1)
    arguments = {"keep": c.keep, "total": kept * batch, "impl": options.impl}

    def topk_sort_index():
        best = scores.topk(kept, dim=1).indices.sort(dim=1).values
        return hidden[(best + first).view(-1)]

    def topk_sort_gather():
        best = scores.topk(kept, dim=1).indices.sort(dim=1).values
        rows = hidden.view(batch, c.length, -1)
        return rows.gather(1, best[:, :, None].expand(-1, -1, c.features)).flatten(0, 1)

    def two_calls():
        return gather_tokens(
            hidden, select_tokens(flat, cu, **arguments)[0], impl=options.impl
        )  # fmt: skip

    rows = topk_sort_index()
    calls = {
        "lean": lambda: compact_tokens(flat, cu, hidden, **arguments)[2],
        "lean select, gather": two_calls,
        "topk, sort, index": topk_sort_index,
        "topk, sort, gather": topk_sort_gather,
    }
    expected = (rows.double(),)
    competitors = {name: Competitor(call, expected, 0.0) for name, call in calls.items()}
    return Workload(competitors | {"copy": _copy(rows.numel(), rows)})


def _norm(c: Config, options: Options, dtype: torch.dtype) -> Workload:
    generator = torch.Generator().manual_seed(0)
    shapes = [(c.tokens, c.features)] * 2 + [(c.features,)] * 2
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).to(options.device) for shape in shapes
    )
    indices, shape = None, (c.features,)
    if c.step == "norm_kept":
        indices = torch.randperm(c.tokens, generator=generator)[: kept_count(c.keep, c.tokens)]
        indices = indices.sort().values.to(options.device)

    def dense(x, residual, weight, bias):
        z = x + residual
        return F.layer_norm(z if indices is None else z[indices], shape, weight, bias, EPS)

    def lean():
        return add_layer_norm(
            x, residual, weight, bias, eps=EPS, indices=indices, impl=options.impl
        )

    expected = (dense(x.double(), residual.double(), weight.double(), bias.double()),)
    result = expected[0].to(dtype)
    tolerance = TOLERANCE[c.dtype]
    return Workload(
        {
            "lean": Competitor(lean, expected, tolerance),
            "torch": Competitor(lambda: dense(x, residual, weight, bias), expected, tolerance),
            # Two rows read and one written move as much as one and a half copied.
            "copy": _copy(result.numel() * 3 // 2, result),
        }
    )


def _prepare(config: Config, options: Options) -> Workload:
    dtype = getattr(torch, config.dtype)
    return (_compact if config.step == "compact" else _norm)(config, options, dtype)


def _promised() -> list[Config]:
    return [Config()]


def _promised_norm() -> list[Config]:
    return [Config(step="norm", tokens=tokens) for tokens in (1024, 600)]


def _numbers() -> list[Config]:
    return _promised() + _promised_norm()


def _full() -> list[Config]:
    dtypes = ("float32", "bfloat16")
    return (
        _numbers()
        + [Config(length=n, keep=k, dtype=d) for n in (64, 512, 8192) for k in (0.5, 0.2)
           for d in dtypes]
        + [Config(step="norm", tokens=t, dtype=d) for t in (64, 600, 1024, 8192) for d in dtypes]
        + [Config(step="norm_kept", tokens=t, keep=k) for t in (1024, 8192) for k in (0.5, 0.2)]
    )  # fmt: skip


CASE = Case(
    name="token_compaction",
    suites={"quick": _numbers, "full": _full, "numbers": _numbers},
    prepare=_prepare,
    requirements=(
        Requirement(
            "select + gather of 50 % of 8,192 x 768 float32, of copy_'s bandwidth",
            "0.8",
            _promised,
            lambda record: record["ratios"]["copy"],
            lambda record: 0.8,
        ),
        Requirement(
            "add_layer_norm of 1,024 and 600 x 768 float32, over F.layer_norm(x + residual)",
            "1.8",
            _promised_norm,
            lambda record: record["ratios"]["torch"],
            lambda record: 1.8,
        ),
    ),
    table="step",
)
