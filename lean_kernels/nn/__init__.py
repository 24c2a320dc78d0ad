# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers."""

from lean_kernels.nn.block_sparse_linear import BlockSparseLinear

__all__ = ["BlockSparseLinear"]
