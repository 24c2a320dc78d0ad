# SPDX-License-Identifier: Apache-2.0
"""Timing in turn, and the files that results go into."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import environment

WORK = Path("out/experiments")
RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> dict:
    """What an earlier step wrote under this name, {} if nothing."""
    path = WORK / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store(name: str, content: dict) -> None:
    """Keep a step's outcome for `load`."""
    WORK.mkdir(parents=True, exist_ok=True)
    scratch = WORK / f"{name}.part"
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, WORK / f"{name}.json")


def one_round(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Make each call once: milliseconds of each, and what it returned."""
    milliseconds, found = {}, {}
    for name, call in calls.items():
        before = time.perf_counter()
        found[name] = call()
        milliseconds[name] = 1e3 * (time.perf_counter() - before)
    return milliseconds, found


def medians(rounds: Sequence[dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Per name the median milliseconds, and the median over rounds of the speed-up over `base`."""
    return {
        name: {
            "ms": float(np.median([row[name] for row in rounds])),
            "speedup": float(np.median([row[base] / row[name] for row in rounds])),
            "rounds": len(rounds),
        }
        for name in rounds[0]
    }


def describe_machine() -> dict:
    return environment.collect("cpu", torch.get_num_threads())


def publish(name: str, title: str, notes: Sequence[str], tables: dict, content: dict) -> None:
    """Write JSON and Markdown under bench/results/<device>/.

    Args:
        tables: title -> rows of text, the first the header.
    """
    folder = RESULTS / environment.device_slug(content["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# {title}", ""]
    for note in notes:
        lines += [note, ""]
    for heading, (header, *rows) in tables.items():
        rule = ["---", *["---:"] * (len(header) - 1)]
        cells = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
        lines += [f"## {heading}", "", *cells, ""]
    (folder / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {folder / name}.json and .md")
