# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.low_rank_embedding.op import low_rank_embedding

__all__ = ["low_rank_embedding"]
