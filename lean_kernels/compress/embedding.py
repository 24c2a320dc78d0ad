# SPDX-License-Identifier: Apache-2.0
"""Fit compressed embeddings to a table [V, D]: what they store, as plain tensors.

The truncated SVD and the tensor train; the autoencoders of "Direction is what you need" (RepL4NLP
2021, arXiv 2106.08181); and MorphTE (NeurIPS 2022, arXiv 2210.15379), distilled from the table
instead of trained with the model.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean_kernels._progress import Progress, reporting
from lean_kernels.compress.morphemes import build_morphemes, count_tokens
from lean_kernels.nn.morphte_embedding import least_factor_size
from lean_kernels.nn.tensor_train_embedding import TensorTrainEmbedding, tt_svd
from lean_kernels.ops._row_norm import RowNorm
from lean_kernels.ops.tensor_product_embedding import tensor_product_embedding

__all__ = [
    "build_morphemes",
    "count_tokens",
    "direction_loss",
    "fit_autoencoder",
    "fit_morphte",
    "fit_svd",
    "fit_tensor_train",
]

_TINY = 1e-10  # keeps the slope of |error|^alpha finite, as in the paper's code
_ROWS = 8192  # at a time, where a table is read in float64 or encoded


def fit_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a table of that rank, in the sum of squares.

    Args:
        weight: [V, D], floating point.
        rank: 1 to min(V, D).

    Returns:
        codes [V, rank] and decoder [D, rank], whose columns are orthonormal; codes @ decoder.T
        approximates the table.

    Raises:
        ValueError: not a finite matrix, or a rank out of range.
    """
    table = _checked_table("fit_svd", weight)
    _check_rank("fit_svd", rank, table)
    decoder = _principal_directions(table, rank)
    codes = torch.cat([rows @ decoder for rows in table.split(_ROWS)])
    return codes.to(weight.dtype), decoder.to(weight.dtype)


def fit_tensor_train(
    weight: Tensor,
    rank: int | Sequence[int],
    *,
    order: int = 3,
    row_factors: Sequence[int] | None = None,
    col_factors: Sequence[int] | None = None,
) -> list[Tensor]:
    """The cores of a tensor train near a table, by TT-SVD.

    Args:
        weight: [V, D], floating point.
        rank: of all cuts, or one per cut; a cut takes no more than it can use.
        order, row_factors, col_factors: as of `nn.TensorTrainEmbedding`.

    Returns:
        [v_k, r_k-1, d_k, r_k] for k from 1 to order.

    Raises:
        ValueError: an argument that does not fit.
    """
    table = _checked_table("fit_tensor_train", weight)
    factors = {"order": order, "row_factors": row_factors, "col_factors": col_factors}
    shape = TensorTrainEmbedding(*table.shape, rank=rank, **factors, device="meta")
    sizes = {"row_factors": shape.row_factors, "col_factors": shape.col_factors}
    return [core.to(weight.dtype) for core in tt_svd(table, shape.ranks[1:-1], **sizes)]


