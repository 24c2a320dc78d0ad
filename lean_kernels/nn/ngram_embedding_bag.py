# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.EmbeddingBag over n-grams, with float or int8 rows."""

import torch
from torch import Tensor, nn

from lean_kernels.ops.ngram_embedding_bag import op


class NGramEmbeddingBag(nn.Module):
    """The sum or mean of the embeddings of a text's n-grams; see `ops.ngram_embedding_bag`.

    Args:
        num_embeddings, embedding_dim, padding_idx, include_last_offset: as in nn.EmbeddingBag.
        mode: "mean" or "sum"; "max" is refused.
        sparse: the gradient of `weight` is a coalesced sparse tensor of the rows that occur, for
            lk.optim.LazyAdam; else dense.
        max_norm, norm_type: rows that occur are rescaled in place first, as in nn.EmbeddingBag.
        scale_grad_by_freq: refused.

    State: `weight` [num_embeddings, embedding_dim], a parameter. After `to_int8` it is int8 and
    without gradient, and `scales` float32 [num_embeddings] a buffer.

    Raises:
        ValueError: a size or an argument that does not fit or is not honoured.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"NGramEmbeddingBag: num_embeddings and embedding_dim must be positive, got "
                f"{num_embeddings} and {embedding_dim}"
            )
        if mode not in op.MODES:
            raise ValueError(
                f"NGramEmbeddingBag: mode {mode!r} is not supported; expected one of {op.MODES}"
            )
        if scale_grad_by_freq:
            raise ValueError(
                "NGramEmbeddingBag: scale_grad_by_freq=True is not supported; pass False"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"NGramEmbeddingBag: padding_idx must lie in [{-num_embeddings}, "
                f"{num_embeddings}), got {padding_idx}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.mode = mode
        self.sparse = sparse
        self.include_last_offset = include_last_offset
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.register_buffer("scales", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As nn.EmbeddingBag: normally distributed, the row of padding zero."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            self.weight[self.padding_idx] = 0

    @classmethod
    @torch.no_grad()
    def from_embedding_bag(cls, bag: nn.EmbeddingBag) -> "NGramEmbeddingBag":
        """The same layer with the same parameter; TypeError unless it is an nn.EmbeddingBag."""
        if not isinstance(bag, nn.EmbeddingBag):
            raise TypeError(f"NGramEmbeddingBag replaces nn.EmbeddingBag, got {type(bag).__name__}")
        layer = cls(
            bag.num_embeddings,
            bag.embedding_dim,
            bag.max_norm,
            bag.norm_type,
            bag.scale_grad_by_freq,
            bag.mode,
            bag.sparse,
            include_last_offset=bag.include_last_offset,
            padding_idx=bag.padding_idx,
            device="meta",
        )
        layer.weight = bag.weight
        return layer.train(bag.training)

    @torch.no_grad()
    def to_int8(self) -> "NGramEmbeddingBag":
        """A copy for inference with int8 rows, each scaled to its largest magnitude."""
        weight = self.weight.detach().float()
        if self.scales is not None or not bool(weight.abs().amax().isfinite()):
            raise ValueError("NGramEmbeddingBag: the table is int8 already, or not finite")
        scales = weight.abs().amax(1) / 127
        rows = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        layer = self._without_table()
        layer.weight = nn.Parameter(rows.to(torch.int8), requires_grad=False)
        layer.scales = scales
        return layer

    def _without_table(self) -> "NGramEmbeddingBag":
        layer = type(self)(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device="meta",
        )
        return layer.train(self.training)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags of rows -> [B, embedding_dim].

        Args:
            input: int32 or int64: [B, L], bags of one length, without offsets; or [N] with them.
            offsets: where the bags begin, [B]; [B + 1], the end too, with include_last_offset.
            per_sample_weights: like input, what each row is multiplied by, in either mode.
        """
        if (input.dim() == 2) == (offsets is not None) or input.dim() not in (1, 2):
            raise ValueError(
                f"NGramEmbeddingBag: expected input [B, L] without offsets or [N] with offsets, "
                f"got input {list(input.shape)}, "
                f"offsets {None if offsets is None else list(offsets.shape)}"
            )
        if per_sample_weights is not None and per_sample_weights.shape != input.shape:
            raise ValueError(
                f"NGramEmbeddingBag: per_sample_weights must be {list(input.shape)} like input, "
                f"got {list(per_sample_weights.shape)}"
            )
        if input.dim() == 2:
            bags, length = input.shape
            offsets = torch.arange(bags + 1, device=input.device) * length
            input = input.reshape(-1)
            weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        else:
            weights = per_sample_weights
            if not self.include_last_offset:
                offsets = torch.cat([offsets, offsets.new_full((1,), input.shape[0])])
        if self.max_norm is not None and self.scales is None and input.numel():
            with torch.no_grad():
                torch.embedding_renorm_(
                    self.weight.detach(), input.contiguous(), self.max_norm, self.norm_type
                )
        return op.ngram_embedding_bag(
            input,
            offsets,
            self.weight,
            mode=self.mode,
            weights=weights,
            scales=None if self.scales is None else self.scales.float(),
            padding_idx=self.padding_idx,
            sparse=self.sparse,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.scales is not None:
            text += ", int8"
        return text
