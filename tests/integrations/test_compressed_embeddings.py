# SPDX-License-Identifier: Apache-2.0
"""Compressed embeddings in Hugging Face models: ties, files, and what does not fit them."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    CONFIGS,
    IDS,
    MASK,
    dense,
    edit_config,
    edit_tensors,
    load_elsewhere,
    run,
)

import lean_kernels as lk  # noqa: E402
from lean_kernels.convert import to_dense  # noqa: E402
from lean_kernels.embeddings import compressed, heads_of  # noqa: E402
from lean_kernels.integrations.transformers import save  # noqa: E402
from lean_kernels.nn.compressed_embedding import CompressedEmbedding, TiledHead  # noqa: E402
from lean_kernels.nn.lean_embeddings import LeanEmbeddings  # noqa: E402

TABLES = {
    "bert": "*word_embeddings",
    "minilm": "*word_embeddings",
    "roberta": "*word_embeddings",
    "distilbert": "*word_embeddings",
    "modernbert": "*tok_embeddings",
    "gpt2": "*wte",
    "llama": "*embed_tokens",
}
CASES = [
    *(("AutoModel", family) for family in CONFIGS),
    *(("AutoModelForSequenceClassification", family) for family in CONFIGS),
    *(("AutoModelForMaskedLM", f) for f in ("bert", "roberta", "distilbert", "modernbert")),
    *(("AutoModelForCausalLM", family) for family in ("gpt2", "llama")),
]
TIED = [case for case in CASES if case[0].endswith("LM")]
RULES = {
    "low_rank": {"kind": "low_rank", "rank": 12},
    "int8": {"kind": "low_rank", "rank": 12, "dtype": "int8"},
    "autoencoder": {"kind": "autoencoder", "rank": 12, "epochs": 2},
    "elu": {"kind": "autoencoder", "rank": 12, "epochs": 2, "activation": "elu"},
    "morphte": {"kind": "morphte", "rank": 3, "epochs": 2},
    "tensor_train": {"kind": "tensor_train", "rank": 12},
    "morphte plain": {"kind": "morphte", "rank": 3, "epochs": 0, "layer_norm": False, "order": 2},
}


@pytest.fixture(autouse=True)
def morphemes(tmp_path, monkeypatch):
    """A JSON file m.json in the current directory: two morphemes of eleven for each of 90 words."""
    monkeypatch.chdir(tmp_path)
    words = [[f"a{i % 11}", f"b{i // 11}"] for i in range(90)]
    (tmp_path / "m.json").write_text(json.dumps(words))


def lean(family="bert", auto="AutoModel", rule="low_rank", **more):
    rule = RULES[rule] | more
    if rule["kind"] == "morphte":
        rule["morphemes"] = "m.json"
    return lk.convert(dense(family, auto), {"embedding": {TABLES[family]: rule}})


def table(model):
    """The rows of the input embedding."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, CompressedEmbedding):
        embedding = embedding.to_embedding()
    return embedding.weight.detach()


def assert_same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
    assert torch.equal(run(first), run(second))


def tied(model):
    return heads_of(model, model.get_input_embeddings())


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("auto", "family"), CASES)
def test_round_trip_is_bit_exact_twice(auto, family, rule, tmp_path):
    model = lean(family, auto, rule)
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
    assert len(tied(model)) == ((auto, family) in TIED)
    for step in ("first", "second"):
        model.save_pretrained(tmp_path / step)
        loaded, info = getattr(transformers, auto).from_pretrained(
            tmp_path / step, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_same(model, loaded)
        assert tied(loaded) == tied(model)
        model = copy.deepcopy(loaded)
        assert_same(loaded, model)
    first, second = (load_file(tmp_path / s / "model.safetensors") for s in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("auto", "family"), TIED)
@pytest.mark.parametrize("rule", ["low_rank", "morphte"])
def test_a_tied_head_computes_with_the_same_rows(auto, family, rule):
    model = lean(family, auto, rule)
    expected = dense(family, auto)
    expected.get_input_embeddings().weight.data.copy_(table(model))
    torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-4)
    head = model.get_output_embeddings()
    assert isinstance(head, TiledHead) and head.embedding is model.get_input_embeddings()
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().embedding is twin.get_input_embeddings()
    model.tie_weights()
    torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-4)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(("auto", "family"), TIED)
def test_a_head_may_stay_dense(auto, family, tmp_path):
    original = dense(family, auto).get_input_embeddings().weight.detach().clone()
    model = lean(family, auto, head=False)
    assert not tied(model) and not model.config.tie_word_embeddings
    assert torch.equal(model.get_output_embeddings().weight, original)
    model.save_pretrained(tmp_path / "m")
    assert_same(model, getattr(transformers, auto).from_pretrained(tmp_path / "m"))


