# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.tensor_train_embedding.op import tensor_train_embedding

__all__ = ["tensor_train_embedding"]
