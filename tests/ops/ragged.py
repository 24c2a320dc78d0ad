# SPDX-License-Identifier: Apache-2.0
"""Problems for the tests of ragged_attention, their exact answers, and what counts as equal."""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from lean_kernels.ops import ragged_attention

MIXED = [5, 0, 17, 1, 64, 33, 0]  # lengths: empty, one row, whole vectors, remainders
# Each: the keyword arguments that say which keys count and what is returned.
SCORES = [
    {},
    {"key_scores": "sum"},
    {"key_scores": "mean"},
    {"key_scores": "sum", "key_scores_per_head": True},
    {"key_scores": "mean", "key_scores_per_head": True, "exclude_diagonal": True},
    {"key_scores": "mean", "exclude_diagonal": True},
]


def cu_seqlens(lengths) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def ascending(lengths, spread: int) -> Tensor:
    """Positions of tokens that were kept: rising, with gaps and now and then twice the same."""
    parts = [torch.randint(-3, spread * n + 1, (n,)).sort().values for n in lengths]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).int()


@dataclass
class Problem:
    query: Tensor  # [T, H, D]
    key: Tensor  # [T_k, H_kv, D]
    value: Tensor
    cu: Tensor
    options: dict = field(default_factory=dict)

    def with_options(self, **options) -> "Problem":
        return replace(self, options=self.options | options)

    def run(self, impl=None) -> tuple[Tensor, ...]:
        """(out,) or (out, scores)."""
        result = ragged_attention(
            self.query, self.key, self.value, self.cu, **self.options, impl=impl
        )
        return result if isinstance(result, tuple) else (result,)

    def run_with_gradients(self, impl=None) -> tuple[Tensor, ...]:
        """Results, then the gradients of query, key and value for random upstream gradients."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.query, self.key, self.value)]
        results = replace(self, query=leaves[0] * 1, key=leaves[1] * 1, value=leaves[2] * 1).run(
            impl
        )
        generator = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(r.shape, generator=generator).bfloat16().to(r.dtype) for r in results
        ]
        return *results, *torch.autograd.grad(results, leaves, upstream)

    @property
    def double(self) -> "Problem":
        return replace(
            self, query=self.query.double(), key=self.key.double(), value=self.value.double()
        )

    def sequence(self, b: int) -> "Problem":
        """Sequence b alone."""
        cu_k = self.options.get("cu_seqlens_k")
        rows = slice(*self.cu[b : b + 2].tolist())
        keys = rows if cu_k is None else slice(*cu_k[b : b + 2].tolist())
        options = dict(self.options)
        if cu_k is not None:
            options["cu_seqlens_k"] = cu_seqlens([keys.stop - keys.start])
        if options.get("positions") is not None:
            options["positions"] = options["positions"][rows]
        if options.get("key_positions") is not None:
            options["key_positions"] = options["key_positions"][keys]
        return Problem(
            self.query[rows],
            self.key[keys],
            self.value[keys],
            cu_seqlens([rows.stop - rows.start]),
            options,
        )


def problem(
    lengths, heads=4, kv_heads=None, dim=16, dtype=torch.float32, key_lengths=None, **options
) -> Problem:
    torch.manual_seed(0)
    kv_heads = kv_heads or heads
    keys = sum(lengths if key_lengths is None else key_lengths)
    if key_lengths is not None:
        options["cu_seqlens_k"] = cu_seqlens(key_lengths)
    return Problem(
        torch.randn(sum(lengths), heads, dim, dtype=dtype),
        torch.randn(keys, kv_heads, dim, dtype=dtype),
        torch.randn(keys, kv_heads, dim, dtype=dtype),
        cu_seqlens(lengths),
        options,
    )


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square of what is right."""
    assert result.shape == exact.shape
    difference, scale = (result.double() - exact).norm().item(), exact.norm().item()
    return difference / scale if scale else difference


def limit(dtype: torch.dtype) -> float:
    """float32 1e-6, float64 1e-14; halves are rounded once: half a unit in the last place."""
    if dtype in (torch.float32, torch.float64):
        return {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    return torch.finfo(dtype).eps / 2


def assert_exact(results, exact, slack: float = 1) -> None:
    for result, right in zip(results, exact, strict=True):
        assert result.is_contiguous()
        assert error(result, right) <= slack * limit(result.dtype)
