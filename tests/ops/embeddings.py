# SPDX-License-Identifier: Apache-2.0
"""Problems for the tests of low_rank_embedding, and their exact answers."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels.ops import low_rank_embedding
from lean_kernels.ops._row_norm import RowNorm

ACTIVATIONS = [None, "relu", "gelu", "elu"]
# V, rank, D: the usual, one number, odd, whole vectors, more rows than a chain of sums, wide.
SIZES = [(50, 75, 160), (7, 1, 1), (20, 33, 129), (33, 16, 64), (5, 1100, 40), (9, 5, 2100)]


@dataclass
class Problem:
    ids: Tensor
    codes: Tensor
    decoder: Tensor
    bias: Tensor | None = None
    options: dict = field(default_factory=dict)  # keyword arguments

    def run(self, impl=None, **more) -> Tensor:
        return low_rank_embedding(
            self.ids, self.codes, self.decoder, self.bias, **self.options, **more, impl=impl
        )

    def exact(self) -> Tensor:
        """The answer in float64, written in another way than the reference."""
        codes = self.codes.double()
        if "scales" in self.options:
            codes = codes * self.options["scales"].double()[:, None]
        table = codes @ self.decoder.double().t()
        table = table if self.bias is None else table + self.bias.double()
        act = self.options.get("activation")
        rows = (getattr(F, act)(table) if act else table)[self.ids.long()]
        for ids, extra in self.options.get("added", ()):
            rows = rows + extra.double()[ids.long()]
        norm = self.options.get("norm")
        if norm is None:
            return rows
        center = rows.mean(-1, keepdim=True) if norm.kind == "layer" else 0
        rows = rows - center
        rows = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        rows = rows if norm.weight is None else rows * norm.weight.double()
        return rows if norm.bias is None else rows + norm.bias.double()

    def like_torch(self) -> Tensor:
        """What torch's own layers would compute in this dtype."""
        rows = F.embedding(self.ids, self.codes)
        if "scales" in self.options:
            rows = (rows * F.embedding(self.ids, self.options["scales"][:, None])).to(
                self.decoder.dtype
            )
        rows = F.linear(rows, self.decoder, self.bias)
        act = self.options.get("activation")
        rows = getattr(F, act)(rows) if act else rows
        for ids, extra in self.options.get("added", ()):
            rows = rows + F.embedding(ids, extra)
        norm = self.options.get("norm")
        if norm is None:
            return rows
        if norm.kind == "layer":
            return F.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps)
        rows = F.rms_norm(rows, rows.shape[-1:], norm.weight, norm.eps)
        return rows if norm.bias is None else rows + norm.bias


def problem(
    size=(50, 75, 160), lead=(3, 30), dtype=torch.float32, *, activation=None, bias=True,
    int8=False, added=0, norm=None, ids_dtype=torch.int64,
) -> Problem:  # fmt: skip
    """Random numbers; `added`: number of tables; `norm`: a kind."""
    torch.manual_seed(0)
    rows, rank, features = size
    options = {"activation": activation}
    codes = torch.randn(rows, rank).to(dtype)
    if int8:
        codes = torch.randint(-128, 128, (rows, rank), dtype=torch.int8)
        options["scales"] = torch.rand(rows) / 100
    if added:
        places = torch.arange(lead[-1]) if lead else torch.tensor(0)
        types = torch.zeros((1,) * len(lead), dtype=torch.int32)
        options["added"] = tuple(
            (ids, torch.randn(max(ids.numel(), 2), features).to(dtype))
            for ids in (places, types)[:added]
        )
    if norm is not None:
        weight, shift = (torch.randn(features).to(dtype) for _ in range(2))
        options["norm"] = RowNorm(norm, weight, shift, 1e-6)
    decoder = (torch.randn(features, rank) / rank**0.5).to(dtype)
    ids = torch.randint(rows, lead, dtype=ids_dtype)
    return Problem(ids, codes, decoder, torch.randn(features).to(dtype) if bias else None, options)
