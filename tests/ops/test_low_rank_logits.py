# SPDX-License-Identifier: Apache-2.0
"""low_rank_logits: the product of a tied low-rank head."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, assert_accurate, error, needs_cpu_kernels, same_bits
from torch import Tensor

from lean_kernels.ops.low_rank_embedding import logits
from lean_kernels.ops.low_rank_embedding.logits import low_rank_logits

IMPLS = [
    pytest.param(logits._reference, id="reference"),
    pytest.param(low_rank_logits, id="cpu", marks=needs_cpu_kernels),
]
# V, rank: the usual, one number, odd, whole strips, more than a chain of sums, one group and more.
SIZES = [(300, 75), (1, 1), (37, 5), (64, 16), (50, 1100), (600, 33)]
LEADS = [(), (0,), (1,), (2, 0), (12,), (2, 3, 7), (500,)]


@dataclass
class Problem:
    x: Tensor
    codes: Tensor
    scales: Tensor | None
    bias: Tensor | None
    shift: Tensor | None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.x, self.codes, self.scales, self.bias, self.shift

    def exact(self) -> Tensor:
        """The answer in float64, written in another way than the reference."""
        codes = self.codes.double()
        codes = codes if self.scales is None else codes * self.scales.double()[:, None]
        y = torch.einsum("...r,vr->...v", self.x.double(), codes)
        y = y if self.bias is None else y + self.bias.double()
        return y if self.shift is None else y + self.shift.double()[..., None]

    def like_torch(self) -> Tensor:
        codes = self.codes if self.scales is None else self.codes * self.scales[:, None]
        y = F.linear(self.x, codes.to(self.x.dtype), self.bias)
        return y if self.shift is None else y + self.shift[..., None]


def problem(
    size=(300, 75), lead=(3, 7), dtype=torch.float32, *, int8=False, bias=True, shift=True
) -> Problem:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, size, dtype=torch.int8) if int8 else torch.randn(size)
    return Problem(
        torch.randn(*lead, size[1]).to(dtype),
        codes if int8 else codes.to(dtype),
        torch.rand(size[0]) / 100 if int8 else None,
        torch.randn(size[0]).to(dtype) if bias else None,
        torch.randn(lead).to(dtype) if shift else None,
    )


def check(p: Problem, impl) -> None:
    assert_accurate(impl(*p.arguments()), p.exact(), p.like_torch())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, impl):
    for int8, bias, shift in product((False, True), repeat=3):
        check(problem(size, dtype=dtype, int8=int8, bias=bias, shift=shift), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_rows_of_any_shape(lead, impl):
    for dtype in (torch.float32, torch.bfloat16):
        check(problem(lead=lead, dtype=dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    p = problem()
    check(replace(p, x=torch.randn(7, 3, 75).transpose(0, 1)), impl)
    check(replace(p, x=torch.randn(21, 80)[:, 3:78], shift=torch.randn(42)[::2]), impl)
    check(replace(p, codes=torch.randn(300, 80)[:, 3:78], bias=torch.randn(600)[::2]), impl)
    check(replace(p, codes=torch.randn(75, 300).t(), shift=torch.randn(()).expand(3, 7)), impl)
    check(replace(p, codes=torch.randn(75).expand(300, 75)), impl)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_alone(dtype):
    p = problem(lead=(700,), dtype=dtype)
    whole = low_rank_logits(*p.arguments())
    for rows in (slice(0, 1), slice(3, 8), slice(100, 163), slice(470, 490), slice(699, 700)):
        part = replace(p, x=p.x[rows], shift=p.shift[rows])
        assert same_bits(low_rank_logits(*part.arguments()), whole[rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same_bits(low_rank_logits(*p.arguments()), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("int8", [False, True])
def test_gradcheck(int8):
    p = problem((6, 3), (2, 4), torch.float64, int8=int8)
    leaves = [t for t in p.arguments() if t is not None and t.dtype == torch.float64]

    def function(*changed):
        values = iter(changed)
        return low_rank_logits(
            *(
                next(values) if t is not None and t.dtype == torch.float64 else t
                for t in p.arguments()
            )
        )

    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_where_only_some_are_asked_for():
    for asked in ("x", "codes", "bias", "shift"):
        p = problem()
        leaf = getattr(p, asked).requires_grad_()
        grad = torch.randn(3, 7, 300)
        (ours,) = torch.autograd.grad(low_rank_logits(*p.arguments()), leaf, grad)
        (exact,) = torch.autograd.grad(p.exact(), leaf, grad.double())
        assert error(ours, exact.double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    p = problem()
    with torch.autocast("cpu", dtype=dtype):
        y = low_rank_logits(*p.arguments())
    assert y.dtype == dtype
    narrow = [t if t is None else t.to(dtype) for t in p.arguments()]
    assert same_bits(y, low_rank_logits(*narrow))


def test_compile():
    p = problem()
    torch.compiler.reset()
    compiled = torch.compile(low_rank_logits, fullgraph=True, dynamic=True, backend="aot_eager")
    for lead in ((4,), (9,), (2, 3)):
        p = problem(lead=lead)
        leaves = [t.requires_grad_() for t in (p.x, p.codes, p.bias, p.shift)]
        grad = torch.randn(*lead, 300)
        results = [
            torch.autograd.grad(run(*p.arguments()), leaves, grad)
            for run in (low_rank_logits, compiled)
        ]
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("options", [{}, {"int8": True}, {"bias": False, "shift": False}])
def test_opcheck(options):
    p = problem(dtype=torch.bfloat16, **options)
    torch.library.opcheck(torch.ops.lean_kernels.low_rank_logits.default, p.arguments())


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 7, 74)}, "rank"),
        ({"x": torch.zeros(())}, "at least one dimension"),
        ({"x": torch.zeros(3, 7, 75, dtype=torch.int32)}, "dtype must be"),
        ({"codes": torch.zeros(300)}, "rank"),
        ({"codes": torch.zeros(300, 75).double()}, "codes must have the dtype of x"),
        ({"codes": torch.zeros(300, 75, dtype=torch.int8)}, "codes must have the dtype of x"),
        ({"scales": torch.zeros(300)}, "int8 with scales"),
        ({"bias": torch.zeros(299)}, "bias has a shape or dtype"),
        ({"bias": torch.zeros(300).double()}, "bias has a shape or dtype"),
        ({"shift": torch.zeros(3)}, "shift has a shape or dtype"),
    ],
)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=f"low_rank_logits: .*{message}"):
        torch.ops.lean_kernels.low_rank_logits(*replace(problem(), **change).arguments())
