# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: it checks before it times, and its arithmetic is right."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from bench import break_even, clock, environment, masks, plot, registry, report, run, runner
from bench.block_sparse_competitors import MODES, Config, prepare

TINY = Config(shape="64x48", m=5, density=0.5, block="16x16")


def _competitor(call, expected, tolerance=1e-6):
    return registry.Competitor(call, (expected,), tolerance)


def _case(*configs, prepare=prepare, requirements=()):
    return registry.Case(
        "block_sparse_linear",
        {"quick": lambda: list(configs), "numbers": lambda: list(configs)},
        prepare,
        requirements,
        table="mode",
    )


def _quiet():
    return Console(quiet=True)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y * 1.001,
        lambda y: y[:-1],
        lambda y: torch.full_like(y, math.nan),
        lambda y: (y, y),
    ],
)
def test_wrong_competitor_is_refused(wrong):
    expected = torch.randn(4, 4, dtype=torch.float64)
    calls = {
        "lean": _competitor(lambda: expected.float(), expected),
        "broken": _competitor(lambda: wrong(expected), expected),
    }
    with pytest.raises(runner.WrongResult, match="broken"):
        runner.check(calls, threads=1)


def test_wrong_competitor_is_never_timed(monkeypatch, tmp_path):
    def corrupted(config, options):
        workload = prepare(config, options)
        dense = workload.competitors["dense"]
        calls = dict(workload.competitors)
        calls["dense"] = registry.Competitor(lambda: dense.call() + 1, dense.expected, 1e-4)
        return registry.Workload(calls)

    case = _case(TINY, prepare=corrupted)
    monkeypatch.setattr(registry, "load", lambda name: case)
    monkeypatch.setattr(runner, "measure", lambda *args, **kwargs: pytest.fail("timed it"))
    monkeypatch.setattr(run.peak, "roof", lambda threads: {})
    path = tmp_path / "out.json"
    code = run.main("block_sparse_linear", quick=True, json_out=path, console=_quiet())
    assert code == run.WRONG
    (record,) = json.loads(path.read_text())["records"]
    assert "dense" in record["refused"] and "competitors" not in record


def test_a_group_runs_each_of_its_cases(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.GROUPS, "both", ("first", "second"))
    asked = []

    def load(name):
        asked.append(name)
        return _case(TINY)

    monkeypatch.setattr(registry, "load", load)

    def outcome(*args):
        missed = {"pass": asked[-1] == "first"}
        return {"settings": {}, "records": [], "requirements": [missed]}

    monkeypatch.setattr(run, "_run", outcome)
    monkeypatch.setattr(run.report, "show", lambda *args: None)
    assert run.main("both", quick=True, console=_quiet()) == run.MISSED
    assert asked == ["first", "second"]
    with pytest.raises(ValueError, match="both is first, second: name one of these"):
        run.main("both", json_out=tmp_path / "out.json", console=_quiet())


def test_relative_error_knows_scale_shape_and_nan():
    expected = torch.full((3,), 100.0)
    assert runner.relative_error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-3)
    assert runner.relative_error(expected[:2], expected) == math.inf
    assert runner.relative_error(expected * math.nan, expected) == math.inf
    assert runner.relative_error(torch.ones(3), torch.zeros(3)) > 1


def test_rounds_are_interleaved_and_every_call_is_counted():
    order = []
    calls = {
        name: registry.Competitor(lambda name=name: order.append(name), (), 0)
        for name in ("ours", "theirs")
    }
    timings = runner.measure(calls, threads=1, budget=0.05)
    assert set(timings) == set(calls)
    for name, timing in timings.items():
        assert len(timing.seconds) >= runner.MIN_ROUNDS and min(timing.seconds) > 0
        low, high = timing.spread
        assert low <= timing.median <= high
        rounds, inner = len(timing.seconds), timing.calls_per_sample
        assert order.count(name) == 2 * (2 + rounds * inner)  # half of them untimed
    switches = sum(a != b for a, b in pairwise(order))
    assert switches >= 2 * runner.MIN_ROUNDS - 1


def test_short_calls_find_warm_caches_and_long_ones_are_timed_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    for first, later, calls, made in ((5e-3, 1e-3, 1, 2), (5e-3, 1e-3, 3, 6), (0.03, 0.02, 1, 1)):
        durations = iter([first, *[later] * 9])

        def call(durations=durations):
            now[0] += next(durations)

        assert clock.host(call, calls) == pytest.approx(first if made == 1 else later)
        assert len(list(durations)) == 10 - made


