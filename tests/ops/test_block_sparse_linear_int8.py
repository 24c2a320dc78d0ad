# SPDX-License-Identifier: Apache-2.0
"""int8 weights: rounding, the kernels against exact sums, determinism, gradients, errors."""

from dataclasses import replace

import pytest
import torch
from problems import (
    ACTIVATIONS,
    HALVES,
    IMPLS,
    Problem,
    assert_accurate,
    error,
    needs_cpu_kernels,
    problem,
    same_bits,
)

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr, int8

BLOCKS = [(32, 32), (16, 16), (64, 64), (128, 128), (16, 64), (64, 16), (48, 24), (16, 4)]


def quantised(p: Problem) -> tuple:
    """The int8 matrix of a problem: weight, crow_indices, col_indices and the scales."""
    weight, crow, col = p.matrix
    packed, scales = int8.quantise(weight, crow, p.out_features)
    return packed, crow, col, scales


def run(p: Problem, impl=None, *, activation=None, bias=True, residual=True):
    weight, crow, col, scales = quantised(p)
    return block_sparse_linear(
        p.x, weight, crow, col, p.bias if bias else None, out_features=p.out_features,
        activation=activation, residual=p.residual if residual else None, weight_scales=scales,
        impl=impl,
    )  # fmt: skip