def direction_loss(
    output: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    cosine: float = 0.9975 / 5,
    magnitude: float = 0.0025,
    rmse: float = 0.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """cosine * (1 - cos) + magnitude * mean |error|^alpha + rmse * sqrt(mean error^2), a scalar.

    The defaults are those of "Direction is what you need" (arXiv 2106.08181).

    Args:
        output, target: [N, D].
        alpha: exponent of the magnitude term; the paper anneals it from 1 to 0.1.
        cosine, magnitude, rmse: coefficients.
        row_weights: [N], how much each row counts; None counts all alike.
    """
    if row_weights is None:
        row_weights = output.new_ones(len(output))
    share = row_weights / row_weights.sum()
    error = output - target
    loss = cosine * (share * (1 - F.cosine_similarity(output, target))).sum()
    if magnitude:
        loss = loss + magnitude * (share * (error.abs() + _TINY).pow(alpha).mean(1)).sum()
    if rmse:
        loss = loss + rmse * (share * error.square().mean(1)).sum().sqrt()
    return loss


def fit_autoencoder(
    weight: Tensor,
    rank: int,
    *,
    activation: str | None = None,
    frequencies: Tensor | None = None,
    cosine: float = 0.9975 / 5,
    magnitude: float = 0.0025,
    rmse: float = 0.0,
    alpha: tuple[float, float] = (1.0, 0.1),
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, decoder and bias that keep the direction of each row (arXiv 2106.08181).

    Encoder and decoder are linear, with bias. They start at the SVD of the rows over their norms,
    where the directions are no worse than those of `fit_svd`, and train under `direction_loss`. The
    encoder is then run over the table once and forgotten.

    Args:
        weight: [V, D], floating point. It is fitted on its device.
        rank: 1 to min(V, D).
        activation: None, or "elu" after the encoder and after the decoder, as in the paper's code:
            row i is then elu(decoder @ codes[i] + bias), and no number of it is below -1.
        frequencies: [V], how much each row counts, such as its count in a text; None counts all
            alike.
        cosine, magnitude, rmse: coefficients of `direction_loss`.
        alpha: its exponent in the first and in the last epoch.
        epochs, batch_size, learning_rate: of Adam; the rate falls to 0 along a cosine.
        seed: of the order of rows. On a CPU the same seed gives the same bits.
        progress: called as progress(done, total, name) before each step; None shows a bar.

    Returns:
        codes [V, rank], decoder [D, rank] and bias [D].

    Raises:
        ValueError: an argument of the wrong shape or out of range.
    """
    table = _checked_table("fit_autoencoder", weight)
    _check_rank("fit_autoencoder", rank, table)
    if activation not in (None, "elu"):
        raise ValueError(
            f"fit_autoencoder: unknown activation {activation!r}; expected one of (None, 'elu')"
        )
    counts = _checked_frequencies("fit_autoencoder", frequencies, table)
    encoder, decoder = _principal_layers(table, rank, counts, activation)
    activate = nn.Identity() if activation is None else nn.ELU()

    def rebuild(rows: Tensor) -> Tensor:
        return activate(decoder(activate(encoder(table[rows]))))

    parameters = [*encoder.parameters(), *decoder.parameters()]
    terms = {"cosine": cosine, "magnitude": magnitude, "rmse": rmse}
    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    _train(
        "autoencoder", parameters, rebuild, table, counts, terms, alpha, seed, progress, **options
    )
    with torch.no_grad():
        codes = torch.cat([activate(encoder(rows)) for rows in table.split(_ROWS)])
    return tuple(t.detach().to(weight.dtype) for t in (codes, decoder.weight, decoder.bias))


def fit_morphte(
    weight: Tensor,
    morphemes: Tensor,
    rank: int,
    *,
    layer_norm: bool = True,
    frequencies: Tensor | None = None,
    cosine: float = 0.9975 / 5,
    magnitude: float = 0.0025,
    rmse: float = 0.0,
    alpha: tuple[float, float] = (1.0, 1.0),
    epochs: int = 20,
    batch_size: int = 1024,
    learning_rate: float = 3e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Morpheme factors whose tensor products are closest to the rows of a table.

    The paper trains the factors with the model. Distilling them from a trained table is where a
    model that exists has to start.

    Args:
        weight: [V, D], floating point. It is fitted on its device.
        morphemes: [V, order], integer, such as `build_morphemes` gives; order 2 to 4.
        rank: how many tensor products are summed, 1 or more.
        layer_norm: whether the sum goes through a LayerNorm, as in the released code.
        frequencies, cosine, magnitude, rmse, alpha: as for `fit_autoencoder`.
        epochs, batch_size, learning_rate, seed, progress: as for `fit_autoencoder`.

    Returns:
        factors [M, rank, q], M the largest morpheme plus 1 and q the least integer with
        q^order >= D; weight [D] and bias [D] of the LayerNorm, None without one.

    Raises:
        ValueError: an argument of the wrong shape or out of range.
    """
    table = _checked_table("fit_morphte", weight)
    indices = _checked_morphemes(morphemes, table)
    if rank < 1:
        raise ValueError(f"fit_morphte: rank must be 1 or more, got {rank}")
    counts = _checked_frequencies("fit_morphte", frequencies, table)
    dim, order = table.shape[1], indices.shape[1]
    factors = _near_alike(int(indices.max()) + 1, rank, dim, order, table.std().item(), seed)
    factors = factors.to(table).requires_grad_()
    scale, shift, norm = None, None, None
    if layer_norm:
        scale, shift = table.std(0).requires_grad_(), table.mean(0).requires_grad_()
        norm = RowNorm("layer", scale, shift)

    def rebuild(rows: Tensor) -> Tensor:
        return tensor_product_embedding(rows, indices, factors, embedding_dim=dim, norm=norm)

    terms = {"cosine": cosine, "magnitude": magnitude, "rmse": rmse}
    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    found = (factors, scale, shift)
    parameters = [t for t in found if t is not None]
    _train("MorphTE", parameters, rebuild, table, counts, terms, alpha, seed, progress, **options)
    return tuple(None if t is None else t.detach().to(weight.dtype) for t in found)


def _principal_directions(
    table: Tensor, rank: int, counts: Tensor | None = None, *, normalised: bool = False
) -> Tensor:
    """[D, rank], orthonormal columns that span most of the rows, or of the rows over their norm."""
    gram = table.new_zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].double()
        if normalised:
            rows = F.normalize(rows, dim=1)
        weighted = rows if counts is None else rows * counts[start : start + _ROWS, None]
        gram += rows.t() @ weighted
    columns = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    return (columns * largest.sign()).to(table.dtype)  # the sign is free: make it reproducible


def _principal_layers(
    table: Tensor, rank: int, counts: Tensor | None, activation: str | None
) -> tuple[nn.Linear, nn.Linear]:
    """Encoder and decoder that project the rows onto the principal directions."""
    shape = table.shape[1], rank
    options = {"device": table.device, "dtype": table.dtype}
    encoder, decoder = (nn.utils.skip_init(nn.Linear, *s, **options) for s in (shape, shape[::-1]))
    directions = _principal_directions(table, rank, counts, normalised=True)
    shift = table.new_zeros(rank)
    if activation is not None:  # lifts all codes to where the encoder's ELU changes nothing
        shift = -(table @ directions).amin(0)
    with torch.no_grad():
        encoder.weight.copy_(directions.t())
        encoder.bias.copy_(shift)
        decoder.weight.copy_(directions)
        decoder.bias.copy_(-directions @ shift)
    return encoder, decoder


def _near_alike(count: int, rank: int, dim: int, order: int, spread: float, seed: int) -> Tensor:
    """Factors [count, rank, q] that differ little, for rows that spread as given.

    A product of such factors is nearly a sum of what each morpheme adds to the common one, which
    is learned well; from independent factors the same steps end at half the cosine.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = rank, least_factor_size(dim, order)
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    noise = torch.randn(count, *shape, generator=generator)
    return (spread / rank**0.5) ** (1 / order) * signs * (1 + 0.5 * noise)


def _train(
    name: str,
    parameters: Sequence[Tensor],
    rebuild: Callable[[Tensor], Tensor],
    table: Tensor,
    counts: Tensor | None,
    terms: dict[str, float],
    alpha: tuple[float, float],
    seed: int,
    progress: Progress | None,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Adam over shuffled rows, under the `direction_loss` of rebuild(rows) with those terms."""
    if epochs < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"fit: expected epochs >= 0, batch_size >= 1 and learning_rate > 0, got {epochs}, "
            f"{batch_size} and {learning_rate}"
        )
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    total, done = epochs * -(-len(table) // batch_size), 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total))
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), reporting(progress) as report:
        for epoch in range(epochs):
            now = alpha[0] + (alpha[1] - alpha[0]) * epoch / max(1, epochs - 1)
            order = torch.randperm(len(table), generator=generator).to(parameters[0].device)
            for rows in order.split(batch_size):
                report(done, total, f"fit {name}, epoch {epoch + 1} of {epochs}")
                optimizer.zero_grad(set_to_none=True)
                weights = None if counts is None else counts[rows]
                found, wanted = rebuild(rows), table[rows]
                loss = direction_loss(found, wanted, alpha=now, row_weights=weights, **terms)
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
        report(total, total, "")


