# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers."""

from lean_kernels.nn.block_sparse_linear import BlockSparseLinear
from lean_kernels.nn.lean_embeddings import LeanEmbeddings
from lean_kernels.nn.lean_encoder import LeanEncoder
from lean_kernels.nn.low_rank_embedding import AutoencoderEmbedding, LowRankEmbedding
from lean_kernels.nn.morphte_embedding import MorphTEEmbedding
from lean_kernels.nn.ngram_classifier import NGramClassifier
from lean_kernels.nn.ngram_embedding_bag import NGramEmbeddingBag
from lean_kernels.nn.ngram_vocabulary import NGramVocabulary
from lean_kernels.nn.tensor_train_embedding import TensorTrainEmbedding

__all__ = [
    "AutoencoderEmbedding",
    "BlockSparseLinear",
    "LeanEmbeddings",
    "LeanEncoder",
    "LowRankEmbedding",
    "MorphTEEmbedding",
    "NGramClassifier",
    "NGramEmbeddingBag",
    "NGramVocabulary",
    "TensorTrainEmbedding",
]