def untied_llama():
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["llama"]())
    config.tie_word_embeddings = False
    return transformers.LlamaForCausalLM(config).eval()


def test_an_untied_head_stays_dense_unless_named(tmp_path):
    model = untied_llama()
    head = model.lm_head.weight.detach().clone()
    lk.convert(model, {"embedding": {"model.embed_tokens": RULES["low_rank"]}})
    assert torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path / "a")
    assert_same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a"))

    lk.convert(model, {"embedding": {"lm_head": {"kind": "low_rank", "rank": 64}}})
    assert isinstance(model.lm_head, TiledHead) and len(compressed(model)) == 2
    torch.testing.assert_close(model.lm_head.embedding.to_embedding().weight, head)
    model.save_pretrained(tmp_path / "b")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert_same(model, loaded)
    dense_again = to_dense(loaded)
    torch.testing.assert_close(dense_again.lm_head.weight, head)
    assert type(dense_again.lm_head) is nn.Linear


@pytest.mark.parametrize(("auto", "family"), CASES)
def test_to_dense_restores_the_dense_format(auto, family, tmp_path):
    model = lean(family, auto)
    rows, expected = table(model), run(model)
    to_dense(model)
    assert not compressed(model) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model.get_input_embeddings().weight, rows)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    if (auto, family) in TIED:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(95)
    model.save_pretrained(tmp_path / "m")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "m")
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("rule", ["low_rank", "int8", "morphte"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bfloat16_at_load(family, rule, tmp_path):
    model = lean(family, rule=rule)
    model.save_pretrained(tmp_path / "m")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    if rule == "int8":  # scales stay float32 in a file
        loaded.get_input_embeddings().scales.data = model.get_input_embeddings().scales.bfloat16()
    assert_same(model.to(torch.bfloat16), loaded)


def test_base_and_head_load_each_other(tmp_path):
    lean().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert tied(model) == ["cls.predictions.decoder"]
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(table(base), table(model))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(table(classifier), table(model))


def test_sharded_and_beside_block_sparse_layers(tmp_path):
    model = lk.convert(
        dense("bert", "AutoModelForMaskedLM"),
        {
            "embedding": {"*word_embeddings": RULES["low_rank"]},
            "linear": {"*": {"density": 0.4, "block_shape": [16, 16]}},
            "tokens": {},
        },
    )
    report = model.lean_report()
    assert "cls.predictions.decoder" not in {entry.name for entry in report.entries}
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "m")
    assert torch.equal(run(model), run(loaded))


def test_berts_whole_block_is_one_call(tmp_path):
    model = lean()
    assert isinstance(model.embeddings, LeanEmbeddings)
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}
    expected = dense()
    expected.embeddings.word_embeddings.weight.data.copy_(table(model))
    with torch.no_grad():
        for given in (inputs, {"inputs_embeds": torch.randn(2, 6, 64)}):
            found, wanted = model(**given)[0], expected(**given)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "m")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert torch.equal(run(loaded), run(model))
    assert type(to_dense(loaded).embeddings) is type(expected.embeddings)
    torch.testing.assert_close(run(loaded), run(expected), rtol=1e-4, atol=1e-4)


def test_resizing_says_what_to_do(tmp_path):
    lean("bert", "AutoModelForMaskedLM").save_pretrained(tmp_path / "m")
    for model in (
        lean("bert", "AutoModelForMaskedLM"),
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "m"),
    ):
        for owner in (model, model.bert):
            with pytest.raises(ValueError, match=r"LowRankEmbedding of 90 rows.*convert it again"):
                owner.resize_token_embeddings(95)
        assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_training_reaches_the_table_from_both_ends():
    model = lean("llama", "AutoModelForCausalLM").train()
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    embedding = model.get_input_embeddings()
    assert embedding.codes.grad.abs().sum() > 0 and embedding.decoder.grad.abs().sum() > 0
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("rule", list(RULES))
def test_bytes_are_those_of_the_formula(rule):
    model = lean(rule=rule)
    (entry,) = model.lean_report().embeddings
    stored = sum(
        t.numel() * t.element_size()
        for name, t in model.state_dict().items()
        if name.startswith("embeddings.word_embeddings.")
    )
    assert entry.lean_bytes == stored
    assert entry.formula_bytes == pytest.approx(stored, rel=0.01)
    assert entry.dense_bytes == 4 * 90 * 64
    printed = str(model.lean_report())
    assert entry.formula in printed and "stored +0.00%" in printed


