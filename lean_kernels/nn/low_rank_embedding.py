# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for nn.Embedding that keep a table as codes and a decoder."""

import torch
from torch import Tensor, nn

from lean_kernels.nn.compressed_embedding import CompressedEmbedding, TiledHead, table_of
from lean_kernels.ops._row_norm import check_ids
from lean_kernels.ops.low_rank_embedding import op
from lean_kernels.ops.low_rank_embedding.logits import low_rank_logits


class LowRankEmbedding(CompressedEmbedding):
    """Row i is codes[i] decoderᵀ: a truncated SVD, or the factorisation of ALBERT (1909.11942).

    State: parameters `codes` [num_embeddings, rank] and `decoder` [embedding_dim, rank]; with
    `int8`, `codes` is a buffer of int8 and so is `scales` [num_embeddings], float32, by which its
    rows are multiplied: they do not train.

    Args:
        num_embeddings, embedding_dim: as in nn.Embedding.
        rank: numbers per row.
        bias: a parameter `bias` [embedding_dim] is added to every row.
        activation: None, "relu", "gelu" or "elu" of what was decoded.
        int8: codes of one byte.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: see CompressedEmbedding;
            `sparse` holds for the gradient of codes.

    Raises:
        ValueError: an argument out of range, not known or not honoured.
    """

    HONOURS = frozenset({"scale_grad_by_freq", "sparse"})
    ACTIVATIONS = op.ACTIVATIONS

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        bias: bool = False,
        activation: str | None = None,
        int8: bool = False,
        device=None,
        dtype=None,
        **arguments,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **arguments)
        name = type(self).__name__
        if rank < 1:
            raise ValueError(f"{name}: rank must be positive, got {rank}")
        if activation not in self.ACTIVATIONS:
            raise ValueError(
                f"{name}: unknown activation {activation!r}; expected one of {self.ACTIVATIONS}"
            )
        self.rank = rank
        self.activation = activation
        options = {"device": device, "dtype": dtype}
        if int8:
            codes = torch.zeros(num_embeddings, rank, device=device, dtype=torch.int8)
            scales = torch.zeros(num_embeddings, device=device, dtype=torch.float32)
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)
        else:
            self.codes = nn.Parameter(torch.empty(num_embeddings, rank, **options))
            self.register_buffer("scales", None)
        self.decoder = nn.Parameter(torch.empty(embedding_dim, rank, **options))
        self.bias = nn.Parameter(torch.empty(embedding_dim, **options)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rows of independent normal numbers, as nn.Embedding's are; int8 codes stay."""
        if self.scales is None:
            self.codes.normal_()
        self.decoder.normal_(std=self.rank**-0.5)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        codes: Tensor,
        decoder: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        int8: bool = False,
        **arguments,
    ) -> "LowRankEmbedding":
        """The layer of given factors, copied; `int8` rounds the codes.

        Args:
            codes: [V, rank].
            decoder: [D, rank].
            bias: [D] or None.
        """
        layer = cls(
            len(codes),
            *decoder.shape,
            bias=bias is not None,
            activation=activation,
            int8=int8,
            device=decoder.device,
            dtype=decoder.dtype,
            **arguments,
        )
        if int8:
            codes, scales = quantize_rows(codes)
            layer.scales.copy_(scales)
        layer.codes.copy_(codes)
        layer.decoder.copy_(decoder)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, rank: int, *, int8: bool = False
    ) -> "LowRankEmbedding":
        """The best approximation of an nn.Embedding of that rank (truncated SVD).

        The embedding is left as it is; device, dtype, arguments and requires_grad carry over.
        """
        from lean_kernels.compress.embedding import fit_svd  # compress builds on this package

        weight, arguments = table_of(embedding, cls.__name__)
        return cls._like(embedding, fit_svd(weight, rank), int8=int8, **arguments)

    @classmethod
    def _like(cls, embedding: nn.Embedding, factors, **options) -> "LowRankEmbedding":
        layer = cls.from_factors(*factors, **options)
        return layer.requires_grad_(embedding.weight.requires_grad).train(embedding.training)

    def lookup(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        return self.fused(ids, padding_idx)

    def fused(self, ids: Tensor, padding_idx: int | None, added=(), norm=None) -> Tensor:
        """`lookup`, then what the op can do besides: see `lean_kernels.ops.low_rank_embedding`."""
        check_ids(type(self).__name__, "ids", ids, self.codes.device)
        options = padding_idx, self.scale_grad_by_freq, self.sparse
        return op.apply(
            ids, self.codes, self.float_scales(), self.decoder, self.bias, self.activation, added,
            norm, options,
        )  # fmt: skip

    def float_scales(self) -> Tensor | None:
        """`scales` as the ops take them: `.half()` narrows buffers too."""
        return None if self.scales is None else self.scales.float()

    def tied_head(self, bias: Tensor | None = None) -> nn.Module:
        """The output projection hidden [..., D] -> logits [..., V] over the same parameters.

        Without an activation it is re-associated, (hidden decoder) codesᵀ + hidden · bias: D / rank
        times less work and memory than the table; see `lean_kernels.ops.low_rank_embedding.logits`.
        With one, rows of the table are made a tile at a time and multiplied, which saves memory,
        not work.

        Args:
            bias: [V], or None; a parameter stays the same parameter.
        """
        kind = TiledHead if self.activation else LowRankHead
        return kind(self, bias)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}"
        if self.activation:
            text += f", activation={self.activation}"
        return text if self.scales is None else f"{text}, int8"


class AutoencoderEmbedding(LowRankEmbedding):
    """Row i is activation(codes[i] decoderᵀ + bias): the decoder of an autoencoder of the table.

    As in "Direction is what you need" (RepL4NLP 2021, arXiv 2106.08181): the encoder is run once
    over the table, and forgotten. Arguments and state are LowRankEmbedding's, with a bias.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, *, bias: bool = True, **options
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rank, bias=bias, **options)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        rank: int,
        *,
        activation: str | None = None,
        int8: bool = False,
        **fit,
    ) -> "AutoencoderEmbedding":
        """Train an autoencoder on the rows of an nn.Embedding, and keep codes and decoder.

        The embedding is left as it is; device, dtype, arguments and requires_grad carry over.

        Args:
            activation: None or "elu".
            fit: further arguments of `lean_kernels.compress.embedding.fit_autoencoder`.
        """
        from lean_kernels.compress.embedding import fit_autoencoder

        weight, arguments = table_of(embedding, cls.__name__)
        factors = fit_autoencoder(weight, rank, activation=activation, **fit)
        return cls._like(embedding, factors, activation=activation, int8=int8, **arguments)


class LowRankHead(TiledHead):
    """Logits (hidden decoder) codesᵀ + hidden · bias of the embedding's rows, re-associated."""

    def project(self, hidden: Tensor) -> Tensor:
        table = self.embedding
        shift = None if table.bias is None else hidden @ table.bias
        return low_rank_logits(
            hidden @ table.decoder, table.codes, table.float_scales(), self.bias, shift
        )


def quantize_rows(codes: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales of each row, the largest number of which becomes 127."""
    wide = codes.float()
    scales = wide.abs().amax(1) / 127
    steps = torch.where(scales > 0, scales, 1)
    return (wide / steps[:, None]).round().to(torch.int8), scales
