# SPDX-License-Identifier: Apache-2.0
"""The density below which our layer beats the dense one, from measured speed-ups."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

ROWS = 128  # one sequence of ordinary length: the m at which layers are judged


def interpolate(points: Sequence[tuple[float, float]]) -> float:
    """Density at which the speed-up falls to 1, from (density, speed-up) points.

    Linear between points in log density and log speed-up. 1.0 where every point is faster, 0.0
    where none is; of several crossings the one of lowest density, so that no gain is promised
    beyond it.
    """
    ordered = sorted(points)
    if ordered[0][1] < 1:
        return 0.0
    for (d0, s0), (d1, s1) in pairwise(ordered):
        if s1 < 1:
            fraction = math.log(s0) / (math.log(s0) - math.log(s1))
            return math.exp(math.log(d0) + fraction * (math.log(d1) - math.log(d0)))
    return 1.0


def table(records: Iterable[Mapping]) -> dict[str, dict[str, float]]:
    """dtype -> "32x32" -> break-even density, from records of mode "forward" with m = ROWS.

    Where shapes and masks differ the slowest counts. Blocks measured at fewer than two densities
    are left out.
    """
    slowest: dict = defaultdict(dict)
    for record in records:
        config = record["config"]
        if config.get("mode") != "forward" or config.get("m") != ROWS or "ratios" not in record:
            continue
        speeds = slowest[config["dtype"], config["block"]]
        density, speed = config["density"], record["ratios"]["dense"]
        speeds[density] = min(speeds.get(density, math.inf), speed)
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (dtype, block), speeds in sorted(slowest.items()):
        if len(speeds) > 1:
            result[dtype][block] = round(interpolate(list(speeds.items())), 3)
    return dict(result)
