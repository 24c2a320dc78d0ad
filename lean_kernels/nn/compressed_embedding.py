# SPDX-License-Identifier: Apache-2.0
"""What the compressed embeddings share: nn.Embedding's arguments, sizes, the way back, a head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TILE = 1024  # rows of the table that exist at once where it is walked


class CompressedEmbedding(nn.Module):
    """Base of drop-ins for nn.Embedding that never store the table [num_embeddings, embedding_dim].

    There is no `weight`. A subclass names in HONOURS which of nn.Embedding's training arguments it
    honours, sets its parameters, and makes rows in `lookup`.

    Args:
        num_embeddings, embedding_dim: as in nn.Embedding.
        padding_idx: this id adds nothing to the gradients of the table; negative counts from the
            end. Its row is what the parameters make of it, as after nn.Embedding.from_pretrained.
        max_norm, norm_type: refused: nn.Embedding would rescale stored rows, and there are none.
        scale_grad_by_freq: divide the gradient of a row by how often its id occurs in the batch.
        sparse: sparse gradients, for lk.optim.LazyAdam, or torch's SparseAdam or SGD.

    Raises:
        ValueError: a size, padding_idx or argument that does not fit or is not honoured.
    """

    HONOURS: frozenset[str] = frozenset()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"{name}: num_embeddings and embedding_dim must be positive, got "
                f"{num_embeddings} and {embedding_dim}"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"{name}: padding_idx must lie in [{-num_embeddings}, {num_embeddings}), got "
                f"{padding_idx}"
            )
        if max_norm is not None:
            raise ValueError(
                f"{name}: max_norm={max_norm} rescales stored rows, and a compressed table stores "
                "none; pass max_norm=None and clip the gradients instead"
            )
        asked = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        for argument in asked.keys() - self.HONOURS:
            if asked[argument]:
                raise ValueError(f"{name}: {argument}=True is not supported; pass False")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers that stand for the table."""
        return sum(t.numel() * t.element_size() for t in self.state_dict(keep_vars=True).values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the table, in the widest dtype of the parameters."""
        size = max(parameter.element_size() for parameter in self.parameters())
        return self.num_embeddings * self.embedding_dim * size

    @property
    def compression(self) -> float:
        """How many times smaller than the table."""
        return self.dense_nbytes / self.nbytes

    def lookup(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """ids (int32 or int64, any shape) -> [..., embedding_dim]; that id adds no gradient."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """ids (int32 or int64, any shape) -> [..., embedding_dim]."""
        return self.lookup(ids, self.padding_idx)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the table."""
        device = next(self.parameters()).device
        return self.lookup(torch.arange(first, last, device=device), None)

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The dense nn.Embedding with the same rows and arguments."""
        starts = range(0, self.num_embeddings, TILE)
        table = torch.cat([self.rows(i, min(i + TILE, self.num_embeddings)) for i in starts])
        return nn.Embedding.from_pretrained(
            table,
            freeze=False,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        ).train(self.training)

    def tied_head(self, bias: Tensor | None = None) -> nn.Module:
        """The output projection hidden [..., D] -> logits [..., V] over the same parameters.

        Args:
            bias: [V], or None; a parameter stays the same parameter.
        """
        return TiledHead(self, bias)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        text += "".join(f", {name}=True" for name in sorted(self.HONOURS) if getattr(self, name))
        return f"{text}, compression={self.compression:.3g}x"


class TiledHead(nn.Module):
    """Logits over a compressed table: its rows are made TILE at a time, never all of them.

    `embedding` is the embedding itself, so that both keep the same parameters through deepcopy,
    `.to()` and `load_state_dict`. Backward makes each tile again.
    """

    def __init__(self, embedding: CompressedEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_parameter("bias", head_bias(embedding, bias))

    @property
    def in_features(self) -> int:
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V]."""
        if hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: hidden must be [..., {self.in_features}], got "
                f"{list(hidden.shape)}"
            )
        return self.project(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        total = self.out_features

        def tile(hidden: Tensor, first: int) -> Tensor:
            last = min(first + TILE, total)
            bias = None if self.bias is None else self.bias[first:last]
            return F.linear(hidden, self.embedding.rows(first, last), bias)

        starts = range(0, total, TILE)
        if not torch.is_grad_enabled():
            return torch.cat([tile(hidden, first) for first in starts], dim=-1)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        parts = [checkpoint(tile, hidden, first, **options) for first in starts]
        return torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def head_bias(embedding: CompressedEmbedding, bias: Tensor | None) -> nn.Parameter | None:
    """A head's bias as the parameter it is, or made one; ValueError unless it is [V]."""
    if bias is None:
        return None
    if bias.shape != (embedding.num_embeddings,):
        raise ValueError(
            f"tied_head: bias must be [{embedding.num_embeddings}], got {list(bias.shape)}"
        )
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)


def table_of(embedding: nn.Module, name: str) -> tuple[Tensor, dict]:
    """The finite table of an nn.Embedding, and the arguments a compressed one takes over from it.

    Raises:
        TypeError: it is no nn.Embedding.
        ValueError: its table is empty or has NaN or infinite values.
    """
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{name} replaces nn.Embedding, got {type(embedding).__name__}")
    weight = embedding.weight.detach()
    if weight.numel() == 0 or not all(bool(extreme.isfinite()) for extreme in weight.aminmax()):
        raise ValueError(f"{name}: the table {list(weight.shape)} is empty, or not finite")
    keys = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    return weight, {key: getattr(embedding, key) for key in keys}