def test_the_card_and_version(tmp_path):
    save(lean(), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    card = (tmp_path / "m/README.md").read_text()
    assert "Format version 3" in card and "stop with a size mismatch" in card
    assert "embeddings.word_embeddings | LowRankEmbedding" in card


def test_embeddings_put_in_by_hand_are_saved(tmp_path):
    model = dense("roberta")
    model.embeddings.word_embeddings = lean("roberta").embeddings.word_embeddings
    save(model, tmp_path / "m")
    assert_same(model, lk.load(tmp_path / "m"))


def test_without_the_import_loading_stops(tmp_path):
    for place, model in enumerate((lean(), lean(rule="morphte"))):
        model.save_pretrained(tmp_path / str(place))
        done = load_elsewhere("from transformers import AutoModel", tmp_path / str(place))
        assert done.returncode != 0
        assert "RuntimeError" in done.stderr and "ignore_mismatched_sizes" in done.stderr


TABLE = "embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("rule", "edit", "message"),
    [
        ("low_rank", lambda c, e: c.update(format_version=2), "came with format version 3, not"),
        ("low_rank", lambda c, e: e.pop("rank"), "must have exactly the keys"),
        ("low_rank", lambda c, e: e.update(order=3), "must have exactly the keys"),
        ("low_rank", lambda c, e: e.update(kind="svd"), "must have exactly the keys"),
        ("low_rank", lambda c, e: e.update(rank=65), "rank must be at most 64"),
        ("low_rank", lambda c, e: e.update(rank=0), "rank must be positive"),
        ("low_rank", lambda c, e: e.update(rank=True), "rank has the wrong type"),
        ("low_rank", lambda c, e: e.update(rank=11), "has shape .*, expected"),
        ("low_rank", lambda c, e: e.update(num_embeddings=91), "saved as a table of"),
        ("low_rank", lambda c, e: e.update(head=True), "codes is no tensor of the layer"),
        ("low_rank", lambda c, e: e.update(activation="tanh"), "unknown activation 'tanh'"),
        ("low_rank", lambda c, e: e.update(bias=True), "bias is missing"),
        ("low_rank", lambda c, e: e.update(int8=True), "codes must be int8, got F32"),
        ("autoencoder", lambda c, e: e.update(bias=False), "bias is no tensor of the layer"),
        ("morphte", lambda c, e: e.update(order=5), "order must be 2, 3 or 4"),
        ("morphte", lambda c, e: e.update(order=2), "factor_size.order must be at least"),
        ("morphte", lambda c, e: e.update(factor_size=5), "has shape .*, expected"),
        ("morphte", lambda c, e: e.update(factor_size=10**6), "and factor_size at most that"),
        ("morphte", lambda c, e: e.update(order=4), "has shape .*, expected"),
        ("morphte", lambda c, e: e.update(num_morphemes=10**9), r"num_morphemes must lie in \[1"),
        ("morphte", lambda c, e: e.update(layer_norm=False), "is no tensor of the layer"),
        ("morphte", lambda c, e: c["modules"].update({"x.y": e}), "has no module 'x.y'"),
        (
            "morphte",
            lambda c, e: c["modules"].update({"encoder.layer.0.output.dense": e}),
            "bias is no tensor of the layer",
        ),
    ],
)
def test_a_wrong_description_is_an_error(rule, edit, message, tmp_path):
    lean(rule=rule).save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", lambda config: edit(config, config["modules"][TABLE]))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("rule", "name", "value", "message"),
    [
        ("low_rank", "codes", None, "codes is missing"),
        ("low_rank", "weight", None, "weight is missing"),
        (
            "low_rank",
            "weight",
            lambda t: torch.ones(90, 64),
            r"weight has shape \[90, 64\], .* \[90, 0\]",
        ),
        ("low_rank", "codes", lambda t: t[:-1].clone(), "codes has shape"),
        ("low_rank", "codes", lambda t: t.to(torch.int8), "codes must be a floating point"),
        ("low_rank", "extra", lambda t: torch.ones(2), "extra is no tensor of the layer"),
        ("int8", "codes", lambda t: t.float(), "codes must be int8"),
        ("int8", "scales", None, "scales is missing"),
        ("morphte", "morphemes", lambda t: t + 1000, r"morphemes must lie in \[0, 22\)"),
        ("morphte", "morphemes", lambda t: t - 9, r"morphemes must lie in \[0, 22\)"),
        ("morphte", "morphemes", lambda t: t.long(), "morphemes must be int32"),
        ("morphte", "factors", lambda t: t[:, :, :-1].clone(), "factors has shape"),
    ],
)
def test_wrong_tensors_are_an_error(rule, name, value, message, tmp_path):
    lean(rule=rule).save_pretrained(tmp_path / "m")

    def edit(tensors):
        old = tensors.pop(f"{TABLE}.{name}", None)
        if value is not None:
            tensors[f"{TABLE}.{name}"] = value(old)

    edit_tensors(tmp_path / "m", edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path / "m")
