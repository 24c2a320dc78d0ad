# SPDX-License-Identifier: Apache-2.0
"""Functional ops. Each lives in a folder of its own, with its reference beside its kernels."""

from lean_kernels.ops.add_layer_norm import add_layer_norm
from lean_kernels.ops.block_sparse_linear import block_sparse_linear
from lean_kernels.ops.lazy_adam import lazy_adam_
from lean_kernels.ops.low_rank_embedding import low_rank_embedding
from lean_kernels.ops.ngram_embedding_bag import ngram_embedding_bag
from lean_kernels.ops.ngram_lookup import ngram_lookup, ngram_slots
from lean_kernels.ops.ragged_attention import ragged_attention
from lean_kernels.ops.tensor_product_embedding import tensor_product_embedding
from lean_kernels.ops.tensor_train_embedding import tensor_train_embedding
from lean_kernels.ops.token_selection import (
    Threshold,
    compact_tokens,
    gather_tokens,
    scatter_tokens,
    select_tokens,
)

__all__ = [
    "Threshold",
    "add_layer_norm",
    "block_sparse_linear",
    "compact_tokens",
    "gather_tokens",
    "lazy_adam_",
    "low_rank_embedding",
    "ngram_embedding_bag",
    "ngram_lookup",
    "ngram_slots",
    "ragged_attention",
    "scatter_tokens",
    "select_tokens",
    "tensor_product_embedding",
    "tensor_train_embedding",
]
