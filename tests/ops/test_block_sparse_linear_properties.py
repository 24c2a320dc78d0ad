# SPDX-License-Identifier: Apache-2.0
"""block_sparse_linear on shapes, patterns and strides that hypothesis picks.

Errors are bounded element by element: with few elements a relative norm would mean little.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import ACTIVATIONS, DTYPES, IMPLS, needs_cpu_kernels, problem, same_bits

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr, reference

sizes = st.integers(1, 80)
block_sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 32, 33, 48, 64])
bounded = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.differing_executors]
)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.nn.functional.pad(t, (3, 2), value=torch.nan)[..., 3:-2],
    "stepped": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "every second": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "repeated": lambda t: t[:1].expand_as(t),
}
layouts = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.get)


@st.composite
def problems(draw):
    out_features, in_features = draw(sizes), draw(sizes)
    block = draw(block_sizes), draw(block_sizes)
    rows, cols = bsr.grid(out_features, in_features, block)
    cells = draw(st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1))))
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if draw(st.booleans()):  # dense but for these
        mask = ~mask
    for cell in cells:
        mask[cell] = ~mask[cell]
    dtype = draw(st.sampled_from(DTYPES))
    p = problem(draw(st.integers(0, 40)), out_features, in_features, block, dtype, mask=mask)
    weight, *indices = p.matrix
    p.matrix = (draw(st.sampled_from([weight.contiguous(), weight.mT.contiguous().mT])), *indices)
    p.x, p.residual, p.grad = (draw(layouts)(t) for t in (p.x, p.residual, p.grad))
    return p


def assert_within(result, exact, magnitude, terms):
    """`magnitude` is the sum of the absolute values of the `terms` added up."""
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    limit = 2 * (terms + 4) * torch.finfo(wide).eps * magnitude + 1e-30
    if result.dtype != torch.float64:
        limit = limit + 2e-6 * magnitude.clamp(max=10)  # activations: absolute error
    limit = limit + torch.finfo(result.dtype).eps * exact.abs() + torch.finfo(result.dtype).tiny
    assert result.shape == exact.shape
    assert bool(((result.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("impl", IMPLS)
@bounded
@given(
    p=problems(), activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), added=st.booleans()
)
def test_forward(impl, p, activation, bias, added):
    result = p.run(impl, bias=bias, residual=added, activation=activation)
    exact = p.exact(bias=bias, residual=added, activation=activation)
    magnitude = p.x.double().abs() @ p.dense.double().abs().mT
    magnitude = magnitude + (p.bias.double().abs() if bias else 0)
    magnitude = magnitude + (p.residual.double().abs() if added else 0)
    assert result.dtype == p.x.dtype
    assert_within(result, exact, magnitude, p.x.shape[-1])


@pytest.mark.parametrize("impl", IMPLS)
@bounded
@given(p=problems())
def test_gradients(impl, p):
    weight, *indices = p.matrix
    x, weight = p.x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = block_sparse_linear(x, weight, *indices, out_features=p.out_features, impl=impl)
    dx, dw = torch.autograd.grad(y, (x, weight), p.grad)
    grad, wide_x, wide_w = (t.detach().double() for t in (p.grad, x, weight))
    exact_dx = reference.grad_input(grad, wide_w, *indices, x.shape[-1])
    bound_dx = reference.grad_input(grad.abs(), wide_w.abs(), *indices, x.shape[-1])
    assert_within(dx, exact_dx, bound_dx, p.out_features)
    block = tuple(weight.shape[1:])
    exact_dw = reference.grad_weight(grad, wide_x, *indices, *block)
    bound_dw = reference.grad_weight(grad.abs(), wide_x.abs(), *indices, *block)
    assert_within(dw, exact_dw, bound_dw, len(x))


@needs_cpu_kernels
@bounded
@given(p=problems(), picks=st.lists(st.integers(0, 39), max_size=8))
def test_strides_and_batches_leave_no_trace_in_the_bits(p, picks):
    whole = p.run("cpu", activation="silu")
    rows = [row for row in picks if row < len(p.x)]
    p.x, p.residual = p.x[rows].contiguous(), p.residual[rows].contiguous()
    weight, *indices = p.matrix
    p.matrix = (weight.mT.contiguous().mT, *indices)
    assert same_bits(p.run("cpu", activation="silu"), whole[rows])


@bounded
@given(p=problems())
def test_what_from_dense_makes_is_valid_and_whole(p):
    weight, *indices = p.matrix
    in_features = p.x.shape[-1]
    bsr.validate(weight, *indices, p.out_features, in_features)
    again = bsr.gather_blocks(p.dense, *indices, tuple(weight.shape[1:]))
    assert torch.equal(again, weight)
