# SPDX-License-Identifier: Apache-2.0
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_kernels.compress import tokens
from lean_kernels.compress.tokens import KeyScores

BERT = SimpleNamespace(num_hidden_layers=2, hidden_size=8, intermediate_size=16)


def measured(*layers, lengths=(4,)):
    return KeyScores([torch.tensor(scores) for scores in layers], torch.tensor(lengths))


def random_scores(layers=4, lengths=(3, 17, 0, 40, 1), sharpness=1.0):
    generator = torch.Generator().manual_seed(0)
    packed = []
    for layer in range(layers):
        rows = [
            torch.softmax(sharpness * layer * torch.randn(n, generator=generator), 0)
            for n in lengths
        ]
        packed.append(torch.cat(rows))
    return KeyScores(packed, torch.tensor(lengths))


def test_relative_scores_have_mean_one_in_each_sequence():
    scores = measured([0.1, 0.3, 0.6, 0.25, 0.75], [0.0, 0.0, 0.0, 0.0, 1.0], lengths=(3, 2))
    first, second = scores.relative()
    assert torch.allclose(first, torch.tensor([0.3, 0.9, 1.8, 0.5, 1.5]))
    assert torch.allclose(second, torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0]))


def test_median_of_the_relative_scores_is_the_profile():
    # means 1: medians are 4 * 0.225 and 4 * 0.1
    scores = measured([0.2, 0.25, 0.1, 0.45], [0.1, 0.1, 0.1, 0.7])
    assert tokens.derive_profile(scores) == pytest.approx((0.9, 0.4))
    assert tokens.derive_profile(scores, statistic=0.25) == pytest.approx((0.7, 0.4))
    # r >= 0.9 * median: three of four; all
    assert tokens.derive_profile(scores, threshold=0.85) == pytest.approx((0.875, 0.875))
    # r >= half of an equal share: 3 of 4 in the first layer, 1 of 4 in the second
    found = tokens.derive_profile(scores, statistic="mean", threshold=0.5)
    assert found == pytest.approx((0.75, 0.25))


def test_layers_out_of_order_are_averaged():
    assert tokens._non_increasing([0.9, 0.4, 0.6, 0.5, 0.5]) == pytest.approx([0.9] + 4 * [0.5])
    assert tokens._non_increasing([0.1, 0.2, 0.6]) == pytest.approx(3 * [0.3])
    assert tokens._non_increasing([0.9, 0.5]) == [0.9, 0.5]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_fit_is_the_projection(values):
    """The residual of a projection on a cone is orthogonal to it, and its polar has no falling."""
    fit = tokens._non_increasing(values)
    residual = [value - fitted for value, fitted in zip(values, fit, strict=True)]
    assert all(a >= b for a, b in pairwise(fit))
    assert math.fsum(r * f for r, f in zip(residual, fit, strict=True)) == pytest.approx(
        0, abs=1e-9
    )
    prefixes = [math.fsum(residual[: k + 1]) for k in range(len(residual))]
    assert max(prefixes) <= 1e-9 and prefixes[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("wanted", [0.9, 0.5, 0.27])
def test_mean_kept_is_reached(wanted):
    profile = tokens.derive_profile(random_scores(), mean_kept=wanted)
    assert sum(profile) / len(profile) == pytest.approx(wanted)


def test_mean_kept_out_of_reach():
    flat = measured([0.25] * 4, [0.25] * 4)
    assert tokens.derive_profile(flat) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"mean_kept 0\.5 cannot be reached"):
        tokens.derive_profile(flat, mean_kept=0.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"statistic": "mode"}, "statistic must be"),
        ({"statistic": 1.0}, "statistic must be"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"mean_kept": 1.0}, r"mean_kept must lie in \(0, 1\)"),
    ],
)
def test_bad_arguments(options, problem):
    with pytest.raises(ValueError, match=problem):
        tokens.derive_profile(random_scores(), **options)


def test_bad_scores():
    with pytest.raises(ValueError, match="no token"):
        KeyScores([torch.zeros(0)], torch.tensor([0]))
    with pytest.raises(ValueError, match="layer 1 must have 2 finite numbers"):
        measured([0.5, 0.5], [math.nan, 0.5], lengths=(2,))


def test_fixed_counts():
    assert tokens.fixed_counts((1.0, 0.5, 0.01), 7) == (7, 4, 1)
    with pytest.raises(ValueError, match="length"):
        tokens.fixed_counts((1.0,), 0)


