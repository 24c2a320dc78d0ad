# SPDX-License-Identifier: Apache-2.0
"""Which tokens a model can do without: retention profiles, their speed-up, learned thresholds.

The measured profile follows the idea of ACC, the attention context contribution of the
Latency-Adjustable Transformer (arXiv 2201.03327): tokens that receive little attention in a layer
contribute little to the next ones. The paper's constants are arguments here. Fixed counts are those
of PoWER-BERT (arXiv 2001.08950), thresholds those of LTP (arXiv 2107.00910).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lean_kernels.nn.token_profile import check_profile, rescale

__all__ = [
    "KeyScores",
    "SoftThresholds",
    "calibrate_thresholds",
    "derive_profile",
    "encoder_flops",
    "fixed_counts",
    "predict_speedup",
    "rescale",
    "speed_for",
]

_SMALLEST = 1e-6  # a layer whose tokens all receive nothing still keeps one of each sequence


@dataclass(frozen=True)
class KeyScores:
    """The attention each token received in each layer, nothing dropped.

    Args:
        scores: per layer float32 [T], averaged over heads and query rows: over the tokens of a
            sequence they add up to 1, or to less where the diagonal was left out.
        lengths: tokens of each sequence, int64 [B], in the order of the packed tokens; sum T.
    """

    scores: list[Tensor]
    lengths: Tensor

    def __post_init__(self) -> None:
        total = int(self.lengths.sum())
        if not self.scores or total == 0:
            raise ValueError("token scores: no layer or no token was measured")
        for layer, scores in enumerate(self.scores):
            if scores.shape != (total,) or not bool(torch.isfinite(scores).all()):
                raise ValueError(
                    f"token scores: layer {layer} must have {total} finite numbers, one per token, "
                    f"got shape {list(scores.shape)}"
                )

    def relative(self) -> list[Tensor]:
        """Scores over their sequence's mean, float32 [T] per layer: 1 is an equal share."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        counts = self.lengths.clamp_min(1)
        found = []
        for scores in self.scores:
            sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(
                0, owner, scores.double()
            )
            means = (sums / counts)[owner].clamp_min(torch.finfo(torch.float64).tiny)
            found.append((scores.double() / means).float())
        return found


def derive_profile(
    measured: KeyScores,
    *,
    statistic: str | float = "median",
    threshold: float | None = None,
    mean_kept: float | None = None,
) -> tuple[float, ...]:
    """A retention profile from measured scores.

    With r the score of a token over the mean score in its sequence and layer (an equal share of the
    attention is 1), layer l's contribution is

    - c_l = statistic of r over all tokens of the data. Where a few tokens draw the attention, most
      receive less than an equal share, and the median falls below 1; or
    - with `threshold`: the share of tokens whose r is at least `threshold` times that statistic.

    The profile is the non-increasing sequence closest to min(c_l, 1) in least squares (pool
    adjacent violators): an odd layer out is averaged with its neighbours. With `mean_kept` it is
    then rescaled (see `rescale`) until its mean over the layers is that number.

    Args:
        statistic: "median", "mean" (which is 1 by construction, and so of use with `threshold`
            alone), or a quantile in (0, 1).
        threshold: see above; positive.
        mean_kept: the wanted mean over layers, in (0, 1).

    Returns:
        The fraction of a sequence's original tokens kept after each layer's attention.

    Raises:
        ValueError: an argument out of range, or a `mean_kept` no rescaling reaches.
    """
    if threshold is not None and not 0 < threshold < math.inf:
        raise ValueError(f"derive_profile: threshold must be positive, got {threshold}")
    contributions = []
    for relative in measured.relative():
        level = _statistic(relative, statistic)
        if threshold is not None:
            level = float((relative >= threshold * level).double().mean())
        contributions.append(min(max(level, _SMALLEST), 1.0))
    profile = check_profile(_non_increasing(contributions))
    return profile if mean_kept is None else _with_mean(profile, mean_kept)


