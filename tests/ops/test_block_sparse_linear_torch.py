# SPDX-License-Identifier: Apache-2.0
"""block_sparse_linear inside torch: registration, compile, export, autocast, inference mode."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTIVATIONS,
    DTYPES,
    FEW_BLOCKS,
    IMPLS,
    error,
    needs_cpu_kernels,
    problem,
    same_bits,
)

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr

ops = torch.ops.lean_kernels


def leaves(p):
    return [t.detach().clone().requires_grad_() for t in (p.x, p.matrix[0], p.bias, p.residual)]


@pytest.mark.parametrize(
    ("lead", "block", "dtype"),
    [
        *product([(2, 3)], [(16, 16), (4, 16), (3, 5)], DTYPES),
        *product([(5,), (0,), ()], [(16, 16)], [torch.float32]),
    ],
    ids=str,
)
def test_opcheck(lead, block, dtype):
    p = problem(lead, 20, 18, block, dtype)
    forward = ops.block_sparse_linear.default
    for bias, residual, activation in ((None, None, 0), (p.bias, p.residual, 2)):
        torch.library.opcheck(forward, (p.x, *p.matrix, bias, residual, 20, activation))
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        x = p.x if needed[1] else None
        arguments = (p.grad, x, *p.matrix, 18, *needed)
        torch.library.opcheck(ops.block_sparse_linear_grad.default, arguments)


def check_compiled(backend, impl, activation):
    def function(x, weight, crow, col, bias, residual):
        y = block_sparse_linear(
            x * 2, weight, crow, col, bias, out_features=70, residual=residual,
            activation=activation, impl=impl,
        )  # fmt: skip
        return y.tanh()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (4, 7, 33):
        p = problem(tokens, 70, 50, (16, 32))
        results = []
        for run in (function, compiled):
            x, weight, bias, residual = inputs = leaves(p)
            y = run(x, weight, *p.matrix[1:], bias, residual)
            results.append((y, *torch.autograd.grad(y, inputs, p.grad)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
        with torch.no_grad():
            arguments = (p.x, *p.matrix, p.bias, p.residual)
            torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile_with_a_dynamic_batch(activation, impl):
    check_compiled("aot_eager", impl, activation)


def test_inductor_with_a_dynamic_batch():
    check_compiled("inductor", None, "gelu")


def test_compile_finds_shape_errors():
    p = problem(4, 70, 50, (16, 32))
    function = torch.compile(block_sparse_linear, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="bias must be"):
        function(p.x, *p.matrix, p.bias[:-1], out_features=70)


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_export_with_a_dynamic_batch(impl):
    class Model(torch.nn.Module):
        def forward(self, x, weight, crow, col, bias):
            return block_sparse_linear(
                x, weight, crow, col, bias, out_features=70, activation="gelu", impl=impl
            )

    p = problem(4, 70, 50, (16, 32))
    exported = torch.export.export(
        Model(),
        (p.x, *p.matrix, p.bias),
        dynamic_shapes=({0: torch.export.Dim("tokens")}, None, None, None, None),
    ).module()
    for tokens in (2, 9):
        p = problem(tokens, 70, 50, (16, 32))
        expected = p.run(impl, residual=False, activation="gelu")
        torch.testing.assert_close(exported(p.x, *p.matrix, p.bias), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, activation, impl):
    p = problem(9, 70, 50, (16, 32))
    dense = p.dense
    x, weight, bias, residual = inputs = leaves(p)
    with torch.autocast("cpu", dtype=dtype):
        y = block_sparse_linear(
            x, weight, *p.matrix[1:], bias, out_features=70, activation=activation,
            residual=residual, impl=impl,
        )  # fmt: skip
        expected = F.linear(x, dense, bias).dtype
    assert y.dtype == expected == dtype
    assert error(y, p.exact(activation=activation)) < 0.02
    grads = torch.autograd.grad(y, inputs, p.grad.to(dtype))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone_as_dense_torch_does(impl):
    p = problem(9, 70, 50, (16, 32), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(p.x, p.dense).dtype == torch.float64
        assert same_bits(p.run(impl), p.run(impl))
        assert p.run(impl).dtype == torch.float64
        assert error(p.run(impl), p.exact()) < 1e-14


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_mode_and_no_grad_agree(impl):
    for block in FEW_BLOCKS:
        p = problem(9, 70, 50, block)
        with torch.inference_mode():
            first = p.run(impl, activation="gelu")
        p.matrix[0].requires_grad_()
        with torch.no_grad():
            assert same_bits(p.run(impl, activation="gelu"), first)


@needs_cpu_kernels
def test_the_best_impl_on_cpu_is_the_compiled_one():
    p = problem(64, 96, 2000, (16, 32))
    assert same_bits(p.run(), p.run("cpu"))
    assert not same_bits(p.run(), p.run("reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_negated_numbers(impl):
    """A lazily negated tensor arrives resolved."""
    p = problem(9, 70, 50, (16, 32))
    expected = p.run(impl, bias=False, residual=False)
    p.x = torch._neg_view(p.x)
    assert p.x.is_neg()
    assert torch.equal(p.run(impl, bias=False, residual=False), -expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_subclass_of_tensor_is_taken(impl):
    p = problem(9, 70, 50, (16, 32))
    expected = p.run(impl)
    p.matrix = (torch.nn.Parameter(p.matrix[0]), *p.matrix[1:])
    p.bias = torch.nn.Buffer(p.bias)
    assert same_bits(p.run(impl).detach(), expected)


def test_meta_tensors_give_shapes():
    p = problem((2, 3), 70, 50, (16, 32))
    y = block_sparse_linear(
        p.x.to("meta"), *(t.to("meta") for t in p.matrix), out_features=70, activation="relu"
    )
    assert y.is_meta
    assert y.shape == (2, 3, 70)


@needs_cpu_kernels
def test_the_pattern_functions_invert_each_other():
    for block in FEW_BLOCKS:
        p = problem(1, 70, 50, block)
        weight, crow, col = p.matrix
        bsr.validate(*p.matrix, 70, 50)
        mask = torch.zeros(bsr.grid(70, 50, block), dtype=torch.bool)
        mask[bsr.row_indices(crow, len(col)), col.long()] = True
        again = bsr.from_dense(p.dense, mask, block)
        assert all(torch.equal(*pair) for pair in zip(again, p.matrix, strict=True))
        assert torch.equal(bsr.gather_blocks(p.dense, crow, col, block), weight)
