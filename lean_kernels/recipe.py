# SPDX-License-Identifier: Apache-2.0
"""What to replace with what: the recipe `convert` follows, as a dataclass, a dict or a TOML file.

[linear."encoder.layer.*.intermediate.dense"]
block_shape = [32, 32]
density = 0.2
[embedding."embeddings.word_embeddings"]
kind = "autoencoder"
rank = 96
[tokens]
profile = [1.0, 0.8, 0.5, 0.3]
[exits]
criterion = "entropy"
threshold = 0.3
"""

import difflib
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from lean_kernels._checks import MOST, check_bool, check_choice, check_fraction, listed, settings
from lean_kernels.embedding_rule import EmbeddingRule
from lean_kernels.nn.token_profile import check_profile, rescale
from lean_kernels.ops.block_sparse_linear import int8

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_SIDE = 1 << 16  # of a block; what the kernels take
_SECTIONS = ("linear", "embedding", "tokens", "exits")
_BARE_GLOB = re.compile(rb"^\s*\[(linear|embedding)\.[^\"'\]]*[*?]", re.MULTILINE)


@dataclass(frozen=True)
class LinearRule:
    """How the linear layers that a glob matches become block-sparse.

    Args:
        block_shape: (block_out, block_in), the size of a block of the weight.
        density: fraction of blocks to keep, those of largest L2 norm, in (0, 1]. None keeps exactly
            the blocks that hold a non-zero, for a model that is pruned already; of a dense layer
            that is all, and where the kernel wins even then (`dense_above`), it computes that.
        dense_above: leave a layer dense when the fraction of kept blocks is above this, in [0, 1].
            None takes the break-even measured for the device, dtype and block shape.
        fuse_activation: run the activation that follows the layer inside its kernel, where the
            model's architecture is known and the activation is one the kernel has.
        dtype: None for that of the layer, or "int8": weights rounded per output, inputs per row,
            for inference; blocks then have a multiple of 16 outputs and of 4 inputs.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    block_shape: tuple[int, int] = (32, 32)
    density: float | None = None
    dense_above: float | None = None
    fuse_activation: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        shape = self.block_shape
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) != 2
            or any(type(size) is not int or not 1 <= size <= MOST_SIDE for size in shape)
        ):
            raise ValueError(
                f"block_shape must be two integers from 1 to {MOST_SIDE}, got {shape!r}"
            )
        object.__setattr__(self, "block_shape", tuple(shape))
        check_fraction("density", self.density, zero=False)
        check_fraction("dense_above", self.dense_above, zero=True)
        check_bool("fuse_activation", self.fuse_activation)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("int8",))
            int8.check_block_shape(self.block_shape, 'dtype "int8"')


@dataclass(frozen=True)
class TokenRule:
    """How the encoder treats tokens: packed without padding, and dropped as layers go by.

    At most one of `profile`, `threshold` and `counts` says which tokens a layer drops, between its
    attention and its feed-forward, by the attention each token received there. Without any of them
    padding goes and every token stays, which is exact.

    Args:
        packed: run on tokens without padding. True; without it there is nothing a rule could do.
        profile: per layer the fraction of each sequence's original tokens kept, in (0, 1], never
            rising; ceil(fraction * length) stay, at least one (ACC, arXiv 2201.03327).
        speed: rescales `profile` without training anew, see `token_profile.rescale`; 1 leaves it.
        threshold: per layer the score below which a token goes (LTP, arXiv 2107.00910).
        counts: per layer how many tokens stay of a sequence that has more (PoWER-BERT, arXiv
            2001.08950); never rising.
        reduction: "mean" divides a score by heads and query rows, "sum" does not. It matters for
            `threshold` alone.
        exclude_diagonal: leave out the attention a token pays itself (PoWER-BERT).
        protect: tokens that always stay: "first" of each sequence, or "ends", first and last.
        dropped: what the encoder returns for a dropped token: "last", the output of the last layer
            it went through whole, or "zeros".
        first_only: the last layer computes the first token alone and the encoder returns zeros for
            all others. None does so where the model is known to read nothing else.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    packed: bool = True
    profile: tuple[float, ...] | None = None
    speed: float = 1.0
    threshold: tuple[float, ...] | None = None
    counts: tuple[int, ...] | None = None
    reduction: str = "mean"
    exclude_diagonal: bool = False
    protect: str = "first"
    dropped: str = "last"
    first_only: bool | None = None

    def __post_init__(self) -> None:
        if self.packed is not True:
            raise ValueError(
                f"packed must be true, got {self.packed!r}; leave [tokens] out to keep the padding"
            )
        ways = ("profile", "threshold", "counts")
        ways = [name for name in ways if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of profile, threshold and counts, got {listed(ways)}")
        if self.profile is not None:
            object.__setattr__(self, "profile", check_profile(self.profile))
        if isinstance(self.speed, int) and self.speed > MOST:  # more than a float can hold
            raise ValueError(f"speed must be at most {MOST}")
        rescale(self.profile or (1.0,), self.speed)
        if self.speed != 1 and self.profile is None:
            raise ValueError(f"speed rescales a profile, and there is none; got {self.speed}")
        self._check_numbers("threshold", (int, float), "numbers, 0 or more")
        self._check_numbers("counts", int, "integers, 1 or more")
        if self.counts is not None and list(self.counts) != sorted(self.counts, reverse=True):
            raise ValueError(f"counts must not rise, got {list(self.counts)}")
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_choice("protect", self.protect, ("first", "ends"))
        check_choice("dropped", self.dropped, ("last", "zeros"))
        check_bool("exclude_diagonal", self.exclude_diagonal)
        if self.first_only is not None:
            check_bool("first_only", self.first_only)

    def _check_numbers(self, name: str, kind, expected: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        least = 1 if kind is int else 0
        if (
            not isinstance(values, (list, tuple))
            or not values
            or any(isinstance(v, bool) or not isinstance(v, kind) for v in values)
            or not all(least <= v <= MOST for v in values)
        ):
            raise ValueError(f"{name} must be a list of {expected}, one per layer, got {values!r}")
        object.__setattr__(self, name, tuple(values))

    @property
    def layers(self) -> int | None:
        """Number of layers the rule is for; None fits any encoder."""
        per_layer = self.profile or self.threshold or self.counts
        return None if per_layer is None else len(per_layer)

    def to_dict(self) -> dict:
        """What differs from the defaults, as plain lists, numbers and strings."""
        return settings(self)


@dataclass(frozen=True)
class ExitRule:
    """When a sample of a batch is done before the last layer.

    After each layer but the last an exit head reads the sample's first token.

    Args:
        criterion: "entropy": exit once the entropy of the predicted distribution (in nats) is below
            `threshold` (DeeBERT, arXiv 2004.12993; COST-EFF, arXiv 2210.15523). "confidence": once
            its largest probability is at least `threshold`. "patience": once `patience` exits in a
            row predicted the same as the one before (PABEE, arXiv 2006.04152); a head of one output
            agrees where two outputs differ by less than `threshold`.
        threshold: see above; 0 or more, for "confidence" in [0, 1].
        patience: see above; 1 or more.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    criterion: str = "entropy"
    threshold: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, ("entropy", "confidence", "patience"))
        value, most = self.threshold, 1 if self.criterion == "confidence" else MOST
        if value is None:
            if self.criterion != "patience":
                raise ValueError(f"criterion {self.criterion!r} needs a threshold")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"threshold must be a number, got {value!r}")
        elif not 0 <= value <= most:
            raise ValueError(f"threshold must lie in [0, {most}], got {value}")
        if (self.criterion == "patience") != (self.patience is not None):
            raise ValueError(
                f"patience goes with criterion 'patience' and only with it, got {self.patience!r} "
                f"with {self.criterion!r}"
            )
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise ValueError(f"patience must be an integer, 1 or more, got {self.patience!r}")

    def to_dict(self) -> dict:
        """What differs from the defaults, as plain numbers and strings."""
        return {"criterion": self.criterion} | settings(self)


@dataclass
class Recipe:
    """Which modules of a model become what.

    Args:
        linear, embedding: glob on full module names (`fnmatch`, case-sensitive; `*` also crosses
            dots) to rule. The first glob that matches a module wins; what none matches stays as it
            is.
        tokens: how the model's encoder treats tokens. None leaves the encoder as it is, or only
            packs it where `exits` is given.
        exits: early exits of a sequence classifier.
    """

    linear: dict[str, LinearRule] = field(default_factory=dict)
    tokens: TokenRule | None = None
    exits: ExitRule | None = None
    embedding: dict[str, EmbeddingRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _BY_GLOB.items():
            for glob, rule in getattr(self, name).items():
                if not isinstance(glob, str) or not isinstance(rule, kind):
                    raise ValueError(
                        f"Recipe.{name} maps a glob to a rule, {kind.__name__}, got {glob!r}: "
                        f"{rule!r}; Recipe.from_dict takes plain dicts"
                    )
        for name, kind in (("tokens", TokenRule), ("exits", ExitRule)):
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, kind):
                raise ValueError(
                    f"Recipe.{name} must be a {kind.__name__}, got {rule!r}; "
                    "Recipe.from_dict takes plain dicts"
                )

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> "Recipe":
        """Read a recipe file. Raises ValueError for what is not TOML or not a recipe."""
        text = Path(path).read_bytes()
        try:
            content = tomllib.loads(text.decode())
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
            bare = _BARE_GLOB.search(text)
            hint = f'; a glob needs quotes: [{bare[1].decode()}."..."]' if bare else ""
            raise ValueError(f"{os.fspath(path)}: not valid TOML: {error}{hint}") from None
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
            if section not in _SECTIONS:
                raise ValueError(
                    f"recipe: unknown section [{section}]; expected {listed(_SECTIONS)}"
                )
        by_glob = {}
        for name, kind in _BY_GLOB.items():
            table = content.get(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"recipe: [{name}] must hold a table per glob, got {table!r}")
            by_glob[name] = {
                glob: rule_of(kind, rule, f'recipe: [{name}."{glob}"]')
                for glob, rule in table.items()
            }
        tokens, exits = (
            rule_of(kind, content[name], f"recipe: [{name}]") if name in content else None
            for name, kind in (("tokens", TokenRule), ("exits", ExitRule))
        )
        return cls(tokens=tokens, exits=exits, **by_glob)

    def to_dict(self) -> dict:
        """The recipe as plain lists, numbers and dicts; `from_dict` gives it back."""
        linear = {}
        for glob, rule in self.linear.items():
            values = {item.name: getattr(rule, item.name) for item in fields(rule)}
            values["block_shape"] = list(rule.block_shape)
            linear[glob] = {key: value for key, value in values.items() if value is not None}
        embedding = {glob: rule.to_dict() for glob, rule in self.embedding.items()}
        rules = {"tokens": self.tokens, "exits": self.exits}
        return {
            "linear": linear,
            **({"embedding": embedding} if embedding else {}),
            **{name: rule.to_dict() for name, rule in rules.items() if rule is not None},
        }


_BY_GLOB = {"linear": LinearRule, "embedding": EmbeddingRule}


def rule_of(kind: type, values, where: str):
    """The rule that a table spells. Raises ValueError, which names the table as `where`."""
    valid = [item.name for item in fields(kind)]
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table with the keys {listed(valid)}, got {values!r}")
    for key, value in values.items():
        if key in valid:
            continue
        if isinstance(value, dict) and kind in _BY_GLOB.values():
            hint = f'; quote a glob that has dots: {where[len("recipe: ") : -2]}.{key}"]'
        else:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{where} unknown key {key!r}; expected {listed(valid)}{hint}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