def test_slow_competitor_sits_out_later_rounds():
    calls = {
        "ours": registry.Competitor(lambda: time.sleep(0.002), (), 0),
        "slow": registry.Competitor(lambda: time.sleep(0.05), (), 0),
        "fast": registry.Competitor(lambda: time.sleep(0.001), (), 0),
    }
    timings = runner.measure(calls, threads=1, budget=0.4)
    assert len(timings["slow"].seconds) == runner.MIN_ROUNDS
    assert len(timings["ours"].seconds) >= len(timings["slow"].seconds)
    assert runner.ratio(timings["slow"], timings["ours"]) == pytest.approx(25, rel=0.5)


def test_ratio_is_the_median_of_per_round_ratios():
    ours = runner.Timing((1.0, 10.0, 1.0), 1)
    theirs = runner.Timing((2.0, 20.0, 5.0), 1)
    assert runner.ratio(theirs, ours) == 2.0


def test_threads_and_grad_mode_are_restored():
    seen = []
    calls = {"ours": registry.Competitor(lambda: seen.append(torch.get_num_threads()), (), 0, 2)}
    before = torch.get_num_threads()
    runner.measure(calls, threads=1, budget=0.01)
    assert set(seen) == {2} and torch.get_num_threads() == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_passes_its_own_check(mode, dtype):
    config = Config(
        shape="64x48", m=5, density=0.5, block="16x16", dtype=dtype, mask="skewed", mode=mode
    )
    workload = prepare(config, registry.Options(threads=1))
    with torch.set_grad_enabled(workload.grad):
        errors = runner.check(workload.competitors, threads=1)
    assert next(iter(errors)) == "lean"
    assert workload.ideal == pytest.approx(2, rel=0.1)


def test_all_peers_are_right():
    config = Config(**{**TINY.__dict__, "peers": "all"})
    workload = prepare(config, registry.Options(threads=1))
    expected = {"lean", "dense", "BSR F.linear", "BSR mm"}
    expected |= {"compiled"} if environment.can_compile() else set()
    with torch.no_grad():
        assert set(runner.check(workload.competitors, threads=1)) == expected


@pytest.mark.parametrize("mask", masks.MASKS)
def test_int8_costs_what_its_steps_say(mask):
    fields = {"shape": "256x320", "m": 64, "mask": mask, "mode": "int8"}
    workload = prepare(Config(**TINY.__dict__ | fields), registry.Options(threads=1))
    lean = workload.competitors["lean"]
    with torch.no_grad():
        errors = runner.check(workload.competitors, threads=1)
    assert set(errors) >= {"lean", "lean float32", "dense"}
    assert errors["lean"] == pytest.approx(lean.tolerance / 1.5, rel=0.1)
    assert lean.tolerance < 0.02


def test_named_impl_times_the_op():
    workload = prepare(TINY, registry.Options(threads=1, impl="reference"))
    with torch.no_grad():
        assert runner.check(workload.competitors, threads=1)["lean"] <= 1e-6
    with pytest.raises(ValueError, match="unknown impl"):
        prepare(TINY, registry.Options(threads=1, impl="nonsense")).competitors["lean"].call()


@pytest.mark.parametrize("kind", masks.MASKS)
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (3, 5), (1, 1)])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
def test_masks_keep_the_stated_number_of_blocks(kind, shape, density):
    mask = masks.block_mask(kind, *shape, density, torch.Generator().manual_seed(1))
    assert mask.shape == shape and mask.dtype == torch.bool
    assert int(mask.sum()) == max(1, round(density * shape[0] * shape[1]))


def test_skewed_rows_differ_more_than_uniform_ones():
    counts = {}
    for kind in masks.MASKS:
        mask = masks.block_mask(kind, 64, 64, 0.2, torch.Generator().manual_seed(1))
        counts[kind] = mask.sum(dim=1).sort(descending=True).values
    assert counts["skewed"][0] == 64 and counts["uniform"][0] < 32
    with pytest.raises(ValueError, match="unknown kind"):
        masks.block_mask("striped", 4, 4, 0.5, torch.Generator())


def test_break_even_interpolation():
    # speed-up 0.5 / density: 1 at 0.5, on a straight line in the logarithms
    points = [(density, 0.5 / density) for density in (0.1, 0.2, 0.8, 1.0)]
    assert break_even.interpolate(points) == pytest.approx(0.5)
    assert break_even.interpolate([(0.1, 9.0), (1.0, 1.1)]) == 1.0
    assert break_even.interpolate([(0.1, 0.9), (1.0, 2.0)]) == 0.0
    assert break_even.interpolate([(0.1, 2), (0.2, 0.5), (0.4, 2), (0.8, 0.5)]) < 0.2


