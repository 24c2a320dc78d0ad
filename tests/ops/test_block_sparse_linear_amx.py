# SPDX-License-Identifier: Apache-2.0
"""What only the AMX kernels can get wrong: tiles of any height, and the state they leave behind."""

import pytest
import torch
from torch.nn import functional as F

from lean_kernels import _extension
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops import block_sparse_linear
from tests.ops.problems import HALVES, error

pytestmark = pytest.mark.skipif(
    _extension.cpu_isa() != "amx", reason="this processor, or this build, has no AMX"
)


def layer(in_features, out_features, block, dtype=torch.bfloat16):
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features, dtype=dtype)
    return BlockSparseLinear.from_linear(linear, block_shape=block, density=0.4)


def exactly(sparse, x):
    return F.linear(x.double(), sparse.to_linear().weight.double(), sparse.bias.double())


@pytest.mark.parametrize(
    "block", [(32, 32), (16, 16), (64, 128), (48, 36), (16, 20), (16, 6), (32, 1)], ids=str
)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_height_and_depth_of_tiles(block, rows, dtype):
    sparse = layer(70, 100, block, dtype)
    x = torch.randn(rows, 70, dtype=dtype)
    exact, dense = exactly(sparse, x), sparse.to_linear()(x)
    assert error(sparse(x), exact) <= 2 * error(dense, exact)


@pytest.mark.parametrize("exponents", [(-24, -8), (-14, 0), (-2, 11)], ids=str)
@pytest.mark.parametrize("in_features", [64, 4096])
def test_float16_errs_as_dense_does_over_its_whole_range(in_features, exponents):
    """What AMX leaves out, 2^-18 of each product, is lost in the rounding of the result."""
    sparse = layer(in_features, 64, (32, 32), torch.float16)
    x = torch.randn(40, in_features) * torch.logspace(*exponents, in_features, base=2)
    x = x.half()
    exact, dense = exactly(sparse, x), sparse.to_linear()(x)
    assert error(sparse(x), exact) <= 1.05 * error(dense, exact)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_spoil_their_block_row_alone(value):
    sparse = layer(128, 96, (32, 32), torch.float16)
    x = torch.randn(20, 128, dtype=torch.float16)
    before = sparse(x)
    with torch.no_grad():
        sparse.weight[0, 3, 5] = value
    after, dense = sparse(x), sparse.to_linear()(x)
    assert torch.equal(after.isnan(), dense.isnan())
    assert torch.equal(after[:, 3].isfinite(), dense[:, 3].isfinite())
    assert torch.equal(after[:, 32:], before[:, 32:])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_does_not_depend_on_the_batch(dtype):
    sparse = layer(200, 96, (32, 32), dtype)
    x = torch.randn(67, 200, dtype=dtype)
    x[3, 7] = torch.inf
    whole = sparse(x)
    for row in (0, 16, 66):
        assert torch.equal(sparse(x[row : row + 1]), whole[row : row + 1])


def test_int8_sums_are_those_of_the_reference():
    sparse = layer(200, 96, (32, 40), torch.float32).to_int8()
    x = torch.randn(45, 200)
    slow = block_sparse_linear(
        x, sparse.weight, sparse.crow_indices, sparse.col_indices, sparse.bias,
        out_features=96, weight_scales=sparse.weight_scales, impl="reference",
    )  # fmt: skip
    assert error(sparse(x), slow.double()) <= 1e-6


def test_tile_registers_are_left_as_others_want_them():
    """oneDNN keeps a tile configuration of its own from call to call."""
    sparse, linear = layer(64, 64, (16, 16)), torch.nn.Linear(512, 512, dtype=torch.bfloat16)
    x, wide = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(256, 512).bfloat16()
    before = linear(wide), sparse(x)
    for _ in range(3):
        assert torch.equal(sparse(x), before[1])
        assert torch.equal(linear(wide), before[0])
