# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_kernels.nn.dropout_attention import dropout_attention
from lean_kernels.nn.packing import Schedule, kept_counts, padding_mask, unpad
from lean_kernels.ops.ragged_attention import ragged_attention

MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]])


@pytest.mark.parametrize(
    "form",
    [
        MASK,
        MASK.bool(),
        MASK.float(),
        MASK.bool()[:, None, None].expand(3, 1, 3, 3),
        MASK.bool()[:, None, None],
        MASK.bool()[:, None, None].expand(3, 2, 3, 3).contiguous(),
        (1.0 - MASK.float())[:, None, None].expand(3, 1, 3, 3) * torch.finfo(torch.float32).min,
        torch.zeros(3, 1, 1, 3).masked_fill(MASK[:, None, None] == 0, -torch.inf),
    ],
)
def test_every_form_of_a_padding_mask(form):
    found = padding_mask(form, 3, 3)
    assert found.dtype == torch.bool and torch.equal(found, MASK.bool())
    lengths, places = unpad(found, 3, 3)
    assert lengths.tolist() == [2, 0, 2] and places.tolist() == [0, 1, 6, 8]


@pytest.mark.parametrize(
    "form",
    [
        torch.ones(3, 3, 3, dtype=torch.bool),
        torch.ones(2, 3),
        torch.ones(2, 1, 3, 3, dtype=torch.bool),
        torch.ones(3, 1, 3, 4, dtype=torch.bool),
        torch.ones(3, 1, 3, 3, dtype=torch.bool).tril(),
        torch.linspace(-1, 0, 9).view(1, 1, 1, 9)[..., :3].expand(3, 1, 3, 3),
    ],
)
def test_what_is_no_padding_mask(form):
    with pytest.raises(ValueError, match="LeanEncoder"):
        padding_mask(form, 3, 3)


def test_no_padding_needs_no_places():
    assert padding_mask(None, 2, 5) is None
    for mask in (None, torch.ones(2, 5, dtype=torch.bool)):
        lengths, places = unpad(mask, 2, 5)
        assert lengths.tolist() == [5, 5] and places is None


LENGTHS = st.lists(st.integers(0, 300), max_size=6)
PROFILES = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6).map(
    lambda values: sorted(values, reverse=True)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, PROFILES, st.integers(1, 2), st.booleans())
def test_counts_of_a_profile(lengths, profile, protected, first_only):
    rows = kept_counts(
        np.array(lengths, dtype=np.int64), len(profile), profile=profile, protected=protected,
        first_only=first_only,
    )  # fmt: skip
    assert rows[0].tolist() == lengths and (np.diff(rows, axis=0) <= 0).all()
    for layer, fraction in enumerate(profile):
        for place, length in enumerate(lengths):
            if first_only and layer == len(profile) - 1:
                expected = min(length, 1)
            else:
                expected = max(math.ceil(fraction * length - 1e-6), min(protected, length))
            assert rows[layer + 1, place] == expected


def test_counts_without_a_profile():
    lengths = np.array([5, 0, 2])
    assert kept_counts(lengths, 2).tolist() == [[5, 0, 2]] * 3
    assert kept_counts(lengths, 2, counts=(4, 1)).tolist() == [[5, 0, 2], [4, 0, 2], [1, 0, 1]]
    assert kept_counts(np.array([30]), 1, profile=(0.1,)).tolist() == [[30], [3]]  # not 4


def test_schedule():
    schedule = Schedule(np.array([[5, 0, 2], [3, 0, 2], [3, 0, 2]]), torch.device("cpu"))
    assert [cu.tolist() for cu in schedule.cu_seqlens] == [[0, 5, 5, 7], [0, 3, 3, 5], [0, 3, 3, 5]]
    assert all(cu.dtype == torch.int32 for cu in schedule.cu_seqlens)
    assert schedule.totals == [7, 5, 5] and schedule.longest == [5, 3, 3]
    assert schedule.drops(0) and not schedule.drops(1)
    assert schedule.keep[1].tolist() == [3, 0, 2] and schedule.keep.dtype == torch.int32
    assert schedule.restrict([2]).cu_seqlens[0].tolist() == [0, 2]
    schedule.after_threshold(0, torch.tensor([0, 1, 1, 3], dtype=torch.int32), 3)
    assert [cu.tolist() for cu in schedule.cu_seqlens] == [[0, 5, 5, 7], [0, 1, 1, 3], [0, 1, 1, 3]]
    assert schedule.totals == [7, 3, 3]
    assert schedule.keep.tolist() == [[5, 0, 2], [1, 0, 2], [1, 0, 2]]


def _problem(window, heads_kv, cross):
    torch.manual_seed(0)
    lengths, keys = [5, 0, 2, 1], [7, 3, 2, 4] if cross else [5, 0, 2, 1]
    cu, cu_k = (
        torch.tensor([0, *np.cumsum(n).tolist()], dtype=torch.int32) for n in (lengths, keys)
    )
    q, k, v = (
        torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True)
        for n, h in ((sum(lengths), 4), (sum(keys), heads_kv), (sum(keys), heads_kv))
    )
    options = {"scale": 0.4, "window": window, "causal": cross}
    if cross:
        options["cu_seqlens_k"] = cu_k
    elif window is not None:
        options["positions"] = torch.tensor([0, 2, 3, 5, 9, 1, 4, 7], dtype=torch.int32)
    return (q, k, v, cu), options


@pytest.mark.parametrize("window", [None, (2, 1)])
@pytest.mark.parametrize(("heads_kv", "cross"), [(4, False), (2, False), (2, True)])
@pytest.mark.parametrize("scores", [None, "mean", "sum"])
def test_attention_with_dropout_of_nothing_is_ragged_attention(window, heads_kv, cross, scores):
    args, options = _problem(window, heads_kv, cross)
    options |= {"key_scores": scores, "exclude_diagonal": scores is not None}
    expected = ragged_attention(*args, impl="reference", **options)
    expected, of_keys = expected if scores else (expected, None)
    found, found_scores = dropout_attention(*args, 0.0, **options)
    torch.testing.assert_close(found, expected)
    if scores:
        torch.testing.assert_close(found_scores, of_keys)
    upstream = torch.randn_like(found)
    grads = (torch.autograd.grad((out * upstream).sum(), args[:3]) for out in (found, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_keeps_the_mean_and_not_the_scores():
    args, options = _problem(None, 4, False)
    args = [t.detach() for t in args]
    options["key_scores"] = "mean"
    exact, scores = dropout_attention(*args, 0.0, **options)
    torch.manual_seed(1)
    runs = [dropout_attention(*args, 0.25, **options) for _ in range(1000)]
    mean = torch.stack([out for out, _ in runs]).mean(0)
    # One run strays by sqrt(p / (1 - p)) * |v| at most: 4 standard errors of 1000 runs.
    bound = 4 * (0.25 / 0.75) ** 0.5 * args[2].abs().max() / 1000**0.5
    assert (mean - exact).abs().max() < bound < 0.3
    assert all(torch.equal(found, scores) for _, found in runs[:5])
    assert not torch.equal(runs[0][0], runs[1][0])
