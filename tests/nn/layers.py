# SPDX-License-Identifier: Apache-2.0
"""Small layers for the tests of this folder."""

import torch
from torch import nn

from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear import bsr

BLOCKS = [(32, 32), (16, 64), (4, 16), (1, 16), (20, 12)]


def linear_with_zero_blocks(block=(32, 32), in_features=90, out_features=70, **options):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, **options)
    mask = torch.rand(bsr.grid(out_features, in_features, block)) < 0.4
    mask[0, 0], mask[-1, -1], mask[1] = True, True, False
    wide = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    linear.weight.data *= wide[:out_features, :in_features]
    return linear, mask


def layer_of(block=(32, 32), activation=None, **options):
    linear, _ = linear_with_zero_blocks(block, **options)
    return BlockSparseLinear.from_linear(linear, block_shape=block, activation=activation)
