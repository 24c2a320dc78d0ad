# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_kernels.nn.token_profile import check_profile, rescale

profiles = st.lists(st.floats(1e-300, 1), min_size=1, max_size=30).map(
    lambda values: sorted(values, reverse=True)
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(profiles, st.floats(0, 50), st.floats(0, 50))
def test_rescaled_profiles_are_profiles_and_fall_with_speed(profile, first, second):
    slow, fast = (rescale(profile, speed) for speed in sorted((first, second)))
    assert check_profile(slow, len(profile)) == slow and check_profile(fast) == fast
    assert all(a >= b for a, b in zip(slow, fast, strict=True))
    assert rescale(profile, 1) == tuple(profile)
    assert rescale(profile, 0) == (1.0,) * len(profile)


def test_rescale_is_a_power():
    assert rescale([1.0, 0.5, 0.25], 2) == (1.0, 0.25, 0.0625)
    assert rescale([1, 0.25], 0.5) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ([], "one per layer"),
        ("0.5", "list of numbers"),
        (0.5, "list of numbers"),
        ([1.0, 0.0], r"\(0, 1\], got 0.0"),
        ([1.5], r"got 1.5"),
        ([math.nan], "got nan"),
        ([True], "got True"),
        (["1"], "got '1'"),
        ([0.5, 0.6], "layer 0 keeps 0.5 and layer 1 0.6"),
    ],
)
def test_bad_profiles(profile, problem):
    with pytest.raises(ValueError, match=problem):
        rescale(profile, 1.0)


@pytest.mark.parametrize("speed", [-1, math.inf, math.nan, "2", True])
def test_bad_speed(speed):
    with pytest.raises(ValueError, match="speed must be"):
        rescale([0.5], speed)


def test_number_of_layers():
    with pytest.raises(ValueError, match="one number per layer, 3, got 2"):
        check_profile([1.0, 0.5], 3)
