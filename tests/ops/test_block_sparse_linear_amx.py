# SPDX-License-Identifier: Apache-2.0
"""What only the AMX kernels can get wrong: tiles of any height, and the state they leave behind."""

import pytest
import torch
from torch.nn import functional as F

from lean_kernels import _extension
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops import block_sparse_linear
from tests.ops.problems import error

pytestmark = pytest.mark.skipif(
    _extension.cpu_isa() != "amx", reason="this processor, or this build, has no AMX"
)


def layer(in_features, out_features, block, dtype=torch.bfloat16):
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features, dtype=dtype)
    return BlockSparseLinear.from_linear(linear, block_shape=block, density=0.4)


@pytest.mark.parametrize(
    "block", [(32, 32), (16, 16), (64, 128), (48, 36), (16, 20), (16, 6), (32, 1)], ids=str
)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 100])
def test_every_height_and_depth_of_tiles(block, rows):
    sparse = layer(70, 100, block)
    x = torch.randn(rows, 70, dtype=torch.bfloat16)
    exact = F.linear(x.double(), sparse.to_linear().weight.double(), sparse.bias.double())
    dense = error(sparse.to_linear()(x), exact)
    assert error(sparse(x), exact) <= 2 * dense


def test_a_row_does_not_depend_on_the_batch():
    sparse = layer(200, 96, (32, 32))
    x = torch.randn(67, 200, dtype=torch.bfloat16)
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
