# SPDX-License-Identifier: Apache-2.0
"""Embeddings of plain modules, by [embedding]."""

import copy
import json

import pytest
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels.convert import convert, to_dense
from lean_kernels.nn.compressed_embedding import TiledHead
from lean_kernels.spec import describe, rebuild

IDS = torch.arange(12).reshape(2, 6)
LOW_RANK = {"kind": "low_rank", "rank": 8}


class Model(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(40, 16, padding_idx=3)
        self.positions = nn.Embedding(6, 16)
        self.up = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.up(self.embed(ids) + self.positions.weight))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def recipe(**rules):
    return {"embedding": {glob: LOW_RANK | rule for glob, rule in rules.items()}}


def names(model):
    return {name: id(module) for name, module in model.named_modules()}


def test_full_rank_computes_the_same(model):
    expected, bias = model(IDS), model.head.bias
    assert convert(model, recipe(embed={"rank": 16})) is model
    assert isinstance(model.embed, lk.nn.LowRankEmbedding) and model.embed.padding_idx == 3
    assert isinstance(model.head, TiledHead) and model.head.bias is bias
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert type(model.positions) is nn.Embedding


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"dtype": "int8"},
        {"kind": "autoencoder", "epochs": 1},
        {"kind": "morphte", "rank": 2, "epochs": 1, "morphemes": "m.json"},
    ],
)
def test_a_plain_module_reloads_from_its_description(model, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text(json.dumps([[f"{i % 5}", f"x{i // 5}"] for i in range(40)]))
    convert(model, recipe(embed=rule))
    fresh = Model().eval()
    description = describe(model)
    assert description["format_version"] == 3
    assert json.loads(json.dumps(description)) == description
    assert rebuild(fresh, description["modules"]) == {"embed": "embed"}
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))
    twin = copy.deepcopy(model)
    assert twin.head.embedding is twin.embed and torch.equal(twin(IDS), model(IDS))


def test_int8_codes_are_close(model):
    plain, rounded = copy.deepcopy(model), model
    convert(plain, recipe(embed={}))
    convert(rounded, recipe(embed={"dtype": "int8"}))
    difference = (plain.embed(IDS) - rounded.embed(IDS)).norm() / plain.embed(IDS).norm()
    assert 0 < difference < 0.01
    (entry,) = rounded.lean_report().embeddings
    assert entry.lean_bytes == 40 * 8 + 4 * (40 + 16 * 8) == entry.formula_bytes


def test_a_head_may_keep_the_table(model):
    table = model.embed.weight.detach().clone()
    convert(model, recipe(embed={"head": False}))
    assert type(model.head) is nn.Linear and torch.equal(model.head.weight, table)


def test_an_untied_head_is_left_alone():
    model = Model(tied=False)
    head = model.head
    convert(model, recipe(embed={}))
    assert model.head is head and type(head) is nn.Linear


def test_linear_rules_do_not_touch_a_tied_head(model):
    convert(model, recipe(embed={}) | {"linear": {"*": {"density": 0.5, "block_shape": [8, 8]}}})
    assert [entry.name for entry in model.lean_report().entries] == ["up"]
    assert [entry.heads for entry in model.lean_report().embeddings] == [["head"]]


def test_frozen_tables_stay_frozen(model):
    model.embed.weight.requires_grad_(False)
    convert(model, recipe(embed={}))
    assert not any(parameter.requires_grad for parameter in model.embed.parameters())


def test_two_tables_of_one_parameter_are_refused(model):
    model.other = nn.Embedding(40, 16)
    model.other.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"embed \(shares its table with other.weight, untie"):
        convert(model, recipe(embed={}))


class Scaled(nn.Embedding):
    """Uses its weight in its own way."""


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"embd": {}}, "'embd' matches no module; .* 'embed'"),
        ({"up": {}}, r"matches only .*up \(Linear\); nn.Embedding can"),
        ({"head": {}}, r"head \(Linear\)"),
        ({"scaled": {}}, r"scaled \(Scaled, a subclass of nn.Embedding"),
        ({"capped": {}}, r"capped \(Embedding with max_norm"),
        ({"embed": {"rank": 17}}, "embed: rank must be at most 16 for a table of 40 x 16, got 17"),
        ({"embed": {"kind": "morphte"}}, r"embed: kind 'morphte' .*convert\(..., tokenizer=...\)"),
        ({"embed": {"kind": "morphte", "morphemes": "none.json"}}, "none.json"),
        ({"nan": {}}, "the weight of nan has NaN or infinite values"),
    ],
)
def test_mistakes_leave_the_model_unchanged(model, rules, message):
    model.scaled = Scaled(40, 16)
    model.capped = nn.Embedding(40, 16, max_norm=1.0)
    model.nan = nn.Embedding(40, 16)
    model.nan.weight.data[3, 3] = torch.nan
    before = names(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(model, recipe(**rules) | {"linear": {"up": {"density": 0.5}}})
    assert names(model) == before


def test_converting_twice_is_an_error(model):
    convert(model, recipe(embed={}))
    with pytest.raises(ValueError, match="LowRankEmbedding, compressed already"):
        convert(model, recipe(embed={}))
    with pytest.raises(ValueError, match=r"head \(LowRankHead"):
        convert(model, {"linear": {"head": {}}})


def test_to_dense_goes_back(model):
    convert(model, recipe(embed={}))
    expected = model(IDS)
    to_dense(model)
    assert type(model.embed) is nn.Embedding and model.embed.padding_idx == 3
    assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)


def test_progress_tells_the_steps_of_a_fit(model):
    steps = []
    convert(
        model,
        recipe(embed={"kind": "autoencoder", "epochs": 2}) | {"linear": {"up": {"density": 1.0}}},
        progress=lambda *step: steps.append(step),
    )
    assert steps[0] == (0, 2, "embed: fit autoencoder, epoch 1 of 2, 0 of 2")
    assert steps[-2:] == [(1, 2, "up"), (2, 2, "")]


def test_a_description_must_fit(model):
    modules = describe(convert(copy.deepcopy(model), recipe(embed={})))["modules"]
    with pytest.raises(ValueError, match="'up' must be an embedding in the dense model, it is Lin"):
        rebuild(copy.deepcopy(model), {"up": modules["embed"]})
    head = {"embed": modules["embed"] | {"head": True}}
    with pytest.raises(ValueError, match="must be an output head in the dense model, it is Emb"):
        rebuild(copy.deepcopy(model), head)
    wrong = {"embed": modules["embed"] | {"num_embeddings": 41}}
    with pytest.raises(ValueError, match=r"saved as a table of \(41, 16\), the dense model has"):
        rebuild(copy.deepcopy(model), wrong)