def _statistic(values: Tensor, name: str | float) -> float:
    if name == "mean":
        return float(values.double().mean())
    fraction = 0.5 if name == "median" else name
    if isinstance(fraction, str) or not 0 < fraction < 1:
        raise ValueError(
            f"derive_profile: statistic must be 'median', 'mean' or a quantile in (0, 1), "
            f"got {name!r}"
        )
    ordered = values.sort().values  # torch.quantile stops at 16 million numbers
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    pair = ordered[[low, min(low + 1, len(ordered) - 1)]].tolist()
    return pair[0] + (place - low) * (pair[1] - pair[0])


def _non_increasing(values: Sequence[float]) -> list[float]:
    """Least-squares fit by a sequence that never rises."""
    runs: list[tuple[float, int]] = []  # mean, count
    for value in values:
        mean, count = value, 1
        while runs and runs[-1][0] < mean:
            before, many = runs.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        runs.append((mean, count))
    return [mean for mean, count in runs for _ in range(count)]


def _bisect(function, target: float, what: str) -> float:
    """The speed at which `function`, which falls with speed, reaches `target`."""
    low, high = 0.0, 1.0
    while function(high) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"{what} cannot be reached by rescaling: layers that keep all stay so")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > target else (low, middle)
    return high


def _with_mean(profile: Sequence[float], mean_kept: float) -> tuple[float, ...]:
    if not 0 < mean_kept < 1:
        raise ValueError(f"derive_profile: mean_kept must lie in (0, 1), got {mean_kept}")

    def mean(speed: float) -> float:
        return math.fsum(rescale(profile, speed)) / len(profile)

    return rescale(profile, _bisect(mean, mean_kept, f"derive_profile: mean_kept {mean_kept:g}"))


def fixed_counts(profile: Sequence[float], length: int) -> tuple[int, ...]:
    """PoWER-BERT's form: tokens kept after each layer, the same for sequences of any length.

    Args:
        length: the length the fractions are taken of, such as the longest of the data.
    """
    if length < 1:
        raise ValueError(f"fixed_counts: length must be positive, got {length}")
    return tuple(math.ceil(fraction * length) for fraction in check_profile(profile))


def calibrate_thresholds(measured: KeyScores, profile: Sequence[float]) -> tuple[float, ...]:
    """LTP's form: per layer the mean-reduced score below which a token is dropped.

    Layer by layer, among the tokens that the layers before left, the threshold that leaves
    the profile's share of all tokens. The scores were measured with nothing dropped, so what is
    kept at inference comes close, not equal; learning refines it (`SoftThresholds`).
    """
    profile = check_profile(profile, len(measured.scores))
    alive = torch.ones(int(measured.lengths.sum()), dtype=torch.bool)
    found = []
    for fraction, scores in zip(profile, measured.scores, strict=True):
        ordered = scores[alive].sort(descending=True).values
        kept = min(math.ceil(fraction * len(alive)), len(ordered))
        found.append(float(ordered[kept - 1]) if kept < len(ordered) else 0.0)
        alive &= scores >= found[-1]
    return tuple(found)


class SoftThresholds(nn.Module):
    """LTP's learned thresholds: soft while training, hard numbers afterwards.

    Args:
        layers: number of layers.
        final: the threshold of the last layer; those before start at l / layers of it. Scores are
            mean-reduced, so an equal share of the attention of n tokens is 1 / n. Or one number
            per layer, such as `calibrate_thresholds` gives.
        temperature: width of the soft step, in units of the scores.
    """

    def __init__(
        self, layers: int, *, final: float | Sequence[float] = 0.01, temperature: float = 1e-3
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"SoftThresholds: temperature must be positive, got {temperature}")
        if isinstance(final, Sequence):
            if len(final) != layers:
                raise ValueError(f"SoftThresholds: expected {layers} numbers, got {len(final)}")
            start = torch.tensor(final, dtype=torch.float32)
        else:
            start = final * torch.arange(1, layers + 1) / layers
        self.threshold = nn.Parameter(start.float())
        self.temperature = temperature

    def forward(self, scores: Tensor, layer: int) -> Tensor:
        """How much of each token stays, in (0, 1): sigmoid((score - threshold) / temperature).

        Args:
            scores: mean-reduced, any shape. Their gradient is used where they carry one.
        """
        return torch.sigmoid((scores - self.threshold[layer]) / self.temperature)

    def hard(self) -> tuple[float, ...]:
        """The thresholds as numbers, for inference."""
        return tuple(self.threshold.detach().tolist())


