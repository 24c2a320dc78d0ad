# SPDX-License-Identifier: Apache-2.0
"""Case tensor_train_embedding: rows of a tensor train, against tensorly-torch, eager and a table.

"tltorch BlockTT" is there where tensorly-torch is installed. "gather, bmm" multiplies one slice per
id and core, as this package's reference does.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.nn import TensorTrainEmbedding
from lean_kernels.ops.tensor_train_embedding import reference

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Config:
    """`ids`: how many, by Zipf's law over the rows."""

    step: str = "forward"  # forward, train
    rows: int = 41_280
    features: int = 512
    rank: int = 32
    order: int = 3
    ids: int = 4096


def _ids(c: Config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(c.ids, generator=generator)
    return ((c.rows + 1) ** draws).long().sub_(1).clamp_(0, c.rows - 1)


def _block_tt(c: Config, layer: TensorTrainEmbedding):
    """tensorly-torch's BlockTT with the same cores."""
    import tensorly
    from tltorch.factorized_tensors import BlockTT

    tensorly.set_backend("pytorch")
    factors = [core.detach().permute(1, 0, 2, 3).contiguous() for core in layer.cores]
    return BlockTT(
        factors, tensorized_shape=(layer.row_factors, layer.col_factors), rank=layer.ranks
    )


def _dense(rows, count: int) -> torch.Tensor:
    rows = rows if isinstance(rows, torch.Tensor) else rows.to_tensor()
    return rows.reshape(count, -1)


def _prepare(c: Config, options: Options) -> Workload:
    torch.manual_seed(0)
    layer = TensorTrainEmbedding(c.rows, c.features, rank=c.rank, order=c.order)
    ids, cores = _ids(c).to(options.device), list(layer.to(options.device).cores)
    dense = torch.nn.Embedding(c.rows, c.features, device=options.device)
    exact = [core.detach().double().requires_grad_() for core in cores]
    rows = reference.forward(ids, exact, c.rows, c.features)

    def gather_bmm():
        return reference.forward(ids, cores, c.rows, c.features)

    calls = {"lean": lambda: layer(ids), "gather, bmm": gather_bmm}
    calls["compiled"] = torch.compile(gather_bmm)
    if find_spec("tltorch") and c.step == "forward" and c.features == _width(layer):
        block = _block_tt(c, layer)
        calls["tltorch BlockTT"] = lambda: _dense(block[ids, :], c.ids)
    if c.step == "forward":
        competitors = {
            name: Competitor(f, (rows.detach(),), TOLERANCE * (1 if name == "lean" else 10))
            for name, f in calls.items()
        }
        table = dense(ids).detach().double()
        competitors["nn.Embedding"] = Competitor(
            lambda: F.embedding(ids, dense.weight), (table,), 0
        )
        return Workload(competitors)

    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows.device)
    expected = torch.autograd.grad(rows, exact, grad.double())
    competitors = {
        name: Competitor(lambda f=f: torch.autograd.grad(f(), cores, grad), expected, 1e-5)
        for name, f in calls.items()
    }
    table = torch.autograd.grad(F.embedding(ids, dense.weight), dense.weight, grad)
    competitors["nn.Embedding"] = Competitor(
        lambda: torch.autograd.grad(F.embedding(ids, dense.weight), dense.weight, grad),
        (table[0].double(),),
        1e-6,
    )
    return Workload(competitors, grad=True)


def _width(layer: TensorTrainEmbedding) -> int:
    width = 1
    for factor in layer.col_factors:
        width *= factor
    return width


def _promised() -> list[Config]:
    return [Config()]


def _full() -> list[Config]:
    return [
        *(Config(step=s, order=o) for s in ("forward", "train") for o in (2, 3, 4)),
        *(Config(ids=n) for n in (128, 32_768)),
        Config(rank=8),
        Config(features=768),
    ]


CASE = Case(
    name="tensor_train_embedding",
    suites={
        "quick": lambda: [Config(), Config(step="train")],
        "full": _full,
        "numbers": _promised,
    },
    prepare=_prepare,
    requirements=(
        Requirement(
            "tensor train of rank 32 (V 41,280, D 512), 4,096 ids, over tltorch BlockTT",
            "30",
            _promised,
            lambda record: record["ratios"]["tltorch BlockTT"],
            lambda record: 30,
        ),
    ),
    table="step",
)
