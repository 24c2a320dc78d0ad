# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Embedding whose rows are sums of tensor products of morpheme vectors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lean_kernels.nn.compressed_embedding import CompressedEmbedding
from lean_kernels.ops._row_norm import RowNorm
from lean_kernels.ops.tensor_product_embedding import tensor_product_embedding


class MorphTEEmbedding(CompressedEmbedding):
    """Embedding of V words from the `rank` vectors of each of their `order` morphemes (MorphTE).

    A row is the sum over ranks of the tensor product of its morphemes' vectors of q numbers, q the
    least with q^order >= embedding_dim, cut to embedding_dim. With `layer_norm`, as in the authors'
    released code, it then goes through a LayerNorm; without, it is the paper's equation 8.

    Args:
        morphemes: [V, order], integers in [0, M); words with fewer morphemes are filled up with
            morphemes of their own. Kept as int32, and part of the state.
        embedding_dim: D, any size.
        order: 2 to 4.
        rank: vectors per morpheme.
        num_morphemes: M; None for the largest index plus 1.
        factor_size: q; None for the least that suffices.
        layer_norm: as above.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: see `CompressedEmbedding`;
            only padding_idx is honoured. The gradient it stops is that of the whole row, LayerNorm
            included. If its first morpheme is no other word's, that starts at zero, and then so
            does its row: after a LayerNorm it is the LayerNorm's bias, as in the released code.

    State: `factors` [M, rank, q], `morphemes`, and `layer_norm.weight` and `.bias`.

    Raises:
        ValueError: an argument that does not fit.

    "MorphTE: Injecting Morphology in Tensorized Embeddings", arXiv 2210.15379.
    """

    def __init__(
        self,
        morphemes: Tensor,
        embedding_dim: int,
        *,
        order: int = 3,
        rank: int = 8,
        num_morphemes: int | None = None,
        factor_size: int | None = None,
        layer_norm: bool = True,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        **arguments,
    ) -> None:
        name = type(self).__name__
        if order not in (2, 3, 4) or rank < 1:
            raise ValueError(
                f"{name}: order must be 2, 3 or 4 and rank at least 1, got {order} and {rank}"
            )
        if morphemes.dim() != 2 or morphemes.shape[1] != order or morphemes.is_floating_point():
            raise ValueError(
                f"{name}: morphemes must be integers [V, {order}], got {morphemes.dtype} "
                f"{list(morphemes.shape)}"
            )
        super().__init__(morphemes.shape[0], embedding_dim, padding_idx=padding_idx, **arguments)
        self.order = order
        self.rank = rank
        size = least_factor_size(embedding_dim, order) if factor_size is None else factor_size
        if size**order < embedding_dim:
            raise ValueError(
                f"{name}: factor_size^order must be at least embedding_dim {embedding_dim}, got "
                f"{size}^{order}"
            )
        if num_morphemes is None:
            num_morphemes = int(morphemes.max()) + 1
        options = {"device": device, "dtype": dtype}
        self.register_buffer("morphemes", morphemes.to(device, torch.int32, copy=True))
        self.factors = nn.Parameter(torch.empty(num_morphemes, rank, size, **options))
        self.layer_norm = nn.LayerNorm(embedding_dim, **options) if layer_norm else None
        self.validate(name)
        self.reset_parameters()

    @classmethod
    def from_morphte_checkpoint(
        cls, state: Mapping[str, Tensor], *, embedding_dim: int | None = None, prefix: str = "",
        padding_idx: int | None = None,
    ) -> "MorphTEEmbedding":  # fmt: skip
        """The embedding of a state dict that the authors' released code has saved.

        Args:
            state: holds weight.0 [rank, M, q], co_matrix [V, order], and ln.weight and ln.bias [D]
                (without them: the paper's form, and embedding_dim must be given).
            embedding_dim: D; None for the size of ln.weight.
            prefix: of those names, such as "encoder.embed_tokens.".
            padding_idx: fairseq's is 1.
        """

        def entry(name: str, dims: int) -> Tensor:
            tensor = state.get(prefix + name)
            if tensor is None or tensor.dim() != dims:
                near = ", ".join(key for key in state if key.endswith(name)) or "none like it"
                raise ValueError(
                    f"from_morphte_checkpoint: no {dims}-dimensional {prefix + name!r} in the "
                    f"state dict; there is {near}; give its prefix"
                )
            return tensor

        weight, morphemes = entry("weight.0", 3), entry("co_matrix", 2)
        layer_norm = prefix + "ln.weight" in state
        if layer_norm:
            scale, shift = entry("ln.weight", 1), entry("ln.bias", 1)
            embedding_dim = len(scale) if embedding_dim is None else embedding_dim
        if embedding_dim is None:
            raise ValueError("from_morphte_checkpoint: there is no ln.weight; pass embedding_dim=D")
        rank, count, size = weight.shape
        layer = cls(
            morphemes,
            embedding_dim,
            order=morphemes.shape[1],
            rank=rank,
            num_morphemes=count,
            factor_size=size,
            layer_norm=layer_norm,
            padding_idx=padding_idx,
            device=weight.device,
            dtype=weight.dtype,
        )
        loaded = {"factors": weight.transpose(0, 1), "morphemes": layer.morphemes}
        if layer_norm:
            loaded |= {"layer_norm.weight": scale, "layer_norm.bias": shift}
        layer.load_state_dict(loaded)
        return layer

    @property
    def num_morphemes(self) -> int:
        """M, the rows of `factors`."""
        return self.factors.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw factors so that numbers of a row have variance 1 before the norm, like
        nn.Embedding's."""
        nn.init.normal_(self.factors, std=self.rank ** (-0.5 / self.order))
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()
        if self.padding_idx is not None:
            first = self.morphemes[self.padding_idx, 0]
            alone = (self.morphemes == first).sum() == 1
            self.factors[first] *= ~alone

    def validate(self, name: str = "MorphTEEmbedding") -> None:
        """Raise ValueError unless all morphemes lie in [0, M). Call after writing to them."""
        if self.morphemes.is_meta or not self.morphemes.numel():
            return
        low, high = (int(extreme) for extreme in self.morphemes.aminmax())
        if low < 0 or high >= self.num_morphemes:
            raise ValueError(
                f"{name}: morphemes must lie in [0, {self.num_morphemes}), got {low} to {high}"
            )

    def lookup(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        norm = self.layer_norm
        return tensor_product_embedding(
            ids,
            self.morphemes,
            self.factors,
            embedding_dim=self.embedding_dim,
            norm=None if norm is None else RowNorm("layer", norm.weight, norm.bias, norm.eps),
            padding_idx=padding_idx,
        )

    def extra_repr(self) -> str:
        text = f"order={self.order}, rank={self.rank}, num_morphemes={self.num_morphemes}"
        return f"{super().extra_repr()}, {text}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A file is untrusted: no index may reach a kernel unchecked.
        error_msgs = args[-1] if args else kwargs["error_msgs"]
        if prefix + "morphemes" in state_dict and not error_msgs:
            try:
                self.validate(prefix.rstrip(".") or type(self).__name__)
            except ValueError as error:
                error_msgs.append(str(error))


def least_factor_size(embedding_dim: int, order: int) -> int:
    """The least q with q^order >= embedding_dim."""
    size = max(1, round(embedding_dim ** (1 / order)) - 1)
    while size**order < embedding_dim:
        size += 1
    return size
