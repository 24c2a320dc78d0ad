# SPDX-License-Identifier: Apache-2.0
"""The rule of a recipe's [embedding] section."""

from dataclasses import dataclass

from lean_kernels._checks import MOST, check_bool, check_choice, settings

KINDS = ("low_rank", "autoencoder", "morphte", "tensor_train")
# Settings that some kinds alone have.
_ONLY = {
    "activation": ("autoencoder",),
    "dtype": ("low_rank", "autoencoder"),
    "epochs": ("autoencoder", "morphte"),
    "seed": ("autoencoder", "morphte"),
    "texts": ("autoencoder", "morphte"),
    "morphemes": ("morphte",),
    "order": ("morphte", "tensor_train"),
    "layer_norm": ("morphte",),
}


@dataclass(frozen=True)
class EmbeddingRule:
    """What the embeddings that a glob matches become.

    Args:
        kind: "low_rank" (SVD), "autoencoder" (arXiv 2106.08181), "morphte" (arXiv 2210.15379) or
            "tensor_train" (TT-SVD).
        rank: of the kind.
        head: where the output head has the same table, replace it by the embedding's tied head. If
            false it stays dense and is tied no longer. A head with a table of its own is never
            touched.
        activation: of an autoencoder: None, or "elu".
        dtype: of low-rank codes and those of an autoencoder: None for the table's, or "int8" with
            a scale per row.
        epochs: of fitting an autoencoder or MorphTE; None for the default of the fit.
        seed: of that fit.
        texts: UTF-8 text file; a row counts in the fit as often as its token occurs there, plus
            once. None: all alike.
        morphemes: JSON file with the morphemes of each row, see `compress.morphemes`; None has
            Morfessor find them in the tokenizer's vocabulary.
        order: morphemes per word, or cores of a tensor train, 2 to 4.
        layer_norm: whether MorphTE's rows go through a LayerNorm.

    Raises:
        ValueError: a value of the wrong type, out of range, or of another kind.
    """

    kind: str | None = None
    rank: int | None = None
    head: bool = True
    activation: str | None = None
    dtype: str | None = None
    epochs: int | None = None
    seed: int = 0
    texts: str | None = None
    morphemes: str | None = None
    order: int = 3
    layer_norm: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        self._check_integer("rank", self.rank, 1)
        check_bool("head", self.head)
        for name, kinds in _ONLY.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            if value != default and self.kind not in kinds:
                raise ValueError(
                    f"{name} goes with kind {' or '.join(map(repr, kinds))}, got {value!r} with "
                    f"{self.kind!r}"
                )
        check_choice("activation", self.activation, (None, "elu"))
        check_choice("dtype", self.dtype, (None, "int8"))
        if self.epochs is not None:
            self._check_integer("epochs", self.epochs, 0)
        self._check_integer("seed", self.seed, 0)
        for name in ("texts", "morphemes"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be the path of a file, got {value!r}")
        check_choice("order", self.order, (2, 3, 4))
        check_bool("layer_norm", self.layer_norm)

    def _check_integer(self, name: str, value, least: int) -> None:
        if type(value) is not int or not least <= value <= MOST:
            raise ValueError(f"{name} must be an integer, {least} or more, got {value!r}")

    def to_dict(self) -> dict:
        """What differs from the defaults, as plain numbers and strings."""
        return settings(self)
