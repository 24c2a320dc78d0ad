# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.ragged_attention.op import ragged_attention

__all__ = ["ragged_attention"]
