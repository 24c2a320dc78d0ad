# SPDX-License-Identifier: Apache-2.0
"""What to replace with what: the recipe `convert` follows, as a dataclass, a dict or a TOML file.

[linear."encoder.layer.*.intermediate.dense"]
block_shape = [32, 32]
density = 0.2
"""

import difflib
import os
import sys
from dataclasses import dataclass, field, fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECTIONS = ("linear",)
_LATER_SECTIONS = ("embedding", "tokens", "exits")


@dataclass(frozen=True)
class LinearRule:
    """How the linear layers that a glob matches become block-sparse.

    Args:
        block_shape: (block_out, block_in), the size of a block of the weight.
        density: fraction of blocks to keep, those of largest L2 norm, in (0, 1]. None keeps exactly
            the blocks that hold a non-zero, for a model that is pruned already.
        dense_above: leave a layer dense when the fraction of kept blocks is above this, in [0, 1].
            None takes the break-even measured for the device, dtype and block shape.
        fuse_activation: run the activation that follows the layer inside its kernel, where the
            model's architecture is known and the activation is one the kernel has.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    block_shape: tuple[int, int] = (32, 32)
    density: float | None = None
    dense_above: float | None = None
    fuse_activation: bool = True

    def __post_init__(self) -> None:
        shape = self.block_shape
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) != 2
            or any(type(size) is not int or size < 1 for size in shape)
        ):
            raise ValueError(f"block_shape must be two positive integers, got {shape!r}")
        object.__setattr__(self, "block_shape", tuple(shape))
        _check_fraction("density", self.density, zero=False)
        _check_fraction("dense_above", self.dense_above, zero=True)
        if not isinstance(self.fuse_activation, bool):
            raise ValueError(f"fuse_activation must be true or false, got {self.fuse_activation!r}")


@dataclass
class Recipe:
    """Which modules of a model become what.

    Args:
        linear: glob on full module names (`fnmatch`, case-sensitive; `*` also crosses dots) to
            rule. The first glob that matches a module wins; what none matches stays as it is.
    """

    linear: dict[str, LinearRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for glob, rule in self.linear.items():
            if not isinstance(glob, str) or not isinstance(rule, LinearRule):
                raise ValueError(
                    f"Recipe.linear maps a glob to a LinearRule, got {glob!r}: {rule!r}; "
                    "Recipe.from_dict takes plain dicts"
                )

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> "Recipe":
        """Read a recipe file. Raises ValueError for what is not TOML or not a recipe."""
        with open(path, "rb") as file:
            try:
                content = tomllib.load(file)
            except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
                raise ValueError(f"{os.fspath(path)}: not valid TOML: {error}") from None
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_dict(cls, content: dict) -> "Recipe":
        """The recipe that `content` spells, as TOML would be parsed. Raises ValueError."""
        if not isinstance(content, dict):
            raise ValueError(f"recipe: expected a table of sections, got {content!r}")
        for section in content:
            if section in _LATER_SECTIONS:
                raise ValueError(
                    f"recipe: this version of lean_kernels has no section [{section}] yet; "
                    f"it has {_listed(_SECTIONS)}"
                )
            if section not in _SECTIONS:
                raise ValueError(
                    f"recipe: unknown section [{section}]; expected {_listed(_SECTIONS)}"
                )
        table = content.get("linear", {})
        if not isinstance(table, dict):
            raise ValueError(f"recipe: [linear] must hold a table per glob, got {table!r}")
        return cls(linear={glob: _linear_rule(glob, rule) for glob, rule in table.items()})

    def to_dict(self) -> dict:
        """The recipe as plain lists, numbers and dicts; `from_dict` gives it back."""
        linear = {}
        for glob, rule in self.linear.items():
            values = {item.name: getattr(rule, item.name) for item in fields(rule)}
            values["block_shape"] = list(rule.block_shape)
            linear[glob] = {key: value for key, value in values.items() if value is not None}
        return {"linear": linear}


def _check_fraction(name: str, value, *, zero: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value}")


def _linear_rule(glob: str, values) -> LinearRule:
    where = f'recipe: [linear."{glob}"]'
    valid = [item.name for item in fields(LinearRule)]
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table with the keys {_listed(valid)}, got {values!r}")
    for key, value in values.items():
        if key in valid:
            continue
        if isinstance(value, dict):
            hint = f'; quote a glob that has dots: [linear."{glob}.{key}"]'
        else:
            close = difflib.get_close_matches(key, valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{where} unknown key {key!r}; expected {_listed(valid)}{hint}")
    try:
        return LinearRule(**values)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def _listed(names) -> str:
    return ", ".join(names)
