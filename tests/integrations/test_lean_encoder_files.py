# SPDX-License-Identifier: Apache-2.0
"""Lean encoders in files, pipelines and training."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from hf_models import CONFIGS, ENCODERS, dense  # noqa: E402
from test_lean_encoder import CLASSIFY, assert_rms, batch, encoder_of, hidden  # noqa: E402

import lean_kernels as lk  # noqa: E402
from lean_kernels.encoders import lean_encoders  # noqa: E402
from lean_kernels.integrations.transformers import save  # noqa: E402

PROFILE = [0.7, 0.4]
EXITS = {"criterion": "entropy", "threshold": 0.5}
RECIPES = {
    "tokens": {"tokens": {"profile": PROFILE, "speed": 1.5, "dropped": "zeros"}},
    "exits": {"exits": EXITS},
    "all": {
        "linear": {"*": {"density": 0.5, "block_shape": [16, 16]}},
        "tokens": {"counts": [9, 4]},
        "exits": {"criterion": "patience", "patience": 1},
    },
}


@pytest.mark.parametrize("kind", list(RECIPES))
@pytest.mark.parametrize("family", ENCODERS)
def test_round_trip_is_bit_exact(family, kind, tmp_path):
    model = lk.convert(dense(family, CLASSIFY), RECIPES[kind])
    ids, mask = batch(lengths=(17, 9, 1, 12))
    expected = hidden(model, ids, mask)
    save(model, tmp_path / "a")
    for load in (transformers.AutoModelForSequenceClassification.from_pretrained, lk.load):
        loaded = load(tmp_path / "a")
        assert torch.equal(hidden(loaded, ids, mask), expected)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
        one, other = encoder_of(loaded), encoder_of(model)
        assert (one.token_rule, one.exit_rule) == (other.token_rule, other.exit_rule)
        assert loaded.lean_report().to_dict() == lk.report.LeanReport.of(model).to_dict()
    loaded.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / s / "model.safetensors") for s in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    texts = [(tmp_path / s / "config.json").read_text() for s in "ab"]
    stored = [json.loads(text)["quantization_config"] for text in texts]
    assert stored[0] == stored[1] and stored[0]["format_version"] == 2


def test_without_exits_the_tensors_are_those_of_the_dense_model(tmp_path):
    original = dense("bert", CLASSIFY)
    lk.convert(copy.deepcopy(original), RECIPES["tokens"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == original.state_dict().keys()
    assert all(torch.equal(tensors[name], t) for name, t in original.state_dict().items())


@pytest.mark.parametrize("family", ENCODERS)
def test_between_base_model_and_head(family, tmp_path):
    ids, mask = batch(lengths=(17, 9, 1, 12))
    model = lk.convert(dense(family, CLASSIFY), RECIPES["exits"] | RECIPES["tokens"])
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    encoder = encoder_of(base)
    assert encoder.exit_rule is None and not encoder.first_only and not hasattr(encoder, "exits")
    assert encoder.token_rule == encoder_of(model).token_rule
    encoder_of(model).exit_rule, encoder_of(model).first_only = None, False
    inner = getattr(model, model.base_model_prefix)
    assert torch.equal(hidden(base, ids, mask), hidden(inner, ids, mask))
    base.save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "base")
    assert encoder_of(again).first_only and encoder_of(again).token_rule == encoder.token_rule


@pytest.mark.parametrize("family", ENCODERS)
def test_a_base_model_saved_out_of_a_classifier_loads(family, tmp_path):
    ids, mask = batch(lengths=(17, 9, 1, 12))
    model = lk.convert(dense(family, CLASSIFY), RECIPES["exits"])
    inner = getattr(model, model.base_model_prefix)
    inner.save_pretrained(tmp_path / "base")
    options = {"add_pooling_layer": False} if family == "roberta" else {}  # it never had one
    base = transformers.AutoModel.from_pretrained(tmp_path / "base", **options)
    assert encoder_of(base).exit_rule is None
    encoder_of(model).first_only = False
    assert torch.equal(hidden(base, ids, mask), hidden(inner, ids, mask))
    model.save_pretrained(tmp_path / "head")  # which still has its exits
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert encoder_of(again).exit_rule == encoder_of(model).exit_rule


def test_files_of_version_1_are_read_and_still_written(tmp_path):
    """What needs no version 2 stays readable for those who only know version 1."""
    model = lk.convert(dense(), {"linear": {"*": {"density": 0.5}}})
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 1 and stored.keys() == {
        "quant_method", "format_version", "modules",
    }  # fmt: skip
    assert torch.equal(
        hidden(transformers.AutoModel.from_pretrained(tmp_path), *batch()), hidden(model, *batch())
    )


def _rules(**changes):
    def edit(config):
        config["encoders"]["bert.encoder"].update(changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=1), "came with format version 2"),
        (lambda c: c.update(format_version=4), "format version 4; .* reads up to 3"),
        (lambda c: c.update(encoders=[]), "encoders must be a table"),
        (lambda c: c.update(encoders={}), "modules must be a non-empty table"),
        (lambda c: c["encoders"].update({"x": {}}), "must have exactly the keys"),
        (lambda c: c["encoders"].update(bert=c["encoders"]["bert.encoder"]), "no encoder 'bert'"),
        (_rules(more=1), "must have exactly the keys"),
        (_rules(tokens=None), "tokens must be a table"),
        (_rules(tokens={"profil": [1]}), "unknown key 'profil'"),
        (_rules(tokens={"profile": [0.5]}), "for 1 layers"),
        (_rules(tokens={"profile": [0.5, "0.3"]}), "profile must hold numbers"),
        (_rules(tokens={"profile": [0.3, 0.5]}), "profile must not rise"),
        (_rules(tokens={"profile": PROFILE, "speed": float("inf")}), "speed must be finite"),
        (_rules(tokens={"profile": PROFILE, "counts": [1, 1]}), "give one of"),
        (_rules(tokens={"counts": [10**30, 10**30]}), "counts must"),
        (_rules(exits={"criterion": "mood"}), "unknown criterion 'mood'"),
        (_rules(exits={"threshold": float("nan")}), "threshold must lie in"),
        (_rules(exits={"criterion": "patience", "patience": True}), "patience must be an integer"),
    ],
)
def test_a_wrong_description_is_an_error(edit, message, tmp_path):
    lk.convert(dense("bert", CLASSIFY), RECIPES["exits"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_missing_and_misshapen_exit_heads(tmp_path):
    lk.convert(dense("bert", CLASSIFY), RECIPES["exits"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "bert.encoder.exits.0.out.weight"
    tensors = load_file(path)
    for change, message in ((None, "is missing"), (torch.zeros(5, 64), "has shape")):
        edited = {key: tensor for key, tensor in tensors.items() if key != name}
        if change is not None:
            edited[name] = change
        save_file(edited, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} {message}"):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_mean_pooling_and_pipelines():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["the", "dog", "cat", "sleeps", "runs", "rain", "on", "house", "."]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=16)
    texts = ["the dog sleeps .", "rain", "the cat runs on the house . the dog runs"]
    original = dense("bert")
    model = lk.convert(copy.deepcopy(original), {"tokens": {}})
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    pooled = []
    with torch.no_grad():
        for run in (original, model):
            states, mask = run(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            pooled.append((states * mask).sum(1) / mask.sum(1))
            pooled.append(run(**inputs).pooler_output)
    assert_rms(pooled[2], pooled[0], 1e-6)
    assert_rms(pooled[3], pooled[1], 1e-6)
    lk.convert(model, {"tokens": {"profile": [0.6, 0.5]}})
    extract = transformers.pipeline(
        "feature-extraction", model=model, tokenizer=tokenizer, return_tensors=True
    )
    for text, states in zip(texts, extract(texts), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        assert_rms(states, expected, 1e-6)


def test_sharded_and_half_precision(tmp_path):
    model = lk.convert(dense("bert", CLASSIFY), RECIPES["all"])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    assert hidden(loaded, *batch(lengths=(9, 4))).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_last_layers_go(family):
    """Layers removed after the conversion are neither run nor given back."""
    config = CONFIGS[family]()
    config.num_hidden_layers = 3
    if family == "modernbert":
        config.layer_types = ["full_attention"] * 3
    torch.manual_seed(0)
    model = lk.convert(transformers.AutoModel.from_config(config).eval(), {"tokens": {}})
    (encoder,) = lean_encoders(model).values()
    assert len(encoder) == 3 and encoder[2] is encoder.layers[2]
    holder = encoder if family == "modernbert" else encoder.layer
    expected = hidden(model, *batch())
    del holder._modules["2"]
    assert len(encoder) == 2 and not torch.equal(hidden(model, *batch()), expected)


def test_fused_projections_do_not_show_in_files(tmp_path):
    """Query, key and value share memory once the model has run; nothing saved may."""
    from safetensors.torch import save_model

    recipe = {"linear": {"encoder.*": {"density": 0.5, "block_shape": [16, 16]}}, "tokens": {}}
    model = lk.convert(dense("bert"), recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, mask = batch()
    expected = hidden(model, ids, mask)
    attention = model.encoder.layer[0].attention.self
    storage = attention.query.weight.untyped_storage().data_ptr()
    assert attention.key.weight.untyped_storage().data_ptr() == storage  # the test means something
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a")
    torch.save(state, tmp_path / "b")
    assert (tmp_path / "b").stat().st_size < 1.5 * (tmp_path / "a").stat().st_size
    save_model(model, str(tmp_path / "c"))
    assert load_file(tmp_path / "c").keys() >= before.keys()
    model.save_pretrained(tmp_path / "d")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "d")
    assert torch.equal(hidden(loaded, ids, mask), expected)
    kept = state["encoder.layer.0.attention.self.key.weight"]
    model.load_state_dict({name: -tensor if tensor.is_floating_point() else tensor
                           for name, tensor in state.items()})  # fmt: skip
    assert torch.equal(kept, before["encoder.layer.0.attention.self.key.weight"])
