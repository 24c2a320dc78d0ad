# SPDX-License-Identifier: Apache-2.0
"""Gradients of block_sparse_linear against float64 autograd, and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTIVATIONS,
    BLOCKS,
    DTYPES,
    FEW_BLOCKS,
    IMPLS,
    assert_accurate,
    needs_cpu_kernels,
    problem,
    same_bits,
)

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr, reference

NAMES = ("x", "weight", "bias", "residual")


def leaves(p, dtype=None):
    tensors = (p.x, p.matrix[0], p.bias, p.residual)
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def gradients(p, impl, activation=None):
    x, weight, bias, residual = leaves(p)
    y = block_sparse_linear(
        x,
        weight,
        *p.matrix[1:],
        bias,
        out_features=p.out_features,
        activation=activation,
        residual=residual,
        impl=impl,
    )
    return torch.autograd.grad(y, (x, weight, bias, residual), p.grad)


def dense_gradients(p, dtype, activation=None):
    """By autograd through a dense linear: what is right in float64, what torch does in others."""
    x, weight, bias, residual = leaves(p, dtype)
    dense = bsr.to_dense(weight, *p.matrix[1:], p.out_features, x.shape[-1])
    y = reference.ACTIVATIONS[activation](F.linear(x, dense, bias)) + residual
    dx, ddense, db, dr = torch.autograd.grad(y, (x, dense, bias, residual), p.grad.to(dtype))
    return dx, bsr.gather_blocks(ddense, *p.matrix[1:], p.matrix[0].shape[1:]), db, dr


def check(p, impl, activation=None):
    exact = dense_gradients(p, torch.float64, activation)
    dense = dense_gradients(p, p.x.dtype, activation)
    for result, right, torchs in zip(gradients(p, impl, activation), exact, dense, strict=True):
        assert result.dtype == p.x.dtype
        assert_accurate(result, right, torchs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 33, 7), (7, 100, 257), (33, 257, 100), (300, 40, 50)])
def test_sizes(sizes, block, dtype, impl):
    check(problem(*sizes, block, dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, block, dtype, impl):
    check(problem(19, 75, 70, block, dtype), impl, activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_leading_dimensions(lead, block, impl):
    p = problem(lead, 70, 50, block)
    check(p, impl)
    if 0 in lead:
        assert not gradients(p, impl)[1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_without_blocks(block, impl):
    empty = torch.zeros(bsr.grid(70, 50, block), dtype=torch.bool)
    p = problem(9, 70, 50, block, mask=empty)
    check(p, impl)
    assert not gradients(p, impl)[0].any()


@needs_cpu_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_gradcheck(block, activation):
    p = problem(3, 21, 13, block, torch.float64)

    def function(x, weight, bias, residual):
        return block_sparse_linear(
            x,
            weight,
            *p.matrix[1:],
            bias,
            out_features=p.out_features,
            activation=activation,
            residual=residual,
            impl="cpu",
        )

    assert torch.autograd.gradcheck(function, leaves(p), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_is_asked_for(wanted, impl):
    p = problem(9, 70, 50, (32, 32))
    expected = dict(zip(NAMES, gradients(p, impl), strict=True))[wanted]
    tensors = [t.detach() for t in leaves(p)]
    tensors[NAMES.index(wanted)].requires_grad_()
    x, weight, bias, residual = tensors
    y = block_sparse_linear(
        x, weight, *p.matrix[1:], bias, out_features=70, residual=residual, impl=impl
    )
    y.backward(p.grad)
    assert same_bits(tensors[NAMES.index(wanted)].grad, expected)
    assert sum(t.grad is not None for t in tensors) == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_strides_of_grad_and_x(block, impl):
    p = problem((6, 4), 70, 50, block)
    p.x = p.x.transpose(0, 1).contiguous().transpose(0, 1)
    p.grad = p.grad.transpose(0, 2).contiguous().transpose(0, 2)
    check(p, impl)
    p.grad = torch.ones(1, 1, 1).expand(6, 4, 70)  # as sum().backward() gives
    check(p, impl)
    p.x = p.x[:1].expand(6, 4, 50)
    check(p, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_padding_gets_no_gradient(block, impl):
    p = problem(9, 70, 50, block, mask=torch.ones(bsr.grid(70, 50, block), dtype=torch.bool))
    dw = gradients(p, impl)[1]
    bsr.validate(dw, *p.matrix[1:], 70, 50)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_weight_lies_as_the_weight_does(impl):
    p = problem(9, 70, 50, (16, 32))
    assert gradients(p, impl)[1].stride() == p.matrix[0].stride()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    p = problem(3, 32, 32, (32, 32))
    x, weight, bias, _ = leaves(p)
    y = block_sparse_linear(x, weight, *p.matrix[1:], bias, out_features=32, impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_gradient_is_written(impl):
    for block in FEW_BLOCKS:
        p = problem(50, 70, 66, block)
        results = []
        for poison in (torch.nan, 1.0):
            junk = [torch.full_like(t, poison) for t in leaves(p) for _ in range(3)]
            del junk  # the next tensors of these sizes very likely get this memory
            results.append(gradients(p, impl))
        assert all(same_bits(*pair) for pair in zip(*results, strict=True))
