# SPDX-License-Identifier: Apache-2.0
"""Case low_rank_embedding: lookup, tied head, training step and BERT's embeddings from factors.

Ids follow Zipf's law unless said. `table` is nn.Embedding or the dense head with as many rows; its
rows are its own, so that it is checked against itself alone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.nn import LeanEmbeddings, LowRankEmbedding
from lean_kernels.optim import LazyAdam

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Config:
    """`ids` of a `vocabulary`; rows of `features` from codes of `rank`."""

    step: str = "lookup"  # lookup, head, training, bert
    tokens: int = 4096
    vocabulary: int = 30522
    rank: int = 75
    features: int = 768
    ids: str = "zipf"  # zipf, uniform (distinct), same


def make_ids(config: Config) -> Tensor:
    """[tokens], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(config.vocabulary, generator=generator)
    if config.ids == "uniform":
        return order[: config.tokens]
    if config.ids == "same":
        return order[:1].repeat(config.tokens)
    weights = 1 / torch.arange(1, config.vocabulary + 1, dtype=torch.float64)
    return order[torch.multinomial(weights, config.tokens, True, generator=generator)]


class Factors(nn.Module):
    """Codes looked up, then decoded: the method as one would write it."""

    def __init__(self, layer: LowRankEmbedding) -> None:
        super().__init__()
        self.codes = nn.Embedding.from_pretrained(layer.codes.detach().clone(), freeze=False)
        self.decoder = nn.Linear(layer.rank, layer.embedding_dim, bias=False)
        self.decoder.weight = nn.Parameter(layer.decoder.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.codes(ids))


def _against(exact: Tensor, **calls: Callable) -> dict[str, Competitor]:
    return {
        name.replace("_", " "): Competitor(call, (exact,), TOLERANCE)
        for name, call in calls.items()
    }


def _lookup(c: Config, ids: Tensor, layer: LowRankEmbedding, table: nn.Embedding) -> Workload:
    eager = Factors(layer)
    compiled = torch.compile(Factors(layer), dynamic=False)
    exact = F.embedding(ids, layer.codes.double()) @ layer.decoder.double().t()
    competitors = _against(
        exact,
        lean=lambda: layer(ids),
        eager=lambda: eager(ids),
        compiled=lambda: compiled(ids),
    ) | _against(table.weight[ids].double(), table=lambda: table(ids))
    distinct = len(ids.unique())
    return Workload(
        competitors,
        flops=2.0 * distinct * c.rank * c.features,
        facts={"distinct": distinct / c.tokens, "compression": layer.compression},
    )


def _head(c: Config, ids: Tensor, layer: LowRankEmbedding, table: nn.Embedding) -> Workload:
    hidden = torch.randn(c.tokens, c.features, generator=torch.Generator().manual_seed(1))
    head = layer.tied_head()
    exact = (hidden.double() @ layer.decoder.double()) @ layer.codes.double().t()
    dense = hidden.double() @ table.weight.double().t()
    return Workload(
        _against(exact, lean=lambda: head(hidden))
        | _against(dense, table=lambda: F.linear(hidden, table.weight)),
        flops=2.0 * c.tokens * c.rank * (c.vocabulary + c.features),
        ideal=c.vocabulary * c.features / (c.rank * (c.vocabulary + c.features)),
    )


def _adam(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(module.parameters(), fused=True)]


