# SPDX-License-Identifier: Apache-2.0
import pytest

from lean_kernels.recipe import LinearRule, Recipe

TOML = """
[linear."encoder.layer.*.intermediate.dense"]
block_shape = [16, 64]
density = 0.2
[linear."*.dense"]
dense_above = 0.9
fuse_activation = false
"""


def test_toml_dict_and_dataclass_agree(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe(
        {
            "encoder.layer.*.intermediate.dense": LinearRule((16, 64), density=0.2),
            "*.dense": LinearRule(dense_above=0.9, fuse_activation=False),
        }
    )
    assert list(recipe.linear) == ["encoder.layer.*.intermediate.dense", "*.dense"]  # order counts
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_toml(str(path)) == recipe


def test_defaults():
    rule = Recipe.from_dict({"linear": {"*": {}}}).linear["*"]
    assert rule == LinearRule((32, 32), None, None, True)
    assert Recipe.from_dict({}) == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokens": {}}, r"no section \[tokens\] yet; it has linear"),
        ({"embedding": {"e": {}}}, r"no section \[embedding\] yet"),
        ({"exits": {}}, r"no section \[exits\] yet"),
        ({"liner": {}}, r"unknown section \[liner\]; expected linear"),
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
        ({"linear": {"a": {"block_shape": 32}}}, "block_shape must be two positive integers"),
        ({"linear": {"a": {"block_shape": [32]}}}, "block_shape must be two positive integers"),
        ({"linear": {"a": {"block_shape": [32, 0]}}}, "block_shape must be two positive integers"),
        (
            {"linear": {"a": {"block_shape": [32, 1.5]}}},
            "block_shape must be two positive integers",
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
