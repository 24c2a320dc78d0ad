# SPDX-License-Identifier: Apache-2.0
from lean_kernels.ops.ngram_embedding_bag.op import ngram_embedding_bag

__all__ = ["ngram_embedding_bag"]