def _lazy_adam(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [LazyAdam(module.parameters())]


def _sparse_adam(module: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's: SparseAdam for the parameters looked up, Adam for the others."""
    looked_up = [p for name, p in module.named_parameters() if "decoder" not in name]
    rest = [p for name, p in module.named_parameters() if "decoder" in name]
    dense = [torch.optim.Adam(rest, fused=True)] if rest else []
    return [torch.optim.SparseAdam(looked_up), *dense]


def _trained(make: Callable, module: nn.Module, ids: Tensor, grad: Tensor) -> Callable:
    """A step of the optimizers `make` gives, of a copy of the module."""
    module = copy.deepcopy(module)
    if make is not _adam:
        module.sparse = True
    optimizers = make(module)

    def step() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        rows = module(ids)
        rows.backward(grad)
        for optimizer in optimizers:
            optimizer.step()
        return rows.detach()

    return step


def _training(c: Config, ids: Tensor, layer: LowRankEmbedding, table: nn.Embedding) -> Workload:
    grad = torch.randn(c.tokens, c.features, generator=torch.Generator().manual_seed(1))
    step = partial(_trained, ids=ids, grad=grad)
    exact = F.embedding(ids, layer.codes.double()) @ layer.decoder.double().t()
    steps = {
        "lean_LazyAdam": step(_lazy_adam, layer),
        "lean_SparseAdam": step(_sparse_adam, layer),
        "lean_Adam": step(_adam, layer),
        "eager_Adam": step(_adam, Factors(layer)),
    }
    tables = {
        "table_Adam": step(_adam, table),
        "table_SparseAdam": step(_sparse_adam, table),
        "table_LazyAdam": step(_lazy_adam, table),
    }
    return Workload(
        _against(exact.detach(), **steps) | _against(table.weight[ids].detach().double(), **tables),
        grad=True,
    )


def _bert(c: Config, ids: Tensor, layer: LowRankEmbedding, table: nn.Embedding) -> Workload:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(vocab_size=c.vocabulary, hidden_size=c.features)
    hf = BertEmbeddings(config).eval()
    ids = ids.view(-1, 128)
    types = torch.zeros_like(ids)

    def with_word(word: nn.Module) -> nn.Module:
        block = copy.deepcopy(hf)
        block.word_embeddings = word
        return block

    lean = LeanEmbeddings(with_word(layer)).eval()
    factors, plain = with_word(Factors(layer)), with_word(table)
    exact, exact_plain = (
        copy.deepcopy(block).double()(ids, types).detach() for block in (factors, plain)
    )
    compiled = torch.compile(factors, dynamic=False)
    return Workload(
        _against(
            exact,
            lean=lambda: lean(ids, types),
            eager=lambda: factors(ids, types),
            compiled=lambda: compiled(ids, types),
        )
        | _against(exact_plain, table=lambda: plain(ids, types))
    )


def _prepare(config: Config, options: Options) -> Workload:
    torch.manual_seed(0)
    layer = LowRankEmbedding(config.vocabulary, config.features, config.rank)
    table = nn.Embedding(config.vocabulary, config.features)
    steps = {"lookup": _lookup, "head": _head, "training": _training, "bert": _bert}
    return steps[config.step](config, make_ids(config), layer, table)


def _lookups() -> list[Config]:
    return [Config()]


def _heads(tokens: int) -> list[Config]:
    return [Config(step="head", tokens=tokens)]


def _trainings() -> list[Config]:
    return [Config(step="training", vocabulary=128_000, rank=64, features=1024)]


def _berts() -> list[Config]:
    return [Config(step="bert", tokens=8 * 128)]


def _numbers() -> list[Config]:
    return _lookups() + _heads(1) + _heads(128) + _trainings() + _berts()


def _full() -> list[Config]:
    lookups = [
        Config(tokens=tokens, ids=ids)
        for tokens in (1, 128, 4096, 32768)
        for ids in ("zipf", "uniform", "same")
        if tokens <= 30522 or ids != "uniform"
    ]
    return _numbers() + lookups


def _at_least(what: str, bound: float, configs: Callable, competitor: str) -> Requirement:
    return Requirement(
        what, f"{bound:g}", configs, lambda record: record["ratios"][competitor], lambda _: bound
    )


CASE = Case(
    name="low_rank_embedding",
    suites={"quick": _numbers, "full": _full, "numbers": _numbers},
    prepare=_prepare,
    requirements=(
        _at_least("4,096 ids, over gather + Linear", 2.5, _lookups, "eager"),
        _at_least("head, batch 1, over the dense head", 12, partial(_heads, 1), "table"),
        _at_least("head, 128 rows, over the dense head", 8, partial(_heads, 128), "table"),
        _at_least("training step, over dense fused Adam", 15, _trainings, "table Adam"),
        _at_least("training step, over SparseAdam", 4, _trainings, "table SparseAdam"),
        _at_least("BERT embeddings, over HF with the factors", 3, _berts, "eager"),
        _at_least("BERT embeddings, over HF with the table", 1, _berts, "table"),
    ),
    table="step",
)
