# SPDX-License-Identifier: Apache-2.0
"""Speed-up over density, with the ideal and the break-even line."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def plottable(run: Mapping) -> list[Mapping]:
    """Records that have a place in the plot: block-sparse forward passes compared with dense."""
    return [
        record
        for record in run["records"]
        if "block" in record["config"]
        and record["config"].get("mode", "forward") == "forward"
        and "dense" in record.get("ratios", {})
    ]


def speedup_over_density(run: Mapping, path: Path) -> None:
    """One panel per dtype and m; lines: geometric means over shapes and masks, bands: their range.

    Raises ValueError if no record compares with "dense"; ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in plottable(run):
        config = record["config"]
        panel = ", ".join(f"{k} = {config[k]}" for k in ("dtype", "m") if k in config)
        panels[panel][config["block"]][config["density"]].append(record["ratios"]["dense"])
    if not panels:
        raise ValueError("nothing to plot: no forward record was compared with dense")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, blocks) in zip(axes.flat, sorted(panels.items()), strict=False):
        densities = sorted({density for points in blocks.values() for density in points})
        ideal = np.geomspace(min(densities) / 1.2, 1, 50)
        axis.plot(ideal, 1 / ideal, "k--", linewidth=1, label="ideal: 1 / density")
        axis.axhline(1, color="black", linewidth=1, label="break-even with dense")
        for block, points in blocks.items():
            x = sorted(points)
            mean = [float(np.exp(np.mean(np.log(points[density])))) for density in x]
            (line,) = axis.plot(x, mean, "o-", markersize=4, label=block)
            low, high = ([f(points[density]) for density in x] for f in (min, max))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", yscale="log", title=title)
        axis.set(xlabel="density (kept fraction)", ylabel="speed-up over dense")
        axis.set_xticks(densities, [f"{density:g}" for density in densities])
        axis.minorticks_off()
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 5, 10, 20) if _inside(axis, tick)]
        axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(
        f"{run['case']} on {run['environment'].get('gpu') or run['environment']['cpu']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _inside(axis, value: float) -> bool:
    low, high = axis.get_ylim()
    return low <= value <= high