def test_break_even_takes_the_slowest_and_needs_two_densities():
    def record(density, speed, dtype="float32", mode="forward", m=break_even.ROWS):
        config = {"mode": mode, "m": m, "dtype": dtype, "block": "32x32", "density": density}
        return {"config": config, "ratios": {"dense": speed}}

    records = [
        record(0.25, 3.0),
        record(0.25, 2.0),
        record(1.0, 0.5),
        record(1.0, 9.0, mode="scaling"),
        record(1.0, 0.1, m=1),
        record(0.25, 2.0, dtype="bfloat16"),
        {"config": record(0.5, 1)["config"], "refused": "wrong"},
    ]
    assert break_even.table(records) == {"float32": {"32x32": 0.5}}


def test_report_of_a_tiny_run(monkeypatch, tmp_path):
    rows = (TINY, Config(**{**TINY.__dict__, "density": 1.0}))
    requirements = [
        registry.Requirement(
            "easy", "0", lambda: rows, lambda r: r["ratios"]["dense"], lambda r: 0.0
        ),
        registry.Requirement(
            "hard", "1e9", lambda: rows, lambda r: r["ratios"]["dense"], lambda r: 1e9
        ),
        registry.Requirement(
            "absent", "1", lambda: rows, lambda r: r["ratios"]["nobody"], lambda r: 1.0
        ),
    ]
    case = _case(*rows, requirements=requirements)
    monkeypatch.setattr(registry, "load", lambda name: case)
    monkeypatch.setattr(run.peak, "fma_peak", lambda threads: 100.0 * threads)
    monkeypatch.setattr(run.peak, "read_bandwidth", lambda threads: 10.0)
    paths = {f"{kind}_out": tmp_path / kind for kind in ("json", "markdown", "break_even")}
    code = run.main(
        "block_sparse_linear", suite="numbers", budget=0.01, threads=1, console=_quiet(), **paths
    )
    assert code == run.MISSED
    result = json.loads(paths["json_out"].read_text())
    assert set(result) == {
        "schema",
        "case",
        "suite",
        "environment",
        "roof",
        "settings",
        "records",
        "break_even",
        "requirements",
    }
    assert {"cpu", "isa", "cores", "threads", "versions", "commit", "dirty", "load_average"} <= set(
        result["environment"]
    )
    record = result["records"][0]
    assert set(record["competitors"]) == {"lean", "dense"}
    assert {"median_s", "p20_s", "p80_s", "rounds", "error", "tolerance", "threads"} <= set(
        record["competitors"]["lean"]
    )
    assert record["peak_fraction"] == pytest.approx(record["gflops"] / 100)
    assert [row["pass"] for row in result["requirements"]] == [True, False, False]
    assert result["requirements"][2]["measured"] == 0
    text = paths["markdown_out"].read_text()
    assert "| easy | 0 |" in text and "FAIL" in text and "not measured" in text


@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16"}, {"mode": "int8"}], ids=str)
def test_only_float32_is_held_against_the_roof_of_float32(change):
    case, options = _case(), registry.Options(threads=1)
    record = runner.run_config(case, replace(TINY, **change), options, budget=0.01, roof=100.0)
    assert "gflops" in record and ("peak_fraction" in record) == (not change)


def test_refused_configurations_stay_in_the_table():
    config = {"mode": "forward", "m": 1}
    (grid,) = report.measurements(_case(TINY), [{"config": config, "refused": "lean: wrong"}])
    assert report.REFUSED in grid.markdown()


@pytest.mark.parametrize(
    ("only", "problem"),
    [(["colour=red"], "fields are"), (["density=0.3"], "takes 0.5 there")],
)
def test_filters_that_match_nothing_are_errors(only, problem):
    with pytest.raises(ValueError, match=problem):
        registry.select(_case(TINY), "quick", only)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown benchmark case"):
        registry.load("nothing")
    with pytest.raises(ValueError, match="unknown suite"):
        registry.select(_case(TINY), "nothing")


@pytest.mark.parametrize("option", [{"threads": 0}, {"budget": -1.0}], ids=str)
def test_nothing_is_measured_in_no_time_or_on_no_thread(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be positive"):
        run.main("block_sparse_linear", **option)


@pytest.mark.parametrize("name", registry.CASES)
def test_every_suite_covers_its_requirements(name):
    case = registry.load(name)
    numbers = set(registry.select(case, "numbers"))
    assert numbers <= set(registry.select(case, "full"))
    for requirement in case.requirements:
        assert set(requirement.configs()) <= numbers
    assert 0 < len(registry.select(case, "quick")) <= 25


def test_only_block_sparse_products_are_plotted():
    compared = {"ratios": {"dense": 2.0}}
    block = compared | {"config": {"block": "32x32", "density": 0.5}}
    tokens = compared | {"config": {"kept": 0.5, "density": 1.0}}
    backward = compared | {"config": {"block": "32x32", "mode": "forward_backward"}}
    alone = {"config": {"block": "32x32", "density": 0.5}}
    assert plot.plottable({"records": [tokens, block, backward, alone]}) == [block]
