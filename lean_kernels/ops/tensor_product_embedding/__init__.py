# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.tensor_product_embedding.op import tensor_product_embedding

__all__ = ["tensor_product_embedding"]
