# SPDX-License-Identifier: Apache-2.0
"""Word, position and token-type embeddings with their LayerNorm, as one op."""

import torch
from torch import Tensor, nn

from lean_kernels.nn.low_rank_embedding import LowRankEmbedding
from lean_kernels.ops._row_norm import RowNorm


class LeanEmbeddings(nn.Module):
    """dropout(LayerNorm(word + token type + position)), made row by row in one call.

    Takes over the modules of an embeddings block that names and calls them as transformers'
    BertEmbeddings does; parameters keep their names, and `forward` its arguments.

    Args:
        embeddings: a module with `word_embeddings` (a LowRankEmbedding or AutoencoderEmbedding),
            `position_embeddings` and `token_type_embeddings` (nn.Embedding, without max_norm),
            `LayerNorm`, `dropout` and the buffer `position_ids` [1, positions].

    Raises:
        ValueError: it lacks one of these, or one is of another kind.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        kinds = {
            "word_embeddings": LowRankEmbedding,
            "position_embeddings": nn.Embedding,
            "token_type_embeddings": nn.Embedding,
            "LayerNorm": nn.LayerNorm,
            "dropout": nn.Dropout,
            "position_ids": Tensor,
        }
        for name, kind in kinds.items():
            part = getattr(embeddings, name, None)
            if not isinstance(part, kind) or getattr(part, "max_norm", None) is not None:
                raise ValueError(
                    f"LeanEmbeddings: {type(embeddings).__name__}.{name} must be a "
                    f"{kind.__name__} (without max_norm), got {type(part).__name__}"
                )
            if kind is Tensor:
                self.register_buffer(name, part, persistent=False)
            else:
                setattr(self, name, part)
        self.train(embeddings.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """input_ids int [B, L], or inputs_embeds [B, L, D] in their place -> [B, L, D]."""
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]
        if position_ids is None:
            first = past_key_values_length
            position_ids = self.position_ids[:, first : first + shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        words, types = self.word_embeddings, self.token_type_embeddings
        positions, norm, dropout = self.position_embeddings, self.LayerNorm, self.dropout
        if inputs_embeds is not None:
            rows = norm(inputs_embeds + types(token_type_ids) + positions(position_ids))
            return dropout(rows)
        rows = words.fused(
            input_ids,
            words.padding_idx,
            ((token_type_ids, types.weight), (position_ids, positions.weight)),
            RowNorm("layer", norm.weight, norm.bias, norm.eps),
        )
        return dropout(rows) if dropout.training else rows
