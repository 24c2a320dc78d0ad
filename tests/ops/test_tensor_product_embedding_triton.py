# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of tensor_product_embedding, on a GPU or, by test_triton_interpreter.py, on
the CPU."""

from dataclasses import replace

import pytest
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    guarded_empty,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

from problems import error  # noqa: E402
from test_tensor_product_embedding import Problem, problem, upstream  # noqa: E402

from lean_kernels.ops.tensor_product_embedding import triton as kernels  # noqa: E402

# (order, q, D, rank)
SHAPES = [(2, 4, 13, 3), (3, 3, 27, 2), (4, 2, 11, 1), (3, 4, 64, 2)]
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2e-3}
EVERY = ["ids", "morphemes", "factors", "tables", "table_ids", "weight", "bias"]


def moved(p: Problem) -> Problem:
    def to(value):
        return tuple(map(to, value)) if isinstance(value, tuple) else value.to(DEVICE)

    return replace(p, **{name: to(getattr(p, name)) for name in EVERY})


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, dtype):
    for added, norm in ((0, None), (1, "layer"), (2, "rms")):
        p = moved(problem(shape, torch.tensor([[3, 0], [49, 3]]), dtype, added, norm))
        y = p.run("triton")
        assert y.dtype == dtype and error(y, p.to(torch.float64).dense()) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, monkeypatch):
    """Sums within a block, into the next, over several, and of padding."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    ids = torch.tensor([7, 1, 7, 7, 2, 3, 7, 7, 3, 7, 7])
    for added, norm in ((1, "layer"), (0, None)):
        p = moved(problem(shape, ids, dtype, added, norm, padding_idx=3))
        grad = upstream(p).to(dtype).to(DEVICE)
        ours = p.grads(lambda q: q.run("triton"), grad)
        right = p.to(torch.float64).grads(Problem.dense, grad)
        for a, b in zip(ours, right, strict=True):
            assert a.dtype == dtype and error(a, b) <= LIMITS[dtype]


def test_a_gradient_of_rms_norm_and_two_tables():
    p = moved(problem((2, 3, 8, 2), torch.tensor([1, 4, 1]), torch.float64, 2, "rms"))
    grad = upstream(p).to(DEVICE)
    for a, b in zip(
        p.grads(lambda q: q.run("triton"), grad), p.grads(Problem.dense, grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_what_is_out_of_bounds_gives_nan_and_no_gradient():
    p = moved(problem((3, 2, 7, 2), torch.tensor([0, 1, 2, 3, 4, 5]), added=1, norm="layer"))
    broken = replace(p, ids=p.ids.clone(), morphemes=p.morphemes.clone(),
                     table_ids=(p.table_ids[0].clone(),))  # fmt: skip
    broken.ids[0], broken.ids[1] = -1, 2**40
    broken.morphemes[2, 1], broken.table_ids[0][3] = 40, 5
    y, *grads = broken.grads(lambda q: q.run("triton"), upstream(p).to(DEVICE))
    assert y[:4].isnan().all()
    few = replace(p, ids=p.ids[4:], table_ids=(p.table_ids[0][4:],))
    expected = few.grads(Problem.dense, upstream(p)[4:].to(DEVICE))
    torch.testing.assert_close(y[4:], expected[0])
    for a, b in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_ids_and_rows_too_wide():
    p = moved(problem((3, 2, 7, 2), torch.zeros(0, dtype=torch.long), norm="layer"))
    y, *grads = p.grads(lambda q: q.run("triton"), upstream(p).to(DEVICE))
    assert y.shape == (0, 7) and all((grad == 0).all() for grad in grads)
    with pytest.raises(ValueError, match=r"at most 16384 numbers, .* padded to 32, got 32768"):
        moved(problem((3, 17, 7, 2), 3)).run("triton")
