# SPDX-License-Identifier: Apache-2.0
"""Tables and JSON of a run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import environment
from bench.registry import Case, Requirement

SCHEMA = 1
REFUSED = "refused: wrong"


@dataclass(frozen=True)
class Grid:
    """A titled table of text, printed by rich or written as Markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for place, name in enumerate(self.header):
            table.add_column(name, justify="left" if place == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rule = ["---"] + ["---:"] * (len(self.header) - 1)
        return "\n".join([f"### {self.title}", "", *map(line, (self.header, rule, *self.rows))])


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(timing: Mapping) -> str:
    median, low, high = (timing[key] * 1e3 for key in ("median_s", "p20_s", "p80_s"))
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def measurements(case: Case, records: Sequence[Mapping]) -> list[Grid]:
    """One table per value of the case's `table` field, a row per configuration, in run order."""
    groups: dict[str, list[Mapping]] = {}
    for record in records:
        groups.setdefault(str(record["config"].get(case.table, case.name)), []).append(record)
    return [_measurements(title, group, case.table) for title, group in groups.items()]


def _measurements(title: str, records: Sequence[Mapping], table: str | None) -> Grid:
    configs = [record["config"] for record in records]
    fields = [field for field in configs[0] if field not in (table, "peers")]
    constant = [f for f in fields if len({str(config[f]) for config in configs}) == 1]
    if len(records) > 1:
        title = ", ".join([title, *(f"{f} {configs[0][f]}" for f in constant)])
        fields = [field for field in fields if field not in constant]
    timed = [record for record in records if "competitors" in record]
    others = list(dict.fromkeys(name for record in timed for name in record["ratios"]))
    facts = list(dict.fromkeys(name for record in timed for name in record["facts"]))
    columns: dict[str, Callable[[Mapping], str]] = {
        "lean ms (p20-p80)": lambda r: _milliseconds(r["competitors"][r["ours"]]),
        **{name: partial(_ratio, name) for name in others},
        "of ideal": lambda r: _number(_of_ideal(r)),
        **{name: partial(_fact, name) for name in facts if name not in fields},
        "GFLOP/s": lambda r: _number(r.get("gflops"), "{:.0f}"),
        "of peak": lambda r: _number(r.get("peak_fraction"), "{:.0%}"),
        "error": lambda r: f"{r['competitors'][r['ours']]['error']:.0e}",
    }
    cells = {name: [cell(record) for record in timed] for name, cell in columns.items()}
    columns = {name: cell for name, cell in columns.items() if {*cells[name]} - {"-"}}
    rows = []
    for record in records:
        row = [str(record["config"][field]) for field in fields]
        if record in timed:
            row += [cell(record) for cell in columns.values()]
        else:
            row += [REFUSED, *["-"] * (len(columns) - 1)]
        rows.append(row)
    return Grid(title, [*fields, *(columns or [REFUSED])], rows)


def _ratio(name: str, record: Mapping) -> str:
    return _number(record["ratios"].get(name), "{:.2f}x")


def _fact(name: str, record: Mapping) -> str:
    return _number(record["facts"].get(name), "{:.3g}")


def _of_ideal(record: Mapping) -> float | None:
    """Speed-up over dense as a fraction of what the kept work would allow."""
    if "ideal" not in record or "dense" not in record["ratios"]:
        return None
    return record["ratios"]["dense"] / record["ideal"]


def evaluate(requirements: Sequence[Requirement], records: Sequence[Mapping]) -> list[dict]:
    """Required and measured of each promised number, over its configurations among the records."""
    by_config = {json.dumps(record["config"]): record for record in records}
    results = []
    for requirement in requirements:
        keys = [json.dumps(asdict(config)) for config in requirement.configs()]
        present = [by_config[key] for key in keys if key in by_config]
        timed = [record for record in present if _has(requirement, record)]
        result = {
            "what": requirement.what,
            "required": requirement.required,
            "configurations": len(keys),
            "measured": len(timed),
            "refused": sum("refused" in record for record in present),
        }
        if timed:
            worst = min(timed, key=requirement.margin)
            result |= {
                "worst": requirement.value(worst),
                "worst_config": worst["config"],
                "median": float(np.median([requirement.value(record) for record in timed])),
                "met": sum(requirement.margin(record) >= 0 for record in timed),
            }
        result["pass"] = bool(timed) and not result["refused"] and result["met"] == len(timed)
        results.append(result)
    return results


def _has(requirement: Requirement, record: Mapping) -> bool:
    try:
        return math.isfinite(requirement.value(record))
    except KeyError:
        return False


def requirements(results: Sequence[Mapping]) -> Grid:
    """Required against measured, one row per promised number."""
    rows = []
    for result in results:
        measured = result["measured"]
        config = result.get("worst_config", {})
        verdict = "pass" if result["pass"] else "FAIL" if measured else "not measured"
        rows.append(
            [
                result["what"],
                result["required"],
                _number(result.get("worst")),
                _number(result.get("median")),
                f"{result.get('met', 0)} / {measured}"
                + (f", {result['refused']} refused" if result["refused"] else ""),
                verdict,
                " ".join(str(value) for value in config.values()) or "-",
            ]
        )
    header = ["what", "required", "worst", "median", "met", "verdict", "worst configuration"]
    return Grid("Required and measured", header, rows)


def break_even(densities: Mapping[str, Mapping[str, float]]) -> Grid:
    """Below which density each block shape beats dense, per dtype."""
    blocks = list(dict.fromkeys(block for row in densities.values() for block in row))
    rows = [[dtype, *(_number(row.get(b)) for b in blocks)] for dtype, row in densities.items()]
    return Grid("Break-even density (slowest of shapes and masks)", ["dtype", *blocks], rows)


def grids(case: Case, run: Mapping) -> list[Grid]:
    """Every table of a run."""
    found = measurements(case, run["records"])
    if run["break_even"]:
        found.append(break_even(run["break_even"]))
    if run["requirements"]:
        found.append(requirements(run["requirements"]))
    return found


def headline(run: Mapping) -> str:
    """Case, suite, machine and roof, in one paragraph."""
    roof = run["roof"]
    peak = roof.get("fma_gflops")
    known = "unknown" if peak is None else f"{peak:.0f} GFLOP/s"
    if peak is not None and run["settings"]["threads"] > 1:
        known += f" ({roof['fma_gflops_1_thread']:.0f} on one thread)"
    text = f"{run['case']}, suite {run['suite']}: {environment.describe(run['environment'])}. "
    text += f"Multiply-add peak {known}"
    if roof.get("read_gb_per_s") is not None:
        text += f", memory read {roof['read_gb_per_s']:.0f} GB/s"
    return text + ". Columns with x: that competitor's time over ours, above 1 we are faster."


def show(case: Case, run: Mapping, console: Console) -> None:
    console.print(headline(run))
    for grid in grids(case, run):
        console.print(grid.rich())


def write_json(run: Mapping, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")


def write_markdown(case: Case, run: Mapping, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [grid.markdown() for grid in grids(case, run)]
    path.write_text("\n\n".join([f"# {run['case']}", headline(run), *tables]) + "\n")
