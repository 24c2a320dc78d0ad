# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lean_kernels.embedding_rule import EmbeddingRule
from lean_kernels.recipe import ExitRule, LinearRule, Recipe, TokenRule

TOML = """
[linear."encoder.layer.*.intermediate.dense"]
block_shape = [16, 64]
density = 0.2
[linear."*.dense"]
dense_above = 0.9
fuse_activation = false
[embedding."*.word_embeddings"]
kind = "autoencoder"
rank = 96
activation = "elu"
[embedding.wpe]
kind = "low_rank"
rank = 8
dtype = "int8"
head = false
[tokens]
profile = [1, 0.5]
speed = 2
[exits]
criterion = "confidence"
threshold = 0.9
"""


def test_toml_dict_and_dataclass_agree(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe(
        {
            "encoder.layer.*.intermediate.dense": LinearRule((16, 64), density=0.2),
            "*.dense": LinearRule(dense_above=0.9, fuse_activation=False),
        },
        TokenRule(profile=(1.0, 0.5), speed=2),
        ExitRule("confidence", threshold=0.9),
        {
            "*.word_embeddings": EmbeddingRule("autoencoder", 96, activation="elu"),
            "wpe": EmbeddingRule("low_rank", 8, head=False, dtype="int8"),
        },
    )
    assert recipe.to_dict()["embedding"]["wpe"] == {
        "kind": "low_rank",
        "rank": 8,
        "head": False,
        "dtype": "int8",
    }
    assert recipe.to_dict()["tokens"] == {"profile": [1.0, 0.5], "speed": 2}
    assert list(recipe.linear) == ["encoder.layer.*.intermediate.dense", "*.dense"]  # order counts
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_toml(str(path)) == recipe


def _low_rank(kind="low_rank", **settings):
    return {"kind": kind, "rank": 4} | settings


def test_defaults():
    rule = Recipe.from_dict({"linear": {"*": {}}}).linear["*"]
    assert rule == LinearRule((32, 32), None, None, True)
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"tokens": {}}) == Recipe(tokens=TokenRule())
    assert TokenRule().to_dict() == {} and TokenRule().layers is None
    assert TokenRule(counts=[4, 2]).layers == 2 == TokenRule(threshold=[0.1, 0]).layers
    with pytest.raises(ValueError, match="must be a TokenRule"):
        Recipe(tokens={"packed": True})
    assert Recipe().to_dict() == {"linear": {}}
    rule = EmbeddingRule("morphte", 4)
    assert (rule.order, rule.layer_norm, rule.head, rule.seed) == (3, True, True, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"liner": {}}, r"unknown section \[liner\]; expected linear, embedding, tokens, exits"),
        ({"embedding": {"e": {}}}, r'\[embedding."e"\] unknown kind None; expected one of'),
        ({"embedding": {"e": {"kind": "svd"}}}, "unknown kind 'svd'; expected one of"),
        (
            {"embedding": {"e": {"kind": "low_rank"}}},
            "rank must be an integer, 1 or more, got None",
        ),
        ({"embedding": {"e": _low_rank(rank=0)}}, "rank must be an integer, 1 or more, got 0"),
        ({"embedding": {"e": _low_rank(rank=True)}}, "rank must be an integer"),
        ({"embedding": {"e": _low_rank(rang=4)}}, r'\[embedding."e"\] unknown key .*mean rank'),
        ({"embedding": {"a": {"b": _low_rank()}}}, r'quote a glob .*\[embedding."a.b"\]'),
        ({"embedding": {"e": _low_rank(head=1)}}, "head must be true or false"),
        ({"embedding": {"e": _low_rank(activation="elu")}}, "activation goes with kind 'autoenc"),
        ({"embedding": {"e": _low_rank(epochs=3)}}, "epochs goes with kind 'autoencoder' or"),
        ({"embedding": {"e": _low_rank(dtype="int4")}}, "unknown dtype 'int4'"),
        ({"embedding": {"e": _low_rank("morphte", dtype="int8")}}, "dtype goes with kind 'low_"),
        ({"embedding": {"e": _low_rank("morphte", order=5)}}, "unknown order 5"),
        ({"embedding": {"e": _low_rank("morphte", morphemes=3)}}, "morphemes must be the path"),
        ({"embedding": {"e": _low_rank(texts="t.txt")}}, "texts goes with kind 'autoencoder' or"),
        ({"embedding": {"e": _low_rank("morphte", layer_norm=0)}}, "layer_norm must be true or"),
        ({"embedding": {"e": _low_rank("autoencoder", epochs=-1)}}, "epochs must be an integer, 0"),
        ({"embedding": {"e": _low_rank("autoencoder", seed=1.5)}}, "seed must be an integer, 0"),
        ({"embedding": {"e": _low_rank("autoencoder", activation="relu")}}, "unknown activation"),
        ({"tokens": []}, r"\[tokens\] must be a table with the keys packed, profile"),
        ({"tokens": {"profil": [1.0]}}, r"unknown key 'profil'.*did you mean profile\?"),
        ({"tokens": {"packed": False}}, r"\[tokens\] packed must be true, got False; leave"),
        ({"tokens": {"profile": []}}, "profile must be a list of numbers"),
        ({"tokens": {"profile": np.ones(2)}}, "profile must be a list of numbers"),
        ({"tokens": {"profile": [0.5, 0.6]}}, "profile must not rise"),
        ({"tokens": {"profile": [0.0]}}, r"profile must hold numbers in \(0, 1\], got 0.0"),
        ({"tokens": {"profile": [1.0], "speed": -1}}, "speed must be finite and not negative"),
        ({"tokens": {"profile": [1.0], "speed": 10**400}}, "speed must be at most"),
        ({"tokens": {"speed": 2.0}}, "speed rescales a profile, and there is none"),
        ({"tokens": {"profile": [1.0], "counts": [3]}}, "give one of .* got profile, counts"),
        ({"tokens": {"counts": [3, 4]}}, "counts must not rise"),
        ({"tokens": {"counts": [0]}}, "counts must be a list of integers, 1 or more"),
        ({"tokens": {"counts": [3.0]}}, "counts must be a list of integers"),
        ({"tokens": {"threshold": [True]}}, "threshold must be a list of numbers"),
        ({"tokens": {"threshold": [float("nan")]}}, "threshold must be a list of numbers"),
        ({"tokens": {"threshold": 0.1}}, "threshold must be a list of numbers"),
        ({"tokens": {"reduction": "max"}}, "unknown reduction 'max'; expected one of"),
        ({"tokens": {"protect": ["first"]}}, r"unknown protect \['first'\]"),
        ({"tokens": {"dropped": None}}, "unknown dropped None"),
        ({"tokens": {"exclude_diagonal": 1}}, "exclude_diagonal must be true or false"),
        ({"tokens": {"first_only": "yes"}}, "first_only must be true or false"),
        ({"exits": {}}, r"\[exits\] criterion 'entropy' needs a threshold"),
        ({"exits": {"criterion": "luck"}}, "unknown criterion 'luck'; expected one of"),
        ({"exits": {"threshold": "0.3"}}, "threshold must be a number, got '0.3'"),
        ({"exits": {"threshold": -0.1}}, r"threshold must lie in \[0, \d+\], got -0.1"),
        ({"exits": {"criterion": "confidence", "threshold": 1.5}}, r"lie in \[0, 1\], got 1.5"),
        ({"exits": {"criterion": "patience"}}, "patience goes with criterion 'patience'"),
        ({"exits": {"threshold": 0.1, "patience": 2}}, "patience goes with criterion 'patience'"),
        ({"exits": {"criterion": "patience", "patience": 0}}, "patience must be an integer, 1 or"),
        ({"linear": {"a": {"densty": 0.2}}}, r'\[linear."a"\] unknown key .*did you mean density'),
        ({"linear": {"a": {"dropout": 0.2}}}, "expected block_shape, density, dense_above"),
        ({"linear": {"a": {"b": {"density": 0.2}}}}, r'quote a glob .*\[linear."a.b"\]'),
        ({"linear": {"a": 0.2}}, r'\[linear."a"\] must be a table'),
        ({"linear": [1]}, r"\[linear\] must hold a table per glob"),
        ({"linear": {"a": {"density": 0}}}, r'\[linear."a"\] density must lie in \(0, 1\], got 0'),
        ({"linear": {"a": {"density": 1.5}}}, r"got 1.5"),
        ({"linear": {"a": {"density": float("nan")}}}, r"got nan"),
        ({"linear": {"a": {"density": "0.2"}}}, "density must be a number, got '0.2'"),
        ({"linear": {"a": {"density": True}}}, "density must be a number, got True"),
        ({"linear": {"a": {"dense_above": -0.1}}}, r"dense_above must lie in \[0, 1\]"),
        ({"linear": {"a": {"block_shape": 32}}}, "must be two integers from 1 to 65536"),
        ({"linear": {"a": {"block_shape": [32]}}}, "must be two integers from 1 to 65536"),
        ({"linear": {"a": {"block_shape": [32, 0]}}}, "must be two integers from 1 to 65536"),
        (
            {"linear": {"a": {"block_shape": [32, 1.5]}}},
            "must be two integers from 1 to 65536",
        ),
        ({"linear": {"a": {"fuse_activation": 1}}}, "fuse_activation must be true or false"),
        ([], "expected a table of sections"),
    ],
)
def test_mistakes_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(content)


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[linear")
    with pytest.raises(ValueError, match=r"recipe.toml: not valid TOML: "):
        Recipe.from_toml(path)
    path.write_text("[linear.encoder.layer.*.dense]\ndensity = 0.5")
    with pytest.raises(ValueError, match=r'a glob needs quotes: \[linear\."\.\.\."\]'):
        Recipe.from_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"recipe.toml: not valid TOML: "):
        Recipe.from_toml(path)
    path.write_text("[linear.a]\ndensty = 1")
    with pytest.raises(ValueError, match=r"recipe.toml: recipe: "):
        Recipe.from_toml(path)
    with pytest.raises(FileNotFoundError, match=r"missing.toml"):
        Recipe.from_toml(tmp_path / "missing.toml")


def test_a_recipe_holds_rules():
    with pytest.raises(ValueError, match=r"Recipe.from_dict takes plain dicts"):
        Recipe({"*": {"density": 0.2}})
    with pytest.raises(ValueError, match=r"Recipe.embedding maps a glob to a rule, EmbeddingRule"):
        Recipe(embedding={"*": LinearRule()})
