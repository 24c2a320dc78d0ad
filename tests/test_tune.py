# SPDX-License-Identifier: Apache-2.0
"""Tables of tile sizes: where they come from, and how tune fills them."""

import importlib
import json
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from lean_kernels import _tuning
from lean_kernels.cli import app
from lean_kernels.tune import OPS, Problem, choose, problems, tune

OP = "block_sparse_linear"
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that has a name and a folder for its tables."""
    monkeypatch.setenv("LEAN_KERNELS_CONFIGS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(_tuning, "architecture", lambda device: "sm_90")
    _tuning._of_files.cache_clear()
    yield torch.device("cuda", 0)
    _tuning._of_files.cache_clear()


def test_a_table_of_the_device_wins_over_that_of_its_architecture(gpu):
    shipped = _tuning.table("ragged_attention", gpu)
    assert shipped["half"]["tiles"]["64"] == [128, 64, 8, 3]
    file = _tuning.save("ragged_attention", gpu, {"half": {"tiles": {"64": [64, 64, 4, 2]}}})
    assert file.name == "nvidia-h200.json"
    tuned = _tuning.table("ragged_attention", gpu)
    assert tuned["half"]["tiles"]["64"] == [64, 64, 4, 2]
    assert tuned["half"]["tiles"]["128"] == shipped["half"]["tiles"]["128"]


def test_saving_keeps_what_was_tuned_before(gpu):
    _tuning.save(OP, gpu, {"matmul": {"a": 1}})
    file = _tuning.save(OP, gpu, {"matmul": {"b": 2}})
    assert json.loads(file.read_text()) == {"matmul": {"a": 1, "b": 2}}


def test_an_untuned_device_is_told_of_once(gpu, caplog):
    with caplog.at_level("INFO", logger="lean_kernels"):
        for _ in range(3):
            _tuning.table(OP, gpu)
    assert [record.getMessage() for record in caplog.records] == [
        f"{OP}: no measured tile sizes for nvidia-h200; `lean-kernels tune {OP}` makes them"
    ]


def test_an_override_ends_with_its_block():
    with _tuning.override(OP, {"a": {"b": 1}}):
        with _tuning.override(OP, {"a": {"c": 2}}):
            assert _tuning.table(OP, CPU)["a"] == {"b": 1, "c": 2}
        assert _tuning.table(OP, CPU)["a"] == {"b": 1}
    assert "a" not in _tuning.table(OP, CPU)


def size() -> int:
    return _tuning.table(OP, CPU)["tile"]


def candidates(*sizes):
    return [{"tile": size} for size in sizes]


def right() -> torch.Tensor:
    return torch.ones(4)


def wrong_at_two() -> torch.Tensor:
    return torch.full((4,), 2.0 if size() == 2 else 1.0)


def test_the_fastest_candidate_wins():
    times = {1: 4.0, 2: 1.0, 3: 2.0}
    choice = choose(OP, Problem("", candidates(1, 2, 3), [right]), lambda call: times[size()])
    assert (choice.best, choice.speedup, choice.refused) == ({"tile": 2}, 4.0, 0)


def test_a_wrong_candidate_is_refused_however_fast():
    times = {1: 4.0, 2: 1.0, 3: 2.0}
    problem = Problem("", candidates(1, 2, 3), [wrong_at_two])
    choice = choose(OP, problem, lambda call: times[size()])
    assert (choice.best, choice.speedup, choice.refused) == ({"tile": 3}, 2.0, 1)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_candidate_too_large_for_the_device_is_refused():
    from triton.runtime.errors import OutOfResources

    def large() -> torch.Tensor:
        if size() == 2:
            raise OutOfResources(300, 227, "shared memory")
        return torch.ones(4)

    choice = choose(OP, Problem("", candidates(1, 2), [large]), lambda call: 1.0)
    assert (choice.best, choice.refused) == ({"tile": 1}, 1)
    with pytest.raises(RuntimeError, match="the untuned tiles do not run"):
        choose(OP, Problem("", candidates(2), [large]), lambda call: 1.0)


def test_later_choices_are_made_with_earlier_ones_in_force():
    seen = []

    def two():
        yield Problem("first", candidates(1, 2), [right])
        seen.append(size())
        yield Problem("second", [{"other": 0}], [right])

    found = tune(OP, lambda call: 1 / size(), two(), lambda done, choice: seen.append(done))
    assert found == {"tile": 2, "other": 0}
    assert seen == [1, 2, 2]
    assert "tile" not in _tuning.table(OP, CPU)


@pytest.mark.parametrize(
    "op, problem", [("softmax", "unknown op 'softmax'; expected one of"), (OP, "needs a GPU")]
)
def test_the_command_says_what_it_lacks(op, problem, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune", op])
    assert done.exit_code == 1 and problem in done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_every_problem_starts_from_what_runs_untuned(op, monkeypatch):
    """On the meta device: the launchers' own choices, the candidates' shape, and their number."""
    module = importlib.import_module(f"lean_kernels.ops.{op}.tuning")
    for name in {"_call", "_grad_call"} & set(vars(module)):
        monkeypatch.setattr(module, name, lambda *args: right)
    for problem in problems(op, torch.device("meta")):
        assert 2 <= len(problem.candidates) <= 60
        untuned = dict(_tuning.table(op, torch.device("meta")))
        with _tuning.override(op, problem.candidates[0]):
            assert _same_tiles(op, untuned, _tuning.table(op, torch.device("meta")), problem.what)


def _same_tiles(op, untuned, tuned, what) -> bool:
    if op == "ragged_attention":
        return untuned == tuned
    from lean_kernels.ops.block_sparse_linear import triton

    block = tuple(map(int, what.split()[0].split("x")))
    if "gradient" in what:
        pairs = [triton.grad_weight_config(*block, torch.bfloat16, t) for t in (untuned, tuned)]
    else:
        tokens = int(what.split(", ")[1].split()[0])
        pairs = [triton.config(*block, torch.bfloat16, tokens, t) for t in (untuned, tuned)]
    return pairs[0] == pairs[1]
