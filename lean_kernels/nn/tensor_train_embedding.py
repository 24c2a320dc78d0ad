# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Embedding that keeps its table as a tensor train."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lean_kernels.nn.compressed_embedding import CompressedEmbedding, table_of
from lean_kernels.ops import tensor_train_embedding


def near_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` rising integers, near one another, whose product is `size` or little more."""

    def candidates(size: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            yield (max(size, least),)
            return
        root = math.ceil(size ** (1 / count))
        for first in range(max(least, root // 2, 1), root + 1):
            for rest in candidates(-(-size // first), count - 1, first):
                yield first, *rest

    return min(candidates(size, count, 1), key=lambda f: (sum(f) * math.prod(f), f))


def tt_svd(
    table: Tensor,
    rank: int | Sequence[int],
    *,
    row_factors: Sequence[int],
    col_factors: Sequence[int],
) -> list[Tensor]:
    """Cores [v_k, r_k-1, d_k, r_k] of a tensor train near `table`, by SVDs one after another.

    Args:
        table: [V, D]; taken as [v_1 ... v_K, d_1 ... d_K], zeros where those exceed it.
        rank: of all cuts, or one per cut; a cut takes no more than its matrix has.
        row_factors, col_factors: v_k and d_k.

    The error is at most sqrt(K - 1) times that of the best train of these ranks (Oseledets 2011,
    algorithm 1). In table's dtype, computed in float64.
    """
    order = len(row_factors)
    rows, cols = math.prod(row_factors), math.prod(col_factors)
    ranks = (rank,) * (order - 1) if isinstance(rank, int) else tuple(rank)
    full = table.new_zeros(rows, cols, dtype=torch.float64)
    full[: table.shape[0], : table.shape[1]] = table
    pairs = [axis for k in range(order) for axis in (k, order + k)]
    rest = full.view(*row_factors, *col_factors).permute(pairs).reshape(1, -1)
    cores, before = [], 1
    for k, cut in enumerate(ranks):
        matrix = rest.reshape(before * row_factors[k] * col_factors[k], -1)
        left, values, right = _truncated_svd(matrix, cut)
        after = len(values)
        core = left.view(before, row_factors[k], col_factors[k], after)
        cores.append(core.permute(1, 0, 2, 3).to(table.dtype).contiguous())
        rest, before = values[:, None] * right, after
    core = rest.reshape(before, row_factors[-1], col_factors[-1], 1).permute(1, 0, 2, 3)
    return [*cores, core.to(table.dtype).contiguous()]


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, from the eigenvectors of the smaller Gram matrix."""
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]  # rising eigenvalues
    other = vectors.t() @ matrix if wide else matrix @ vectors
    dim = 1 if wide else 0
    values = torch.linalg.vector_norm(other, dim=dim)
    other = other / values.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(dim)
    return (vectors, values, other) if wide else (other, values, vectors.t())


class TensorTrainEmbedding(CompressedEmbedding):
    """Rows of a tensor train; see `ops.tensor_train_embedding`.

    Args:
        num_embeddings, embedding_dim: as in nn.Embedding.
        rank: of all cuts, or one per cut, K - 1 of them.
        order: K, the number of cores, 2 to 4.
        row_factors, col_factors: K numbers each, with products of at least num_embeddings and
            embedding_dim; None: near one another, and rising.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: see CompressedEmbedding.

    State: `cores.0` ... [v_k, r_k-1, d_k, r_k], parameters. TT-Rec: arXiv 2101.11714.
    """

    HONOURS = frozenset({"scale_grad_by_freq"})

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int | Sequence[int],
        order: int = 3,
        row_factors: Sequence[int] | None = None,
        col_factors: Sequence[int] | None = None,
        device=None,
        dtype=None,
        **options,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        if order not in (2, 3, 4):
            raise ValueError(f"TensorTrainEmbedding: order must be 2, 3 or 4, got {order}")
        self.row_factors = _factors("row_factors", row_factors, num_embeddings, order)
        self.col_factors = _factors("col_factors", col_factors, embedding_dim, order)
        cuts = (rank,) * (order - 1) if isinstance(rank, int) else tuple(rank)
        if len(cuts) != order - 1 or min(cuts) < 1:
            raise ValueError(
                f"TensorTrainEmbedding: rank must be one positive number, or {order - 1} for "
                f"{order} cores, got {rank}"
            )
        sizes = [v * d for v, d in zip(self.row_factors, self.col_factors, strict=True)]
        most = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, order)]
        self.ranks = 1, *map(min, cuts, most), 1
        self.cores = nn.ParameterList(
            torch.empty(
                self.row_factors[k],
                self.ranks[k],
                self.col_factors[k],
                self.ranks[k + 1],
                device=device,
                dtype=dtype,
            )
            for k in range(order)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal cores, such that the table's entries have mean 0 and variance 1."""
        std = math.prod(self.ranks) ** (-0.5 / len(self.cores))
        for core in self.cores:
            nn.init.normal_(core, std=std)

    @classmethod
    @torch.no_grad()
    def from_embedding(
        cls, embedding: nn.Embedding, rank: int | Sequence[int], **options
    ) -> "TensorTrainEmbedding":
        """The tensor train nearest to a table, by `tt_svd`.

        Args:
            embedding: left as it is. Its arguments, device and dtype carry over.
            rank, and options order, row_factors, col_factors: as of the constructor.
        """
        table, arguments = table_of(embedding, cls.__name__)
        layer = cls(*table.shape, rank=rank, **arguments, **options, device="meta")
        cores = tt_svd(
            table, layer.ranks[1:-1], row_factors=layer.row_factors, col_factors=layer.col_factors
        )
        for k, core in enumerate(cores):
            layer.cores[k] = nn.Parameter(core, requires_grad=embedding.weight.requires_grad)
        return layer.train(embedding.training)

    def lookup(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        return tensor_train_embedding(
            ids,
            list(self.cores),
            embedding_dim=self.embedding_dim,
            num_embeddings=self.num_embeddings,
            padding_idx=padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )

    def extra_repr(self) -> str:
        factors = (" x ".join(map(str, f)) for f in (self.row_factors, self.col_factors))
        rows, cols = factors
        return f"{super().extra_repr()}, rows={rows}, cols={cols}, ranks={list(self.ranks[1:-1])}"


def _factors(name: str, given: Sequence[int] | None, size: int, order: int) -> tuple[int, ...]:
    factors = near_factors(size, order) if given is None else tuple(given)
    if len(factors) != order or min(factors) < 1 or math.prod(factors) < size:
        raise ValueError(
            f"TensorTrainEmbedding: {name} must be {order} positive numbers with a product of at "
            f"least {size}, got {list(factors)}"
        )
    return factors
