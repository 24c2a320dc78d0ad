# SPDX-License-Identifier: Apache-2.0
"""Case tensor_product_embedding: MorphTE's table with LayerNorm, against other ways to make it.

`block-wise` is the method's own form: gather each factor in its layout [r, M, q], then take tensor
products of all ranks, factor by factor. `bmm` is the best eager rewrite found, one batched product
of the first factor with all others. `Embedding + LayerNorm` is what is replaced; `fill` writes as
many bytes as the result has. Ids are Zipf-distributed unless said.

The gradient of nn.Embedding is as large as its table. Where malloc maps fresh pages for it, as it
does in a training step, most of its time is theirs; forward_backward comes first, before other
configurations leave that much memory to reuse.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lean_kernels as lk
from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.ops._row_norm import RowNorm

OURS = {"float32": 1e-6, "bfloat16": 8e-3}
BROKEN = {"float32": 1e-4, "bfloat16": 8e-2}  # no healthy competitor is this far off
SHORT = 0.5  # of the words share their last morpheme, as words with fewer than three do
EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """`ids`: "zipf", "uniform" or "equal"."""

    mode: str = "forward"  # forward, forward_backward
    count: int = 4096
    ids: str = "zipf"
    dtype: str = "float32"
    words: int = 41280
    morphemes: int = 10818
    features: int = 512
    order: int = 3
    rank: int = 10


def _ids(c: Config, generator: torch.Generator) -> Tensor:
    if c.ids == "equal":
        return torch.full((c.count,), 7)
    if c.ids == "uniform":
        return torch.randint(0, c.words, (c.count,), generator=generator)
    return torch.multinomial(
        1 / torch.arange(1, c.words + 1.0), c.count, replacement=True, generator=generator
    )


def _product_of_others(picked: tuple[Tensor, ...]) -> Tensor:
    """[N, r, q] each -> [N, r, q^(n-1)] of all but the first."""
    product = picked[-1]
    for factor in picked[-2:0:-1]:
        product = (factor[:, :, :, None] * product[:, :, None, :]).flatten(2)
    return product


def _bmm(ids, morphemes, factors, weight, bias):
    rows = F.embedding(morphemes[ids], factors.flatten(1)).unflatten(-1, factors.shape[1:])
    first, *_ = picked = rows.unbind(1)
    made = torch.bmm(first.transpose(1, 2), _product_of_others(picked)).flatten(1)
    return F.layer_norm(made[:, : len(weight)], weight.shape, weight, bias, EPS)


def _block_wise(ids, morphemes, factors_by_rank, weight, bias):
    chosen = morphemes[ids]
    made = factors_by_rank[:, chosen[:, 0]]  # [r, N, q]
    for column in chosen.unbind(1)[1:]:
        made = (made[:, :, :, None] * factors_by_rank[:, column][:, :, None, :]).flatten(2)
    return F.layer_norm(made.sum(0)[:, : len(weight)], weight.shape, weight, bias, EPS)


class _Problem:
    def __init__(self, c: Config, options: Options) -> None:
        self.c, self.options = c, options
        dtype = getattr(torch, c.dtype)
        generator = torch.Generator().manual_seed(0)
        morphemes = torch.randint(0, c.morphemes, (c.words, c.order), generator=generator)
        morphemes[torch.rand(c.words, generator=generator) < SHORT, -1] = 1
        torch.manual_seed(0)
        self.layer = lk.nn.MorphTEEmbedding(
            morphemes, c.features, order=c.order, rank=c.rank, num_morphemes=c.morphemes
        ).to(options.device, dtype)
        self.ids = _ids(c, generator).to(options.device)
        self.morphemes = morphemes.to(options.device)
        self.dense = nn.Embedding(c.words, c.features, device=options.device, dtype=dtype)
        self.norm = nn.LayerNorm(c.features, device=options.device, dtype=dtype)
        shape = c.count, c.features
        self.grad = torch.randn(shape, generator=generator).to(options.device, dtype)
        self.learned = self.layer.factors, self.norm.weight, self.norm.bias

    def lean(self) -> Tensor:
        layer, norm = self.layer, self.norm
        return lk.ops.tensor_product_embedding(
            self.ids,
            layer.morphemes,
            layer.factors,
            embedding_dim=self.c.features,
            norm=RowNorm("layer", norm.weight, norm.bias, EPS),
            impl=self.options.impl,
        )

    def exact(self, grad: bool) -> tuple[Tensor, ...]:
        learned = [t.detach().double().requires_grad_(grad) for t in self.learned]
        with torch.set_grad_enabled(grad):
            y = _bmm(self.ids, self.morphemes, *learned)
        return torch.autograd.grad(y, learned, self.grad.double()) if grad else (y,)


def _forward(p: _Problem) -> dict[str, Competitor]:
    ours, broken = OURS[p.c.dtype], BROKEN[p.c.dtype]
    exact = p.exact(False)
    factors, weight, bias = p.learned
    by_rank = factors.detach().transpose(0, 1).contiguous()
    compiled = torch.compile(_bmm)
    plain = F.layer_norm(p.dense(p.ids).double(), weight.shape, weight.double(), bias.double(), EPS)
    result = p.lean()
    filled = torch.empty_like(result)

    def fill():
        filled.fill_(1)
        return result

    def dense():
        return p.norm(p.dense(p.ids))

    calls = {
        "bmm": lambda: _bmm(p.ids, p.morphemes, factors, weight, bias),
        "compiled bmm": lambda: compiled(p.ids, p.morphemes, factors, weight, bias),
        "block-wise": lambda: _block_wise(p.ids, p.morphemes, by_rank, weight, bias),
    }
    return {
        "lean": Competitor(p.lean, exact, ours),
        **{name: Competitor(call, exact, broken) for name, call in calls.items()},
        "Embedding + LayerNorm": Competitor(dense, (plain,), broken),
        "fill": Competitor(fill, (result.double(),), 0.0),
    }


def _forward_backward(p: _Problem) -> dict[str, Competitor]:
    ours, broken = OURS[p.c.dtype], BROKEN[p.c.dtype]
    factors, weight, bias = p.learned
    by_rank = factors.detach().transpose(0, 1).contiguous().requires_grad_()
    compiled = torch.compile(_bmm)

    def step(make, *learned):
        return lambda: torch.autograd.grad(make(), learned, p.grad)

    def block_wise():
        return _block_wise(p.ids, p.morphemes, by_rank, weight, bias)

    def plain():
        return p.dense(p.ids)

    exact = p.exact(True)
    scattered = torch.zeros(p.dense.weight.shape, dtype=torch.float64, device=p.ids.device)
    scattered.index_add_(0, p.ids, p.grad.double())
    calls = {
        "bmm": lambda: _bmm(p.ids, p.morphemes, factors, weight, bias),
        "compiled bmm": lambda: compiled(p.ids, p.morphemes, factors, weight, bias),
    }
    return {
        "lean": Competitor(step(p.lean, *p.learned), exact, ours),
        **{name: Competitor(step(make, *p.learned), exact, broken) for name, make in calls.items()},
        "block-wise": Competitor(
            step(block_wise, by_rank, weight, bias), (exact[0].transpose(0, 1), *exact[1:]), broken
        ),
        "Embedding": Competitor(step(plain, p.dense.weight), (scattered,), broken),
    }


def prepare(config: Config, options: Options) -> Workload:
    """The tensors and competitors of one configuration."""
    backward = config.mode == "forward_backward"
    problem = _Problem(config, options)
    with torch.set_grad_enabled(backward):
        competitors = (_forward_backward if backward else _forward)(problem)
    unique = len(problem.ids.unique())
    products = 2.0 * unique * config.features * config.rank  # of a row
    facts = {"unique": unique / config.count, "compression": problem.layer.compression}
    return Workload(
        competitors,
        flops=products * (4 if backward else 1),
        dtype=config.dtype,
        facts=facts,
        grad=backward,
    )


def _promised(mode: str) -> list[Config]:
    return [Config(mode=mode)]


def _required(mode: str, competitor: str, ratio: float) -> Requirement:
    return Requirement(
        f"{mode.replace('_', ' + ')}, V 41,280, r 10, D 512, 4,096 Zipf ids, over {competitor}",
        f"{ratio:g}",
        lambda: _promised(mode),
        lambda record: record["ratios"][competitor],
        lambda record: ratio,
    )


def _numbers() -> list[Config]:
    return _promised("forward_backward") + _promised("forward")


def _full() -> list[Config]:
    modes = ("forward", "forward_backward")
    return (
        _numbers()
        + [Config(mode, ids=ids) for mode in modes for ids in ("uniform", "equal")]
        + [Config(mode, count=count) for mode in modes for count in (16, 128, 1024)]
        + [Config(mode, dtype="bfloat16") for mode in modes]
        + [Config(features=features, rank=8) for features in (216, 1000)]
    )


CASE = Case(
    name="tensor_product_embedding",
    suites={"quick": _numbers, "full": _full, "numbers": _numbers},
    prepare=prepare,
    requirements=(
        _required("forward_backward", "block-wise", 35),
        _required("forward_backward", "Embedding", 7),
        _required("forward", "bmm", 6),
        _required("forward", "block-wise", 60),
        _required("forward", "Embedding + LayerNorm", 1.7),
    ),
    table="mode",
    budget=4.0,
)
