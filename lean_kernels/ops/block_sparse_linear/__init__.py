# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.block_sparse_linear.op import block_sparse_linear

__all__ = ["block_sparse_linear"]
