# SPDX-License-Identifier: Apache-2.0
"""lazy_adam_ against Adam's definition in float64, on the rows a gradient has and on the others."""

import pytest
import torch

from lean_kernels import _extension
from lean_kernels.ops import lazy_adam_

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
OPTIONS = {"lr": 0.03, "betas": (0.85, 0.98), "eps": 1e-6}
# A handful of roundings; halves are rounded once from float32.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sparse(rows, values, shape, **options):
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True, **options)


def tables(shape, dtype):
    param, first = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    return param, first, draw(*shape, dtype=dtype, seed=2).abs()


def exact(param, first, second, step, rows, grad, lr, betas, eps):
    """The definition, in float64, of the rows alone."""
    m, v, w = first[rows].double(), second[rows].double(), param[rows].double()
    m = betas[0] * m + (1 - betas[0]) * grad.double()
    v = betas[1] * v + (1 - betas[1]) * grad.double() ** 2
    unbiased = m / (1 - betas[0] ** float(step)), v / (1 - betas[1] ** float(step))
    return w - lr * unbiased[0] / (unbiased[1].sqrt() + eps), m, v


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 3, 16, 17, 64, 100])
def test_rows_of_the_gradient_take_adams_step_and_others_none(impl, dtype, features):
    for count, t in ((0, 1), (1, 1), (7, 3), (40, 1000)):
        before = tables((40, features), dtype)
        rows = torch.randperm(40, generator=torch.Generator().manual_seed(count))[:count]
        grad = draw(count, features, dtype=dtype, seed=3)
        others = torch.ones(40, dtype=torch.bool).index_fill_(0, rows, False)
        before[0][others] = torch.nan  # read by nobody
        after = [table.clone() for table in before]
        step = torch.tensor(float(t))
        lazy_adam_(
            after[0], sparse(rows, grad, (40, features)), *after[1:], step, **OPTIONS, impl=impl
        )
        for ours, expected, was in zip(
            after, exact(*before, step, rows, grad, **OPTIONS), before, strict=True
        ):
            assert torch.equal(ours[others].nan_to_num(), was[others].nan_to_num())
            difference = (ours[rows].double() - expected).abs()
            assert (difference <= TOLERANCE[dtype] * (1 + expected.abs())).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_many_rows_are_what_few_are(impl):
    before = tables((5000, 33), torch.float32)
    grad = draw(5000, 33, seed=3)
    whole = [table.clone() for table in before]
    step = torch.tensor(2.0)
    everything = torch.arange(5000)
    lazy_adam_(whole[0], sparse(everything, grad, (5000, 33)), *whole[1:], step, lr=1, impl=impl)
    rows = torch.tensor([4999, 0, 2500])
    few = [table.clone() for table in before]
    gradient = sparse(rows, grad[rows], (5000, 33))
    lazy_adam_(few[0], gradient, *few[1:], step, lr=1, impl=impl)
    for a, b in zip(whole, few, strict=True):
        assert torch.equal(a[rows], b[rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(9,), (9, 2, 3), (9, 0)], ids=str)
def test_any_shape_of_row_and_gradients_with_a_row_twice(impl, shape):
    twice = torch.tensor([3, 0, 3])
    values = draw(3, *shape[1:], seed=4)
    results = []
    for grad in (
        sparse(twice, values, shape),
        sparse(torch.tensor([0, 3]), torch.stack([values[1], values[0] + values[2]]), shape),
    ):
        after = tables(shape, torch.float32)
        lazy_adam_(after[0], grad, *after[1:], torch.ones(()), lr=0.1, impl=impl)
        results.append(after)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert shape[-1] == 0 or not torch.equal(results[0][0], tables(shape, torch.float32)[0])


def test_opcheck():
    for impl_dtype in (torch.float32, torch.bfloat16):
        param, first, second = tables((6, 5), impl_dtype)
        grad = draw(2, 5, dtype=impl_dtype)
        torch.library.opcheck(
            torch.ops.lean_kernels.lazy_adam_.default,
            (param, first, second, torch.ones(()), torch.tensor([4, 1]), grad, 0.1, 0.9, 0.99, 0.0),
        )


GRAD = sparse(torch.tensor([1]), torch.ones(1, 3), (4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(4, 3, dtype=torch.int32)}, "param must be contiguous"),
        ({"param": torch.zeros(3, 4).t()}, "param must be contiguous"),
        ({"param": torch.zeros(())}, "param must be contiguous"),
        ({"exp_avg": torch.zeros(4, 2)}, r"exp_avg must be contiguous torch.float32 \[4, 3\]"),
        ({"exp_avg_sq": torch.zeros(3, 4).t()}, "exp_avg_sq must be contiguous"),
        ({"exp_avg_sq": torch.zeros(4, 3).half()}, "exp_avg_sq must be"),
        ({"grad": torch.zeros(4, 3)}, "grad must be sparse in its first dimension alone.*Adam"),
        ({"grad": torch.ones(4, 3).to_sparse()}, "grad must be sparse in its first dimension"),
        ({"grad": GRAD.double()}, r"grad must be torch.float32 \[4, 3\] like param"),
        ({"step": torch.ones(2)}, "step must be one float32"),
        ({"step": torch.ones((), dtype=torch.int64)}, "step must be one float32"),
        ({"step": torch.ones((), device="meta")}, "step is on meta, param on cpu"),
        ({"impl": "fast"}, "unknown impl 'fast'; expected one of 'reference', 'cpu', 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "param": torch.zeros(4, 3),
        "grad": GRAD,
        "exp_avg": torch.zeros(4, 3),
        "exp_avg_sq": torch.zeros(4, 3),
        "step": torch.ones(()),
    } | change
    with pytest.raises(ValueError, match=f"lazy_adam: {message}"):
        lazy_adam_(**arguments, lr=0.1)


@needs_cpu_kernels
def test_the_op_itself_refuses_what_does_not_fit():
    op = torch.ops.lean_kernels.lazy_adam_.default
    tensors = [*tables((4, 3), torch.float32), torch.ones(()), torch.tensor([1]), torch.ones(1, 3)]
    for place, wrong, message in (
        (0, torch.zeros(3, 4).t(), "must be contiguous, of one shape"),
        (1, torch.zeros(5, 3), "must be contiguous, of one shape"),
        (2, torch.zeros(4, 3).double(), "must be contiguous, of one shape"),
        (3, torch.ones(2), "step must be a float32 scalar"),
        (4, torch.tensor([1], dtype=torch.int32), r"rows must be int64 \[N\]"),
        (4, torch.tensor([4]), r"rows must lie in \[0, 4\)"),
        (4, torch.tensor([-1]), r"rows must lie in \[0, 4\)"),
        (5, torch.ones(2, 3), r"grad \[N, D\]"),
        (5, torch.ones(1, 3).half(), "in param's dtype"),
    ):
        arguments = [*tensors[:place], wrong, *tensors[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 0.1, 0.9, 0.99, 1e-8)
