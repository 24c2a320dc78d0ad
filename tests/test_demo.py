# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
from tiny_bert import save_tiny_bert

from lean_kernels import demo
from lean_kernels.cli import app

TEXTS = ["the dog sleeps .", "the cat sleeps on a house", "rain falls", "a dog runs", "the cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Larger weights: attention must be anything but uniform.
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), initializer_range=0.2)


def run(model, out, **options):
    options = {"densities": (1.0, 0.25), "speeds": (0, 3), "rounds": 2, "batch_size": 2} | options
    return demo.run(model, TEXTS, out, **options)


def test_rows_tell_the_trade_off(model, tmp_path):
    import lean_kernels as lk

    steps = []
    result = run(
        model, tmp_path / "out", block_shape=(16, 16), progress=lambda *step: steps.append(step)
    )
    dense, full, quarter, packed, dropped = result.rows
    assert [done for done, _, _ in steps] == list(range(2 + 2 + 2 + 5))
    assert {total for _, total, _ in steps} == {2 + 2 + 2 + 4}
    assert result.texts == 5
    assert (dense.speedup, dense.sparse_layers, dense.path) == (1, 0, None)
    assert dense.cosine == pytest.approx(1) and dense.spearman == pytest.approx(1)
    assert full.cosine == pytest.approx(1, abs=1e-5) and full.spearman == pytest.approx(1)
    assert quarter.sparse_layers == result.layers == 2 * 6
    assert quarter.cosine < 0.9999
    linears = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert dense.parameters - quarter.parameters == linears * 3 // 4
    assert dense.bytes_on_disk - quarter.bytes_on_disk == pytest.approx(3 * linears, rel=0.1)
    assert quarter.speedup == pytest.approx(dense.milliseconds / quarter.milliseconds)
    assert result.largest_reload_difference == 0

    assert (packed.what, packed.kept, packed.sparse_layers) == ("packed", 1, 0)
    assert packed.cosine == pytest.approx(1, abs=1e-5) and packed.spearman == pytest.approx(1)
    assert dropped.kept == pytest.approx(np.mean(np.array(result.profile) ** 3))
    assert dropped.kept < 1 and dropped.cosine < 0.9999
    assert dropped.parameters == packed.parameters == dense.parameters
    assert lk.load(dropped.path).encoder.token_rule.speed == 3

    saved = json.loads((tmp_path / "out" / demo.RESULTS).read_text())
    assert saved["rows"][2]["parameters"] == quarter.parameters
    assert isinstance(lk.load(quarter.path).encoder.layer[1].output.dense, lk.nn.BlockSparseLinear)


def test_the_vocabulary_is_compared(model, tmp_path):
    pytest.importorskip("morfessor")
    steps = []
    result = run(
        model,
        tmp_path / "out",
        densities=(0.5,),
        speeds=(),
        compressions=(2, 4),
        progress=lambda *step: steps.append(step),
    )
    assert [done for done, _, _ in steps] == list(range(steps[0][1] + 1))
    dense, *compressed = result.vocabulary
    assert dense.what == "dense" and dense.compression == 1 and dense.cosine == pytest.approx(1)
    assert dense.table_bytes == 4 * 16 * 64
    kinds = ("SVD", "autoencoder", "MorphTE")
    assert [row.what for row in compressed] == [f"{kind} {x}x" for x in (2, 4) for kind in kinds]
    assert all(row.milliseconds > 0 and row.cosine < 1 for row in compressed)
    svd = [row for row in compressed if row.what.startswith("SVD")]
    assert [row.rank for row in svd] == [6, 3] and svd[0].cosine > svd[1].cosine
    assert all(row.compression >= asked for row, asked in zip(svd, (2, 4), strict=True))
    saved = json.loads((tmp_path / "out" / demo.RESULTS).read_text())
    assert saved["vocabulary"][1]["rank"] == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "density-0.5",
        demo.RESULTS,
        demo.PLOT,
    }


@pytest.mark.parametrize(
    ("rows", "columns", "compression", "rank"), [(30522, 384, 2, 189), (30522, 384, 10, 37)]
)
def test_ranks_by_bytes(rows, columns, compression, rank):
    from lean_kernels.demo_vocabulary import rank_for

    assert rank_for("low_rank", rows, columns, compression) == rank
    morphte = rank_for("morphte", rows, columns, compression, num_morphemes=8000)
    stored = 8000 * 8 * morphte + 3 * rows + 2 * columns
    assert stored <= rows * columns / compression < stored + 8000 * 8


def test_nothing_is_left_behind_by_a_failure(model, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(demo, "fidelity", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        run(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_changed_bits_are_noticed(model, tmp_path, monkeypatch):
    from transformers import AutoModel

    original = AutoModel.from_pretrained

    def flipped(path, **options):
        model = original(path, **options)
        if "density" in str(path):
            model.get_parameter("embeddings.word_embeddings.weight").data[3, 3] += 1e-6
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", flipped)
    with pytest.raises(RuntimeError, match="word_embeddings"):
        run(model, tmp_path / "out")


def test_command(model, tmp_path):
    pytest.importorskip("matplotlib")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["demo", "--model", model, "--texts", texts, "--out", out, "--rounds", 1]
    arguments = [*map(str, arguments), "--densities", "0.5,0.25", "--compressions", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    printed = result.stdout.replace("\n", " ")
    assert "5 texts" in printed and "needs training" in printed
    assert "autoencoder 2x" in printed
    for name in (demo.PLOT, demo.RESULTS, "density-0.5", "density-0.25"):
        assert str(out / name) in result.stdout
        assert (out / name).exists()
    assert (out / demo.PLOT).read_bytes().startswith(b"\x89PNG")
    assert "--force" in CliRunner().invoke(app, arguments).stderr


def test_command_without_matplotlib(model, tmp_path, monkeypatch):
    from importlib.util import find_spec

    def hide(name):
        return None if name == "matplotlib" else find_spec(name)

    for module in ("lean_kernels.cli.demo", "lean_kernels.demo"):
        monkeypatch.setattr(f"{module}.find_spec", hide)
    out = tmp_path / "out"
    arguments = ["demo", "--model", str(model), "--out", str(out)]
    result = CliRunner().invoke(
        app, [*arguments, "--rounds", "1", "--densities", "0.25", "--compressions", ""]
    )
    assert result.exit_code == 0, result.stderr
    assert "pip install matplotlib" in result.stdout
    assert not (out / demo.PLOT).exists()


def test_recipe_takes_only_repeated_layers(model):
    from transformers import AutoModel

    recipe = demo.encoder_recipe(AutoModel.from_pretrained(model), 0.5)
    assert sorted(recipe.linear) == [
        "encoder.layer.*.attention.output.dense",
        "encoder.layer.*.attention.self.key",
        "encoder.layer.*.attention.self.query",
        "encoder.layer.*.attention.self.value",
        "encoder.layer.*.intermediate.dense",
        "encoder.layer.*.output.dense",
    ]
    with pytest.raises(ValueError, match="no linear layers"):
        demo.encoder_recipe(torch.nn.Linear(4, 4), 0.5)


def test_a_model_that_is_not_there_is_not_one_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="Unrecognized model"):
        run(str(tmp_path), tmp_path / "out")