def encoder_flops(
    profile: Sequence[float] | None,
    lengths: Sequence[int] | Tensor,
    config,
    *,
    density: float = 1.0,
) -> float:
    """Floating-point operations of an encoder that drops tokens between attention and feed-forward.

    Layer l projects and attends over the tokens that layer l - 1 left; its output projection and
    feed-forward see those that its own attention leaves. Counted are the products: 2 per
    multiply-add. Embeddings, normalisation and heads are not.

    Args:
        profile: fraction of the original tokens kept after each layer's attention, ceil(f * n) of a
            sequence of n; None keeps all.
        lengths: tokens of each sequence.
        config: a Hugging Face config (or anything with its sizes).
        density: fraction of the linear weights that is multiplied.
    """
    layers, hidden, inner, products = _sizes(config)
    profile = (1.0,) * layers if profile is None else check_profile(profile, layers)
    sizes = torch.as_tensor(lengths, dtype=torch.float64)
    total = 0.0
    for before, after in pairwise((1.0, *profile)):
        entering, leaving = torch.ceil(sizes * before), torch.ceil(sizes * after)
        linear = 3 * hidden * hidden * entering
        linear += (hidden * hidden + products * hidden * inner) * leaving
        attention = 2 * hidden * entering * entering  # scores, and their product with the values
        total += 2 * float((density * linear + attention).sum())
    return total


def _sizes(config) -> tuple[int, int, int, int]:
    def first(*names: str) -> int:
        for name in names:
            if isinstance(value := getattr(config, name, None), int):
                return value
        raise ValueError(f"{type(config).__name__} has no {' or '.join(names)}")

    products = 3 if getattr(config, "model_type", None) == "modernbert" else 2  # gated: a third one
    return (
        first("num_hidden_layers", "n_layers"),
        first("hidden_size", "dim"),
        first("intermediate_size", "hidden_dim"),
        products,
    )


def predict_speedup(
    profile: Sequence[float] | None,
    lengths: Sequence[int] | Tensor,
    config,
    *,
    density: float = 1.0,
    padded: int | None = None,
) -> float:
    """Speed-up over the dense encoder that drops nothing, if time went with the FLOPs.

    Args:
        profile, lengths, config, density: as `encoder_flops` takes them.
        padded: the dense encoder runs every sequence at this many tokens; None: at its own length.
    """
    baseline = lengths if padded is None else [padded] * len(lengths)
    return encoder_flops(None, baseline, config) / encoder_flops(
        profile, lengths, config, density=density
    )


def speed_for(
    profile: Sequence[float],
    speedup: float,
    lengths: Sequence[int] | Tensor,
    config,
    *,
    padded: int | None = None,
) -> float:
    """The least `speed` at which the rescaled profile is predicted to be `speedup` times as fast.

    Raises:
        ValueError: no speed reaches it, because layers that keep everything go on doing so.
    """
    if not 0 < speedup < math.inf:
        raise ValueError(f"speed_for: speedup must be positive, got {speedup}")

    def slowness(speed: float) -> float:
        return 1 / predict_speedup(rescale(profile, speed), lengths, config, padded=padded)

    return _bisect(slowness, 1 / speedup, f"speed_for: a speed-up of {speedup:g}")
