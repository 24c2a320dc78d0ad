# SPDX-License-Identifier: Apache-2.0
"""Forward numerics of block_sparse_linear: every implementation against float64."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    ACTIVATIONS,
    BLOCKS,
    DTYPES,
    FEW_BLOCKS,
    HALVES,
    IMPLS,
    assert_accurate,
    error,
    needs_cpu_kernels,
    problem,
    same_bits,
)

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr, reference

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def check(p, impl, **options):
    options.setdefault("activation", None)
    result = p.run(impl, **options)
    assert result.dtype == p.x.dtype
    assert result.is_contiguous()
    assert_accurate(result, p.exact(**options), p.torch_dense(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7, 33), (7, 100, 257), (33, 257, 100), (100, 33, 1)])
def test_sizes(impl, sizes, block, dtype):
    check(problem(*sizes, block, dtype), impl, bias=False, residual=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(impl, activation, block, dtype):
    p = problem(29, 75, 70, block, dtype)
    for bias, residual in ((False, False), (True, False), (False, True), (True, True)):
        check(p, impl, activation=activation, bias=bias, residual=residual)


@pytest.mark.parametrize("tokens", [*range(1, 15), 24, 25, 71, 72, 73, 144, 145, 300])
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_every_height_of_panel(impl, block, tokens):
    check(problem(tokens, 70, 66, block), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(32, 32), (16, 64), (4, 16), (1, 16)], ids=str)
@pytest.mark.parametrize("in_features", [1000, 4096])
def test_long_sums(impl, in_features, block, dtype):
    full = torch.ones(bsr.grid(64, in_features, block), dtype=torch.bool)
    p = problem(16, 64, in_features, block, dtype, mask=full)
    check(p, impl)
    check(p, impl, bias=False, residual=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 16), (4, 16), (32, 32), (32, 31)], ids=str)
def test_more_than_one_pass_over_the_weights(impl, block, dtype):
    check(problem(150, 600, 1100, block, dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_without_blocks_bias_and_activation_remain(impl, block, dtype):
    empty = torch.zeros(bsr.grid(70, 50, block), dtype=torch.bool)
    p = problem(9, 70, 50, block, dtype, mask=empty)
    check(p, impl, activation="gelu")
    assert not p.run(impl, bias=False, residual=False).any()
    expected = F.relu(p.bias).expand(9, -1)
    assert torch.equal(p.run(impl, residual=False, activation="relu"), expected)


@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 0, 2), (1, 1, 1), (2, 3, 4)], ids=str)
def test_leading_dimensions(impl, lead, block):
    p = problem(lead, 70, 50, block)
    check(p, impl, activation="silu")
    assert p.run(impl).shape == (*lead, 70)


def _layouts(t):
    """The same numbers [a, b, c] in other memory: name -> view."""
    a, b, c = t.shape
    wider = torch.full((a, 2 * b, c + 5), torch.nan, dtype=t.dtype)
    wider[:, ::2, 3:-2] = t
    offset = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    offset[1:] = t.flatten()
    return {
        "sliced": wider[:, ::2, 3:-2],
        "transposed": t.mT.contiguous().mT,
        "permuted": t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "flipped": t.flip(0, 2).flip(0, 2),
        "offset": offset[1:].view(a, b, c),
        "stepped": torch.stack((t, t), dim=-1)[..., 1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_strides_of_x_and_residual(impl, block, dtype):
    p = problem((2, 9, 1), 37, 50, block, dtype)
    x, residual = p.x.squeeze(2), p.residual.squeeze(2)
    p.x, p.residual = x, residual
    expected = p.run(impl, activation="gelu")
    residuals = _layouts(residual)

    def agree(result, exact):  # only the kernels promise bits: MKL picks its sums by layout
        if impl == "cpu":
            return same_bits(result, exact)
        return error(result, exact.double()) <= torch.finfo(dtype).eps

    for name, view in _layouts(x).items():
        p.x, p.residual = view, residuals[name]
        assert agree(p.run(impl, activation="gelu"), expected), name
        for row in (0, 1):  # two dimensions: strides that need no copy
            p.x, p.residual = view[row], residuals[name][row]
            assert agree(p.run(impl, activation="gelu"), expected[row]), name


@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_expanded_inputs(impl, block):
    p = problem(1, 37, 50, block)
    p.x, p.residual = p.x.expand(8, 50), p.residual.expand(8, 37)
    check(p, impl)
    p.x, p.residual = torch.ones(1, 1).expand(8, 50), torch.ones(1, 1).expand(8, 37)
    check(p, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_memory_order_of_the_weight(impl, block, dtype):
    p = problem(19, 70, 90, block, dtype)
    weight, *indices = p.matrix
    expected = p.run(impl)
    every_second = torch.full((2 * weight.shape[0], *weight.shape[1:]), torch.nan, dtype=dtype)
    every_second[::2] = weight
    for view in (
        weight.contiguous(),
        weight.mT.contiguous().mT,
        every_second[::2],
        torch.stack((weight,) * 2, -1)[..., 0],
    ):
        p.matrix = (view, *indices)
        assert same_bits(p.run(impl), expected)
    p.matrix = (weight[:1].expand_as(weight), *indices)
    check(p, impl)


@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_indices_and_bias_need_not_be_contiguous(impl, block):
    p = problem(19, 70, 90, block)
    expected = p.run(impl)
    p.bias = torch.stack((p.bias, p.bias), 1)[:, 0]
    weight, *indices = p.matrix
    p.matrix = (weight, *(torch.stack((i, i), 1)[:, 0] for i in indices))
    assert same_bits(p.run(impl), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_every_output_is_written(impl, block, dtype):
    p = problem(50, 70, 66, block, dtype)
    results = []
    for poison in (torch.nan, 1.0):
        junk = [torch.full((50, 70), poison, dtype=dtype) for _ in range(4)]
        del junk  # the next tensor of this size very likely gets this memory
        results.append(p.run(impl))
    assert same_bits(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_spread_as_in_dense_torch(impl, activation, block, dtype):
    full = torch.ones(bsr.grid(40, 50, block), dtype=torch.bool)
    p = problem(12, 40, 50, block, dtype, mask=full)
    p.x[0, 3], p.x[1, 4], p.x[2, 5] = torch.nan, torch.inf, -torch.inf
    p.bias[0], p.bias[1], p.bias[2] = torch.nan, torch.inf, -torch.inf
    p.residual[7, 7], p.residual[8, 8] = torch.nan, torch.inf
    result = p.run(impl, activation=activation)
    expected = p.torch_dense(activation=activation)
    if activation == "gelu":
        # torch's own gelu of infinity is NaN with AVX-512 and infinity without.
        infinite = p.torch_dense(residual=False) == torch.inf
        if impl == "cpu":
            assert bool((result[infinite] == torch.inf).all())
        result, expected = (t.masked_fill(infinite, 0) for t in (result, expected))
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result == torch.inf, expected == torch.inf)
    assert torch.equal(result == -torch.inf, expected == -torch.inf)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_from_end_to_end_of_the_range(impl, activation):
    magnitudes = torch.logspace(-45, 38, 4001, dtype=torch.float64)
    fine = torch.linspace(-100, 100, 20001, dtype=torch.float64)
    for dtype in DTYPES:
        z = torch.cat((-magnitudes, magnitudes, fine)).to(dtype)
        z = z[z.isfinite()]
        weight = torch.zeros(1, 16, 1, dtype=dtype)
        weight[0, 5] = 1
        indices = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32))
        result = block_sparse_linear(
            z[:, None], weight, *indices, out_features=16, activation=activation, impl=impl
        )[:, 5]
        exact = reference.ACTIVATIONS[activation](z.double())
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-6)
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        # near -5 the true value is the small difference of large ones: that error is absolute
        limit = 1e-6 * z.double().abs().clamp(max=10) + rounding * exact.abs() + smallest
        wrong = ((result.double() - exact).abs() > limit).nonzero()
        assert not len(wrong), z[wrong[:5]]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("block", [(16, 1), (4, 1), (1, 1)], ids=str)
def test_every_half_widens_and_narrows_as_in_torch(impl, block, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    indices = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32))
    for factor in (1.0, 0.3, 3e-5, 2000.0):
        weight = torch.full((1, *block), factor, dtype=dtype)
        expected = (shuffled.float() * weight[0, 0].float()).to(dtype)
        result = block_sparse_linear(
            shuffled[:, None], weight, *indices, out_features=block[0], impl=impl
        )[:, 0]
        number = ~expected.isnan()
        assert torch.equal(result.isnan(), ~number)
        # equal as numbers: a sum that starts from +0 has no -0
        assert torch.equal(result[number], expected[number])


@needs_cpu_kernels
def test_rows_and_dropped_blocks_do_not_mix(impl):
    if impl != "cpu":
        pytest.skip("the reference multiplies dropped blocks as zeros")
    for block in FEW_BLOCKS:
        mask = torch.zeros(bsr.grid(64, 64, block), dtype=torch.bool)
        mask[:, 0] = mask[0] = True
        p = problem(20, 64, 64, block, mask=mask)
        expected = p.run(impl)
        p.x[3] = torch.nan
        p.x[5, -1] = torch.inf
        result = p.run(impl)
        others = [row for row in range(20) if row not in (3, 5)]
        assert same_bits(result[others], expected[others])
        assert result[3].isnan().all()
        assert not result[5, : block[0]].isfinite().any()
        assert same_bits(result[5, block[0] :], expected[5, block[0] :])


def test_errors_measured_are_not_all_zero(impl):
    """`error` sees a change in the last bits of one element."""
    p = problem(8, 64, 64, (32, 32))
    result = p.run(impl).double()
    before = error(result, p.exact())
    result[0, 0] *= 1 + 1e-4
    assert error(result, p.exact()) > before