def _checked_table(where: str, weight: Tensor) -> Tensor:
    """The table, float32 or float64."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be [V, D], floating point and not empty, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight has NaN or infinite values")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().to(wide)


def _check_rank(where: str, rank: int, table: Tensor) -> None:
    if not 1 <= rank <= min(table.shape):
        raise ValueError(
            f"{where}: rank must lie in [1, {min(table.shape)}] for a table of "
            f"{list(table.shape)}, got {rank}"
        )


def _checked_frequencies(where: str, frequencies: Tensor | None, table: Tensor) -> Tensor | None:
    if frequencies is None:
        return None
    counts = torch.as_tensor(frequencies).to(table)
    if counts.shape != table.shape[:1] or not bool((counts >= 0).all()) or not counts.sum() > 0:
        raise ValueError(
            f"{where}: frequencies must be {len(table)} numbers, one per row, 0 or more and not "
            f"all 0, got shape {list(counts.shape)}"
        )
    return counts / counts.mean() + 1e-6  # a batch of rows that never occur has a mean too


def _checked_morphemes(morphemes: Tensor, table: Tensor) -> Tensor:
    valid = not morphemes.is_floating_point() and morphemes.dim() == 2
    if not valid or len(morphemes) != len(table) or not 2 <= morphemes.shape[1] <= 4:
        raise ValueError(
            f"fit_morphte: morphemes must be integers [{len(table)}, order], order 2 to 4, got "
            f"{morphemes.dtype} {list(morphemes.shape)}"
        )
    if int(morphemes.min()) < 0:
        raise ValueError(f"fit_morphte: morphemes must not be negative, got {morphemes.min()}")
    return morphemes.to(table.device)