def exact(p: Problem, activation=None):
    """What the rounded factors make, in float64."""
    weight, crow, col, scales = quantised(p)
    q, row_scales = int8.quantise_rows(p.x)
    x = q.double() * row_scales.double()
    blocks = int8.dequantise(weight, scales.double(), crow, torch.float64)
    wide = replace(
        p, x=x, matrix=(blocks, crow, col), bias=p.bias.double(), residual=p.residual.double()
    )
    return wide.exact(activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_sizes(impl, block, dtype):
    for rows, out_features, in_features in ((1, 130, 70), (37, 70, 130), (150, 256, 128)):
        p = problem(rows, out_features, in_features, block, dtype)
        wanted = exact(p)
        assert_accurate(run(p, impl), wanted, wanted.to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_activations(impl, activation):
    p = problem((2, 13), 100, 90, (32, 32))
    assert error(run(p, impl, activation=activation), exact(p, activation)) <= 1e-6


@pytest.mark.parametrize("block", BLOCKS[:3], ids=str)
def test_rounding_costs_a_hundredth(block):
    p = problem(64, 256, 512, block)
    assert error(run(p), p.exact()) < 0.015


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_packing_is_undone(block):
    weight = torch.randint(-128, 128, (7, *block), dtype=torch.int8)
    assert torch.equal(int8.unpack(int8.pack(weight)), weight)
    assert int8.block_shape(int8.pack(weight)) == block


def test_a_weight_comes_back_within_half_a_step():
    weight, crow, _ = problem(1, 100, 90, (32, 32)).matrix
    packed, scales = int8.quantise(weight, crow, 100)
    back = int8.dequantise(packed, scales, crow, torch.float32)
    rows = bsr.row_indices(crow, len(weight))
    steps = torch.nn.functional.pad(scales, (0, 28), value=1.0).view(-1, 32)[rows]
    assert bool(((back - weight).abs() <= 0.5001 * steps.unsqueeze(2)).all())
    assert int8.unpack(packed).abs().amax() == 127


@needs_cpu_kernels
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_same_bits_in_any_batch_and_on_any_number_of_threads(block):
    p = problem(150, 256, 270, block)
    whole = run(p, "cpu", activation="gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert same_bits(run(p, "cpu", activation="gelu"), whole)
    finally:
        torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(3, 5), slice(100, 117)):
        part = replace(p, x=p.x[rows], residual=p.residual[rows])
        assert same_bits(run(part, "cpu", activation="gelu"), whole[rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_not_finite_spoils_itself_alone(impl):
    p = problem(9, 64, 64, (32, 32))
    clean = run(p, impl)
    p.x[2, 5], p.x[4, 63] = torch.nan, torch.inf
    spoilt = run(p, impl)
    bad = torch.tensor([2, 4])
    assert bool(spoilt[bad].isnan().all())
    good = [i for i in range(9) if i not in (2, 4)]
    assert same_bits(spoilt[good], clean[good])


@pytest.mark.parametrize("impl", IMPLS)
def test_extremes_of_int8_do_not_overflow(impl):
    weight = torch.full((1024, 16, 64), -128, dtype=torch.int8)
    crow, col = torch.tensor([0, 1024], dtype=torch.int32), torch.arange(1024, dtype=torch.int32)
    x = torch.full((3, 1 << 16), -2.0)
    y = block_sparse_linear(
        x, int8.pack(weight), crow, col, out_features=16, weight_scales=torch.ones(16), impl=impl
    )
    assert error(y, torch.full((3, 16), 128.0 * 2.0 * (1 << 16), dtype=torch.float64)) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_empty_inputs(impl):
    p = problem(4, 64, 64, (32, 32))
    p.x.zero_()
    assert same_bits(run(p, impl, residual=False), p.bias.expand(4, 64))
    none = replace(p, x=p.x[:0], residual=p.residual[:0])
    assert run(none, impl).shape == (0, 64)


def test_the_gradient_is_that_of_the_rounded_weight():
    p = problem(11, 96, 64, (32, 32))
    weight, crow, col, scales = quantised(p)
    x = p.x.clone().requires_grad_()
    bias = p.bias.clone().requires_grad_()
    y = block_sparse_linear(
        x, weight, crow, col, bias, out_features=96, residual=p.residual, weight_scales=scales
    )
    y.backward(p.grad)
    dense = bsr.to_dense(int8.dequantise(weight, scales, crow, torch.float32), crow, col, 96, 64)
    torch.testing.assert_close(x.grad, p.grad @ dense)
    torch.testing.assert_close(bias.grad, p.grad.sum(0))


def test_opcheck():
    p = problem(5, 64, 64, (32, 32))
    weight, crow, col, scales = quantised(p)
    torch.library.opcheck(
        torch.ops.lean_kernels.block_sparse_linear_int8.default,
        (p.x, weight, scales, crow, col, p.bias, p.residual, 64, 2),
    )


@pytest.mark.parametrize(
    "change, problem_named",
    [
        ({"weight_scales": None}, "weight_scales must be float32"),
        ({"weight_scales": torch.ones(64, dtype=torch.float64)}, "weight_scales must be float32"),
        ({"weight_scales": torch.ones(63)}, "weight_scales must be float32"),
        ({"weight": torch.zeros(4, 32, 32, dtype=torch.int8)}, "must be .nnz, block_in / 4"),
        ({"weight": torch.zeros(4, 8, 24, 4, dtype=torch.int8)}, "a multiple of 16 outputs"),
        ({"weight": torch.zeros(4, 32, 32)}, "weight_scales go with an int8 weight"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "int8 takes x in one of"),
    ],
    ids=lambda value: "",
)
def test_errors(change, problem_named):
    arguments = {
        "x": torch.zeros(2, 64),
        "weight": torch.zeros(4, 8, 32, 4, dtype=torch.int8),
        "crow_indices": torch.tensor([0, 2, 4], dtype=torch.int32),
        "col_indices": torch.tensor([0, 1, 0, 1], dtype=torch.int32),
        "weight_scales": torch.ones(64),
    }
    with pytest.raises(ValueError, match=problem_named):
        block_sparse_linear(**arguments | change, out_features=64)


def test_columns_out_of_range_are_refused():
    weight = torch.zeros(1, 8, 32, 4, dtype=torch.int8)
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="col_indices must lie in"):
        block_sparse_linear(
            torch.zeros(2, 64), weight, crow, col, out_features=32, weight_scales=torch.ones(32)
        )
