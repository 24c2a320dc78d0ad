# SPDX-License-Identifier: Apache-2.0
"""Problems for the launchers of ragged_attention's Triton kernels, and what tests of them share."""

from itertools import accumulate

import pytest
import torch
from interpreted import DEVICE, mend_bfloat16

from lean_kernels.ops.ragged_attention import reference, triton, triton_call

LENGTHS = [5, 0, 18, 1]
SUM, MEAN = 1, 2


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    mend_bfloat16(monkeypatch, triton_call)


@pytest.fixture(name="take")
def take_path(monkeypatch):
    """Make the launcher take one path, in tiles small enough for the interpreter."""
    plain = triton_call.config

    def choose(path: str) -> None:
        def config(kernel, *args):
            if kernel == "resident":
                small = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1}
                return small if path == "resident" else None
            if "packed" in kernel and path != "packed":
                return None
            return plain(kernel, *args)

        monkeypatch.setattr(triton_call, "config", config)

    return choose


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def ascending(lengths) -> torch.Tensor:
    """Positions that tokens could have after others were dropped."""
    parts = [torch.randperm(2 * n)[:n].sort()[0] for n in lengths]
    return torch.cat(parts).int().to(DEVICE)


class Problem:
    def __init__(
        self, lengths=LENGTHS, lengths_k=None, *, heads=2, kv_heads=None, dim=16,
        dtype=torch.float32, positions=False, max_seqlen=None, scale=0.3, left=-1, right=-1,
        scores=SUM, per_head=False, exclude_diagonal=False,
    ):  # fmt: skip
        torch.manual_seed(0)
        keys = lengths if lengths_k is None else lengths_k
        of_query = (sum(lengths), heads, dim)
        of_key = (sum(keys), kv_heads or heads, dim)
        self.qkv, self.grad = (
            [torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes]
            for shapes in ((of_query, of_key, of_key), (of_query,))
        )
        shape = (sum(keys), heads) if per_head else (sum(keys),)
        self.grad_scores = torch.randn(shape).to(DEVICE) if scores else None
        self.index = (
            bounds(lengths),
            None if lengths_k is None else bounds(lengths_k),
            ascending(lengths) if positions else None,
            ascending(keys) if positions and lengths_k is not None else None,
        )
        self.longest = max(lengths) if max_seqlen is None else max_seqlen
        self.numbers = (scale, left, right, scores, per_head, exclude_diagonal)

    @property
    def layout(self):
        return *self.index, self.longest, *self.numbers

    def forward(self):
        return triton.forward(*self.qkv, *self.layout)

    def gradients(self, out, lse):
        return triton.grad(*self.grad, self.grad_scores, *self.qkv, out, lse, *self.layout)

    def exact(self):
        """Output, LSE, scores; gradients of query, key, value. In float64."""
        scale, left, right, scores, *kind = self.numbers
        qkv = [t.double() for t in self.qkv]
        options = (*self.index, scale, left, right)
        forward = reference.forward(*qkv, *options, scores > 0, scores == MEAN, *kind)
        upstream = (None if t is None else t.double() for t in (*self.grad, self.grad_scores))
        return forward, reference.grad(*upstream, *qkv, *options, scores == MEAN, *kind)


def error(actual, exact) -> float:
    """RMS of the error over RMS of the exact values."""
    assert actual.shape == exact.shape
    difference = float((actual.detach().double() - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0


def check(problem, bound=1e-6, gradients=True):
    out, lse, scores = problem.forward()
    (exact_out, exact_lse, exact_scores), exact_gradients = problem.exact()
    assert error(out, exact_out) < bound
    seen = exact_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert error(lse[seen], exact_lse[seen]) < 1e-6
    assert error(scores, exact_scores) < 1e-6
    if gradients:
        for actual, exact in zip(problem.gradients(out, lse), exact_gradients, strict=True):
            assert error(actual, exact) < bound
