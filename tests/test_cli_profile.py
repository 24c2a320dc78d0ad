# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
from tiny_bert import save_tiny_bert  # noqa: E402

import lean_kernels as lk  # noqa: E402
from lean_kernels.cli import app  # noqa: E402

TEXTS = ["the dog sleeps .", "the cat sleeps on a house", "rain falls", "a dog runs", "the cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Larger weights: attention must be anything but uniform.
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), initializer_range=0.2)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def succeed(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fails(*arguments) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_the_recipe_converts_the_model(model, texts, tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "sub" / "recipe.toml", tmp_path / "kept.png"
    printed = succeed(
        model, "--texts", texts, "--out", out, "--plot", plot, "--mean-kept", 0.5, "--rounds", 1
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(out) in printed and str(plot) in printed
    recipe = lk.Recipe.from_toml(out)
    assert len(recipe.tokens.profile) == 2 and recipe.tokens.speed == 1
    assert sum(recipe.tokens.profile) / 2 == pytest.approx(0.5, abs=1e-4)
    assert re.search(r"packed, by the recipe\W+\d\.\d\dx\W+\d+\.\d\dx", printed)
    for value in recipe.tokens.profile:
        assert f"{value:.3f}" in printed
    lean = lk.convert(lk.load(model), recipe)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 8, 3]])}
    assert torch.isfinite(lean(**inputs).last_hidden_state).all()


def test_speed_and_target(model, texts, tmp_path):
    out = tmp_path / "recipe.toml"
    common = (model, "--texts", texts, "--out", out, "--rounds", 0)
    printed = succeed(*common, "--speed", 2)
    tokens = lk.Recipe.from_toml(out).tokens
    assert tokens.speed == 2 and "kept at speed 2" in printed
    printed = succeed(*common, "--target-speedup", 2.5, "--force")
    found = re.search(r"packed, by the recipe\W+(\d\.\d\d)x", printed)
    assert float(found[1]) == pytest.approx(2.5, abs=0.3)  # whole tokens, of very short texts
    assert lk.Recipe.from_toml(out).tokens.profile == tokens.profile
    assert "not both" in fails(*common, "--speed", 2, "--target-speedup", 2)


def test_a_classifier_and_texts_as_long_as_its_positions(model, tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=14,  # of which 2 come before the first token's
        pad_token_id=1,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 10**30  # as transformers has it where nothing was saved
    tokenizer.save_pretrained(tmp_path / "roberta")
    classifier = transformers.RobertaForSequenceClassification(config)
    classifier.save_pretrained(tmp_path / "roberta")
    texts, out = tmp_path / "texts.txt", tmp_path / "recipe.toml"
    texts.write_text("\n".join(["the dog sleeps . " * 10] * 3))
    succeed(tmp_path / "roberta", "--texts", texts, "--out", out, "--rounds", 1)
    assert len(lk.Recipe.from_toml(out).tokens.profile) == 2


def test_other_rules_stay(model, texts, tmp_path):
    base, out = tmp_path / "base.toml", tmp_path / "recipe.toml"
    base.write_text(
        '[linear."encoder.layer.*.output.dense"]\ndensity = 0.5\n[tokens]\npacked = true\n'
    )
    succeed(model, "--texts", texts, "--out", out, "--recipe", base, "--rounds", 0)
    old, new = lk.Recipe.from_toml(base), lk.Recipe.from_toml(out)
    assert new.linear == old.linear and new.tokens.profile and not old.tokens.profile


def test_nothing_is_overwritten(model, texts, tmp_path):
    out, plot = tmp_path / "recipe.toml", tmp_path / "kept.png"
    out.write_text("mine")
    arguments = (model, "--texts", texts, "--out", out, "--rounds", 0)
    assert "--force" in fails(*arguments)
    assert out.read_text() == "mine"
    succeed(*arguments, "--force")
    plot.write_text("mine")
    assert "--force" in fails(model, "--texts", texts, "--out", tmp_path / "new", "--plot", plot)
    assert plot.read_text() == "mine" and not (tmp_path / "new").exists()
    assert "is a directory" in fails(model, "--texts", texts, "--out", tmp_path)


def test_errors_are_one_line(model, texts, tmp_path):
    out = ("--out", tmp_path / "recipe.toml", "--rounds", 0)
    assert "absent.txt does not exist" in fails(model, "--texts", tmp_path / "absent.txt", *out)
    assert "neither a directory nor a hub id" in fails("./absent", "--texts", texts, *out)
    assert "statistic must be" in fails(model, "--texts", texts, *out, "--statistic", "mode")
    assert "mean_kept" in fails(model, "--texts", texts, *out, "--mean-kept", 2)
    absent = f"cuda:{torch.cuda.device_count()}"
    assert "torch sees" in fails(model, "--texts", texts, *out, "--device", absent)
    assert "unknown --device" in fails(model, "--texts", texts, *out, "--device", "gpu")
    assert not (tmp_path / "recipe.toml").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
