# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ngram_embedding_bag, on a GPU or, by test_triton_interpreter.py, on CPU."""

import pytest
import torch
from bags import assert_close, bags
from interpreted import DEVICE, guarded_empty, quick_device_functions, skip_where_nothing_runs

skip_where_nothing_runs()

from dataclasses import replace  # noqa: E402

from lean_kernels.ops import ngram_embedding_bag  # noqa: E402
from lean_kernels.ops.ngram_embedding_bag import triton as kernels  # noqa: E402

__all__ = ["guarded_empty", "quick_device_functions"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int8]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)


def moved(problem):
    tensors = ("ids", "offsets", "table", "weights", "scales")
    there = {n: getattr(problem, n) for n in tensors if getattr(problem, n) is not None}
    return replace(problem, **{name: tensor.to(DEVICE) for name, tensor in there.items()})


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, mode):
    for features, weighted, padding, index in (
        (33, True, 2, torch.int32),
        (1, False, None, torch.int64),
        (300, True, None, torch.int64),
    ):
        problem = moved(
            bags(
                features=features, dtype=dtype, weighted=weighted, padding_idx=padding, index=index
            )
        )
        result = problem.run(mode, impl="triton")
        assert result.dtype == (torch.float32 if dtype == torch.int8 else dtype)
        assert_close(result, problem.exact(mode), dtype)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_gradients(monkeypatch, dtype, mode, sparse):
    monkeypatch.setattr(kernels, "PIECE", 8)  # rows of one piece, of several, of a full last one
    problem = moved(bags((20, 0, 1, 40, 7), rows=6, dtype=dtype, weighted=True, padding_idx=4))
    grads = []
    for impl in ("reference", "triton"):
        leaf = problem.table.clone().requires_grad_()
        weights = problem.weights.clone().requires_grad_()
        y = replace(problem, table=leaf, weights=weights).run(mode, sparse=sparse, impl=impl)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads.append(torch.autograd.grad(y, (leaf, weights), grad))
    for expected, actual in zip(*grads, strict=True):
        if sparse and actual.is_sparse:
            assert torch.equal(expected.indices(), actual.indices())
            expected, actual = expected.to_dense(), actual.to_dense()
        assert_close(actual, expected, dtype)


def test_gradcheck():
    problem = moved(bags((5, 0, 3), rows=4, features=3, dtype=torch.float64, weighted=True))
    leaves = [problem.table.requires_grad_(), problem.weights.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda table, weights: replace(problem, table=table, weights=weights).run(impl="triton"),
        leaves,
    )


def test_strided_table_and_empty_input():
    problem = moved(bags(features=20))
    wide = torch.full((50, 50), torch.nan, device=DEVICE)
    wide[:, 1:41:2] = problem.table
    strided = replace(problem, table=wide[:, 1:41:2])
    assert_close(strided.run(impl="triton"), problem.exact(), torch.float32)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for offsets, shape in ((torch.zeros(1).int(), (0, 20)), (torch.zeros(4).int(), (3, 20))):
        table = problem.table.clone().requires_grad_()
        y = ngram_embedding_bag(none, offsets.to(DEVICE), table, impl="triton")
        assert y.shape == shape and not y.any()
        (grad,) = torch.autograd.grad(y.sum(), table)
        assert not grad.any()


def test_what_is_out_of_bounds_is_left_out():
    table = torch.ones(4, 5, device=DEVICE)
    ids = torch.tensor([0, -1, 4, 2**40, 3], device=DEVICE)
    offsets = torch.tensor([-7, 3, 99], device=DEVICE)
    table.requires_grad_()
    y = ngram_embedding_bag(ids, offsets, table, mode="sum", impl="triton")
    assert y.tolist() == [[1.0] * 5, [1.0] * 5]
    (grad,) = torch.autograd.grad(y.sum(), table)
    assert grad[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
