# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers."""

from lean_kernels.nn.block_sparse_linear import BlockSparseLinear
from lean_kernels.nn.lean_encoder import LeanEncoder

__all__ = ["BlockSparseLinear", "LeanEncoder"]
