# SPDX-License-Identifier: Apache-2.0
import json
import pkgutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lean_kernels import info, ops
from lean_kernels.cli import app

transformers = pytest.importorskip("transformers")
from tiny_bert import save_tiny_bert  # noqa: E402

RECIPE = """
[linear."encoder.layer.*.intermediate.dense"]
block_shape = [16, 16]
density = 0.25
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments) -> str:
    """The one line that the command must print when it fails."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def convert(model, recipe, out, *more):
    return "convert", model, "--recipe", recipe, "--out", out, *more


def test_help_loads_no_torch():
    code = (
        "import sys; from lean_kernels.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_module_entry_point():
    command = [sys.executable, "-m", "lean_kernels", "info", "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed)["torch"] == torch.__version__


def test_info_names_every_backend():
    result = run("info")
    assert result.exit_code == 0
    folders = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]
    for word in ("torch", "GPU", *folders, "reference", "cpu", "triton"):
        assert word in result.stdout


def test_info_json():
    result = run("info", "--json")
    report = json.loads(result.stdout)
    assert report["torch"] == torch.__version__
    assert report["packages"]["transformers"] == transformers.__version__
    backends = report["ops"]["block_sparse_linear"]
    assert backends["reference"] == "yes"
    if not torch.cuda.is_available():
        assert backends["triton"] != "yes"
    assert (report["cpu"]["kernels_use"] is None) == (backends["cpu"] != "yes")


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_info_survives_broken_probes(monkeypatch, arguments):
    def broken(*_):
        raise RuntimeError("no luck\nat all")

    for name in ("_cpu_model", "_instruction_sets", "_kernels_isa", "_gpus", "_torch", "_ops"):
        monkeypatch.setattr(info, name, broken)
    result = run(*arguments)
    assert result.exit_code == 0
    assert "no luck at all" in result.stdout


def test_info_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = info.collect()
    assert "unknown" in report["torch"]
    assert report["python"]


def test_convert_round_trip(model, recipe, tmp_path):
    import lean_kernels as lk

    out = tmp_path / "lean"
    result = run(*convert(model, recipe, out))
    assert result.exit_code == 0, result.stderr
    assert "encoder.layer.1.intermediate.dense" in result.stdout
    assert str(out) in result.stdout.replace("\n", "")

    dense = transformers.AutoModel.from_pretrained(model)
    lean = transformers.AutoModel.from_pretrained(out)
    assert type(lean) is type(dense)
    layer = lean.encoder.layer[0].intermediate.dense
    assert isinstance(layer, lk.nn.BlockSparseLinear)
    assert layer.density == pytest.approx(0.25)
    kept = layer.to_linear().weight
    assert torch.equal(kept[kept != 0], dense.encoder.layer[0].intermediate.dense.weight[kept != 0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("the dog sleeps")["input_ids"] == [2, 5, 6, 8, 3]


def test_convert_compresses_embeddings(model, recipe, tmp_path):
    pytest.importorskip("morfessor")
    import lean_kernels as lk

    recipe.write_text(
        '[embedding."embeddings.word_embeddings"]\nkind = "morphte"\nrank = 2\nepochs = 1\n'
    )
    out = tmp_path / "lean"
    result = run(*convert(model, recipe, out))
    assert result.exit_code == 0, result.stderr
    assert "MorphTEEmbedding" in result.stdout and "word_embeddings compressed: " in result.stdout
    loaded = transformers.AutoModel.from_pretrained(out)
    assert isinstance(loaded.get_input_embeddings(), lk.nn.MorphTEEmbedding)
    recipe.write_text('[embedding."*.word"]\nkind = "low_rank"\nrank = 2\n')
    assert "'*.word' matches no module" in fails(*convert(model, recipe, out, "--force"))


def test_convert_keeps_the_head(tmp_path, recipe):
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=5,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    recipe.write_text(RECIPE.replace("encoder.", "bert.encoder."))
    result = run(*convert(tmp_path / "classifier", recipe, tmp_path / "lean"))
    assert result.exit_code == 0, result.stderr
    assert "the model has no tokenizer" in result.stdout
    lean = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "lean")
    assert lean.classifier.out_features == 5


def test_existing_output_needs_force(model, recipe, tmp_path):
    out = tmp_path / "lean"
    assert run(*convert(model, recipe, out)).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    assert "--force" in fails(*convert(model, recipe, out))
    assert (out / "model.safetensors").read_bytes() == before
    recipe.write_text(RECIPE.replace("0.25", "0.5"))
    assert run(*convert(model, recipe, out, "--force")).exit_code == 0
    assert len((out / "model.safetensors").read_bytes()) > len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lean", "recipe.toml"]


def test_force_does_not_replace_other_directories(model, recipe, tmp_path):
    precious = tmp_path / "thesis" / "chapter.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert "thesis" in fails(*convert(model, recipe, precious.parent, "--force"))
    assert precious.read_text() == "years of work"
    for name, text in (("config.json", "{}"), ("README.md", "# Thesis")):
        (precious.parent / name).write_text(text)
    assert "not an earlier output" in fails(*convert(model, recipe, precious.parent, "--force"))
    assert precious.read_text() == "years of work"


def test_the_model_itself_is_never_replaced(model, recipe):
    before = (model / "model.safetensors").read_bytes()
    (model.parent / "config.json").touch()  # as beside the checkpoints of a training run
    for out in (model / ".", model.parent):
        assert "holds the model itself" in fails(*convert(model, recipe, out, "--force"))
    assert (model / "model.safetensors").read_bytes() == before


def test_convert_errors(model, recipe, tmp_path):
    out = tmp_path / "lean"
    assert "nothing.toml" in fails(*convert(model, tmp_path / "nothing.toml", out))
    assert "./nowhere" in fails(*convert("./nowhere", recipe, out))
    recipe.write_text("[linear\n")
    assert "TOML" in fails(*convert(model, recipe, out))
    recipe.write_text(RECIPE.replace("density", "densty"))
    assert "densty" in fails(*convert(model, recipe, out))
    recipe.write_text(RECIPE.replace("encoder", "decoder"))
    assert "decoder.layer.*.intermediate.dense" in fails(*convert(model, recipe, out))
    assert not out.exists()


def test_a_model_that_cannot_be_loaded_is_named(model, recipe, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    assert f"model {broken}: " in fails(*convert(broken, recipe, tmp_path / "lean"))
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:999])
    assert f"model {broken}: " in fails(*convert(broken, recipe, tmp_path / "lean"))


def test_debug_shows_the_traceback(model, tmp_path):
    command = [sys.executable, "-m", "lean_kernels"]
    command += map(str, convert(model, tmp_path / "nothing.toml", tmp_path / "lean", "--debug"))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "FileNotFoundError" in result.stderr


def test_usage_errors():
    assert run("convert").exit_code == 2
    assert run("no-such-command").exit_code == 2


@pytest.mark.parametrize("densities", ["", "0", "1.5", "half", "0.5,,0.2"])
def test_demo_refuses_bad_densities(densities, tmp_path):
    assert "--densities" in fails("demo", "--densities", densities, "--out", tmp_path / "demo")


def test_bench_without_its_folder(monkeypatch, tmp_path):
    import lean_kernels

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lean_kernels, "__file__", str(tmp_path / "lean_kernels" / "__init__.py"))
    assert "clone the repository" in fails("bench", "block_sparse_linear")
