# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of retention profiles: which fraction of its tokens a sequence keeps in which layer.

A profile has one number per layer, in (0, 1] and never rising: the fraction of a sequence's
*original* tokens that are left after that layer's attention. Plain Python, no torch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise


def check_profile(profile: Sequence[float], layers: int | None = None) -> tuple[float, ...]:
    """The profile as a tuple of floats.

    Args:
        layers: the number of layers it must have; None accepts any but none.

    Raises:
        ValueError: not a list of numbers in (0, 1] that never rise, or not one per layer.
    """
    if isinstance(profile, (str, bytes)) or not isinstance(profile, Sequence) or not profile:
        raise ValueError(f"profile must be a list of numbers, one per layer, got {profile!r}")
    for value in profile:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"profile must hold numbers in (0, 1], got {value!r}")
    for place, (before, after) in enumerate(pairwise(profile)):
        if after > before:
            raise ValueError(
                f"profile must not rise, a dropped token cannot come back; layer {place} keeps "
                f"{before:g} and layer {place + 1} {after:g}"
            )
    if layers is not None and len(profile) != layers:
        raise ValueError(f"profile must have one number per layer, {layers}, got {len(profile)}")
    return tuple(float(value) for value in profile)


def rescale(profile: Sequence[float], speed: float) -> tuple[float, ...]:
    """The profile raised to the power `speed`, layer by layer.

    `speed` 1 leaves it as it is; higher keeps fewer tokens, lower more, 0 all of them. A power
    keeps every number in (0, 1] and the profile from rising, and a layer that keeps all goes on
    doing so: whatever `speed`, tokens start to go in the layer where they went in training.

    Raises:
        ValueError: a wrong profile, or a speed that is negative or not finite.
    """
    if isinstance(speed, bool) or not isinstance(speed, (int, float)):
        raise ValueError(f"speed must be a number, got {speed!r}")
    if not 0 <= speed < math.inf:
        raise ValueError(f"speed must be finite and not negative, got {speed}")
    # A fraction so small that its power is 0 still keeps a token of each sequence.
    smallest = 2.0**-1000
    return tuple(max(value**speed, smallest) for value in check_profile(profile))