def test_calibrated_thresholds_leave_the_profiles_share():
    scores, profile = random_scores(lengths=(40, 25, 60)), (1.0, 0.8, 0.5, 0.3)
    thresholds = tokens.calibrate_thresholds(scores, profile)
    alive = torch.ones(125, dtype=torch.bool)
    for fraction, threshold, layer in zip(profile, thresholds, scores.scores, strict=True):
        alive &= layer >= threshold
        assert int(alive.sum()) <= math.ceil(fraction * 125)
    # Scores are distinct, and each layer still finds enough tokens to choose from.
    assert int(alive.sum()) == math.ceil(0.3 * 125)
    # 0.1 * 30 is a little above 3 in floating point.
    scores = random_scores(lengths=(30,))
    (*_, threshold) = tokens.calibrate_thresholds(scores, (1.0, 1.0, 1.0, 0.1))
    assert int((scores.scores[-1] >= threshold).sum()) == 3


def test_soft_thresholds_approach_the_hard_ones_and_learn():
    scores = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    soft = tokens.SoftThresholds(2, final=0.4, temperature=0.02)
    assert soft.hard() == pytest.approx((0.2, 0.4))
    mask = soft(scores, 0)
    assert mask.tolist() == pytest.approx([1 / (1 + math.exp(5)), 0.5, 1 / (1 + math.exp(-5))])
    mask.sum().backward()
    assert float(soft.threshold.grad[0]) < 0 and float(soft.threshold.grad[1]) == 0
    assert bool((scores.grad > 0).all())
    sharp = tokens.SoftThresholds(2, final=[0.15, 0.25], temperature=1e-5)
    assert sharp(scores, 1).tolist() == pytest.approx([0, 0, 1])
    with pytest.raises(ValueError, match="expected 2 numbers, got 1"):
        tokens.SoftThresholds(2, final=[0.1])


def brute_force(profile, lengths, hidden=8, inner=16):
    total, before = 0, 1.0
    for fraction in profile:
        for length in lengths:
            many, few = math.ceil(before * length), math.ceil(fraction * length)
            total += many * 3 * hidden * 2 * hidden  # query, key, value
            total += 2 * many * many * 2 * hidden  # scores, context
            total += few * hidden * 2 * hidden + few * 2 * hidden * 2 * inner
        before = fraction
    return total


def test_flops_count_what_each_layer_sees():
    lengths = [5, 16, 1]
    assert tokens.encoder_flops(None, lengths, BERT) == brute_force((1, 1), lengths)
    profile = (0.6, 0.2)
    assert tokens.encoder_flops(profile, lengths, BERT) == brute_force(profile, lengths)
    faster = tokens.predict_speedup(profile, lengths, BERT)
    assert faster == pytest.approx(brute_force((1, 1), lengths) / brute_force(profile, lengths))
    padded = tokens.predict_speedup(None, lengths, BERT, padded=16)
    assert padded == pytest.approx(brute_force((1, 1), [16] * 3) / brute_force((1, 1), lengths))
    distil = SimpleNamespace(n_layers=2, dim=8, hidden_dim=16)
    assert tokens.predict_speedup(profile, lengths, distil) == faster
    gated = SimpleNamespace(**vars(BERT), model_type="modernbert")
    extra = tokens.encoder_flops(None, lengths, gated) - tokens.encoder_flops(None, lengths, BERT)
    assert extra == 2 * 2 * 8 * 16 * sum(lengths)


def test_density_scales_the_linear_products_alone():
    lengths = [4, 7]
    attention = sum(2 * 2 * n * n * 2 * 8 for n in lengths)
    dense = tokens.encoder_flops(None, lengths, BERT)
    lean = tokens.encoder_flops(None, lengths, BERT, density=0.25)
    assert lean == pytest.approx((dense - attention) / 4 + attention)


def test_speed_for_a_speedup():
    profile, lengths = (0.9, 0.5), [64, 30]
    speed = tokens.speed_for(profile, 1.8, lengths, BERT)
    rescaled = tokens.rescale(profile, speed)
    assert tokens.predict_speedup(rescaled, lengths, BERT) == pytest.approx(1.8, rel=0.02)
    with pytest.raises(ValueError, match="speed-up of 3 cannot be reached"):
        tokens.speed_for((1.0, 1.0), 3, lengths, BERT)


def test_sizes_that_are_missing():
    with pytest.raises(ValueError, match="num_hidden_layers or n_layers"):
        tokens.encoder_flops(None, [3], SimpleNamespace(hidden_size=8))
