# SPDX-License-Identifier: Apache-2.0
"""Which tokens a model can do without: retention profiles, their speed-up, learned thresholds.

The measured profile follows the idea of ACC, the attention context contribution of the
Latency-Adjustable Transformer (arXiv 2201.03327): tokens that receive little attention in a layer
contribute little to the next ones. The paper's constants are arguments here. Fixed counts are those
of PoWER-BERT (arXiv 2001.08950), thresholds those of LTP (arXiv 2107.00910).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lean_kernels.architectures import ENCODER_FAMILIES, find_encoders
from lean_kernels.nn import LeanEncoder
from lean_kernels.nn.packing import kept_counts
from lean_kernels.nn.token_profile import check_profile, rescale
from lean_kernels.ops.token_selection import kept_count
from lean_kernels.recipe import TokenRule

__all__ = [
    "KeyScores",
    "SoftThresholds",
    "calibrate_thresholds",
    "derive_profile",
    "encoder_flops",
    "fixed_counts",
    "measure_profile",
    "measure_scores",
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


@torch.inference_mode()
def measure_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    exclude_diagonal: bool = False,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> KeyScores:
    """Run a model and collect the attention each token receives, with nothing dropped.

    Args:
        model: has one encoder that LeanEncoder knows, plain or replaced already; in evaluation mode
            while it is measured, and unchanged afterwards.
        batches: such as a DataLoader of what a tokenizer gives; each is passed as model(**batch).
            "labels" are left out.
        exclude_diagonal: leave out the attention a token pays itself, as PoWER-BERT does.
        max_tokens: stop after the batch that reaches this many; None takes all batches.
        progress: called with the number of batches done, before each and at the end.

    Raises:
        ValueError: no such encoder, or several; or no tokens.
    """
    device = next(model.parameters()).device
    lengths: list[Tensor] = []
    scores: list[list[Tensor]] = []

    def observe(layer: int, found: Tensor, cu_seqlens: Tensor) -> None:
        if layer == 0:
            lengths.append(cu_seqlens.diff().long().cpu())
        if layer == len(scores):
            scores.append([])
        scores[layer].append(found.float().cpu())

    done = total = 0
    with _observed(model, TokenRule(exclude_diagonal=exclude_diagonal), observe):
        for batch in batches:
            progress(done)
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            model(**inputs)
            done, total = done + 1, total + int(lengths[-1].sum())
            if max_tokens is not None and total >= max_tokens:
                break
    progress(done)
    if not lengths:
        raise ValueError("measure_scores: there were no batches")
    return KeyScores([torch.cat(layer) for layer in scores], torch.cat(lengths))


@contextmanager
def _observed(model: nn.Module, rule: TokenRule, observe: Callable) -> Iterator[None]:
    """The model with its encoder packed and observed, in evaluation mode; put back afterwards."""
    places = find_encoders(model)
    if len(places) != 1:
        raise ValueError(
            f"measure_scores: expected a model with one encoder of {ENCODER_FAMILIES}, within a "
            f"model of transformers; found {len(places)} in {type(model).__name__}"
        )
    name, training = places[0].name, {m: m.training for m in model.modules()}
    parent = model.get_submodule(name.rpartition(".")[0])
    child, encoder = name.rpartition(".")[2], model.get_submodule(name)
    # A second LeanEncoder over the same layers, so that no rule of the first is touched.
    plain = encoder.replaced[0] if isinstance(encoder, LeanEncoder) else encoder
    observed = LeanEncoder(plain, places[0].layout, tokens=rule)
    observed._modules.update(encoder._modules)
    observed.observe_scores = observe
    try:
        setattr(parent, child, observed)
        model.eval()
        yield
    finally:
        setattr(parent, child, encoder)
        for module, mode in training.items():
            module.training = mode


def measure_profile(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    statistic: str | float = "median",
    threshold: float | None = None,
    mean_kept: float | None = None,
    exclude_diagonal: bool = False,
    max_tokens: int | None = None,
) -> tuple[float, ...]:
    """`derive_profile` of `measure_scores`: the profile of a model on data, in one call."""
    measured = measure_scores(
        model, batches, exclude_diagonal=exclude_diagonal, max_tokens=max_tokens
    )
    return derive_profile(measured, statistic=statistic, threshold=threshold, mean_kept=mean_kept)


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
    profile = check_profile(profile)
    counts = kept_counts(np.array([length]), len(profile), profile=profile)
    return tuple(counts[1:, 0].tolist())


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
        kept = min(kept_count(fraction, len(alive)), len(ordered))
        found.append(float(ordered[kept - 1]) if kept < len(ordered) else 0.0)
        alive &= scores >= found[-1]
    return tuple(found)


class SoftThresholds(nn.Module):
    """LTP's learned thresholds: soft while training, hard numbers afterwards.

        encoder.soft_thresholds = soft = SoftThresholds(12)
        loss = model(**batch).loss + 0.1 * soft.kept()  # with soft's parameters in the optimizer
        ...
        encoder.soft_thresholds, encoder.token_rule = None, TokenRule(threshold=soft.hard())

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
        self._kept: list[Tensor] = []

    def forward(self, scores: Tensor, layer: int) -> Tensor:
        """How much of each token stays, in (0, 1): sigmoid((score - threshold) / temperature).

        Args:
            scores: mean-reduced, any shape. Their gradient is used where they carry one.
        """
        mask = torch.sigmoid((scores - self.threshold[layer]) / self.temperature)
        if self.training and len(mask):
            self._kept.append(mask.mean())
        return mask

    def kept(self) -> Tensor:
        """Mean share of tokens kept by the layers that ran since the last call, a scalar.

        LTP's regulariser: a multiple of it, added to the loss, is what makes thresholds rise.
        """
        if not self._kept:
            raise RuntimeError(
                "SoftThresholds: no layer has run in training mode since the last call"
            )
        mean = torch.stack(self._kept).mean()
        self._kept.clear()
        return mean

    def hard(self) -> tuple[float, ...]:
        """The thresholds as numbers, 0 or more, for inference."""
        return tuple(self.threshold.detach().clamp_min(0).tolist())


def encoder_flops(
    profile: Sequence[float] | None,
    lengths: Sequence[int] | Tensor,
    config,
    *,
    density: float = 1.0,
    first_only: bool = False,
) -> float:
    """Floating-point operations of an encoder that drops tokens between attention and feed-forward.

    Layer l projects and attends over the tokens that layer l - 1 left; its output projection and
    feed-forward see those that its own attention leaves. Counted are the products: 2 per
    multiply-add. Embeddings, normalisation and heads are not.

    Args:
        profile: fraction of the original tokens kept after each layer's attention; None keeps all.
        lengths: tokens of each sequence.
        config: a Hugging Face config (or anything with its sizes).
        density: fraction of the linear weights that is multiplied.
        first_only: the last layer attends from, and goes on with, the first token alone.
    """
    layers, hidden, inner, products = _sizes(config)
    profile = None if profile is None else check_profile(profile, layers)
    sizes = np.asarray(lengths, dtype=np.int64)
    counts = kept_counts(sizes, layers, profile=profile, first_only=first_only).astype(np.float64)
    total = 0.0
    for layer, (entering, leaving) in enumerate(pairwise(counts)):
        linear = 3 * hidden * hidden * entering
        linear += (hidden * hidden + products * hidden * inner) * leaving
        rows = leaving if first_only and layer == layers - 1 else entering
        attention = 2 * hidden * rows * entering  # scores, and their product with the values
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
    first_only: bool = False,
    padded: int | Sequence[int] | None = None,
) -> float:
    """Speed-up over the dense encoder that drops nothing, if time went with the FLOPs.

    Args:
        profile, lengths, config, density, first_only: as `encoder_flops` takes them.
        padded: the dense encoder runs every sequence at this many tokens, or each at its own
            number of them; None: without padding.
    """
    baseline = lengths if padded is None else padded
    if isinstance(padded, int):
        baseline = [padded] * len(lengths)
    ours = encoder_flops(profile, lengths, config, density=density, first_only=first_only)
    return encoder_flops(None, baseline, config) / ours


def speed_for(
    profile: Sequence[float],
    speedup: float,
    lengths: Sequence[int] | Tensor,
    config,
    *,
    padded: int | Sequence[int] | None = None,
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
