# SPDX-License-Identifier: Apache-2.0
"""What `convert` did to a model, layer by layer."""

from dataclasses import asdict, dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from lean_kernels import embedding_kinds, embeddings
from lean_kernels.nn import BlockSparseLinear, LeanEncoder
from lean_kernels.nn.token_profile import rescale
from lean_kernels.spec import linear_shape


@dataclass(frozen=True)
class Entry:
    """One layer that a recipe matched. Bytes count weight, bias and indices."""

    name: str
    became: str  # "BlockSparseLinear", or "dense" when it was left as it is
    in_features: int
    out_features: int
    block_shape: tuple[int, int] | None
    density: float
    dense_bytes: int
    lean_bytes: int
    note: str = ""

    @classmethod
    def of(cls, name: str, layer: nn.Module, note: str = "") -> "Entry":
        """The entry of a layer as it now is: block-sparse, or a dense one left alone."""
        tensors = [t for t in (*layer.parameters(), *layer.buffers()) if not is_lazy(t)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if isinstance(layer, BlockSparseLinear):
            biases = 0 if layer.bias is None else layer.out_features
            numbers = layer.in_features * layer.out_features + biases
            shape = layer.in_features, layer.out_features
            wide = layer.weight if layer.weight_scales is None else layer.weight_scales
            dense_size = numbers * (wide if layer.bias is None else layer.bias).element_size()
            block_shape, density = layer.block_shape, layer.density
            return cls(
                name, "BlockSparseLinear", *shape, block_shape, density, dense_size, size, note
            )
        out_features, in_features = linear_shape(layer)
        return cls(name, "dense", in_features, out_features, None, 1.0, size, size, note)


@dataclass(frozen=True)
class EmbeddingEntry:
    """An embedding, or an output head with a table of its own, that is compressed."""

    name: str
    became: str  # its class
    num_embeddings: int
    embedding_dim: int
    rank: int
    dense_bytes: int
    lean_bytes: int  # of its tensors, those of a head's bias left out
    formula: str  # of its numbers, as its paper counts them
    formula_bytes: int
    heads: list[str]  # output heads tied to it, which store nothing

    @classmethod
    def of(cls, model: nn.Module, name: str, module: nn.Module) -> "EmbeddingEntry":
        """The entry of a compressed embedding, or of a head that owns one."""
        layer = embeddings.table_of(module)
        expected, formula = embedding_kinds.formula(layer)
        return cls(
            name,
            type(layer).__name__ if layer is module else f"head of {type(layer).__name__}",
            layer.num_embeddings,
            layer.embedding_dim,
            embedding_kinds.rank(layer),
            layer.dense_nbytes,
            layer.nbytes,
            formula,
            expected,
            embeddings.heads_of(model, module),
        )

    @property
    def note(self) -> str:
        """Its bytes against the formula, and what is tied to it."""
        off = self.lean_bytes / self.formula_bytes - 1
        parts = [
            f"{self.dense_bytes / self.lean_bytes:.3g}x smaller",
            f"{self.formula} = {readable_bytes(self.formula_bytes)}, stored {off:+.2%}",
            *(f"{head} is tied to it" for head in self.heads),
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder that runs on packed tokens."""

    name: str
    layers: int
    tokens: dict  # of its TokenRule, what differs from the defaults
    exits: dict | None  # of its ExitRule
    first_only: bool

    @classmethod
    def of(cls, name: str, encoder: LeanEncoder) -> "EncoderEntry":
        """The entry of an encoder as it now is."""
        tokens, exits = encoder.token_rule, encoder.exit_rule
        return cls(
            name,
            len(encoder.layers),
            {} if tokens is None else tokens.to_dict(),
            None if exits is None else exits.to_dict(),
            encoder.first_only,
        )

    @property
    def note(self) -> str:
        """What it saves, in words."""
        parts = ["no padding"]
        if profile := self.tokens.get("profile"):
            kept = rescale(profile, self.tokens.get("speed", 1))
            parts.append(f"mean kept {sum(kept) / len(kept):.2f} of the tokens")
        parts += [
            f"tokens dropped by {how}" for how in ("threshold", "counts") if how in self.tokens
        ]
        if self.exits is not None:
            parts.append(f"exits by {self.exits['criterion']}")
        return ", ".join(parts + ["last layer for the first token only"] * self.first_only)


@dataclass(frozen=True)
class LeanReport:
    """Every layer that was replaced, or matched and left dense, with sizes and densities, and
    every encoder and embedding that was replaced."""

    entries: list[Entry] = field(default_factory=list)
    encoders: list[EncoderEntry] = field(default_factory=list)
    embeddings: list[EmbeddingEntry] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> "LeanReport":
        """The lean layers and encoders `model` has, however they came there."""
        modules = list(model.named_modules())
        return cls(
            [Entry.of(name, m) for name, m in modules if isinstance(m, BlockSparseLinear)],
            [EncoderEntry.of(name, m) for name, m in modules if isinstance(m, LeanEncoder)],
            [EmbeddingEntry.of(model, *item) for item in embeddings.compressed(model).items()],
        )

    @property
    def replaced(self) -> int:
        """Number of layers that are block-sparse."""
        return sum(entry.became != "dense" for entry in self.entries)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all listed layers, were they dense."""
        return sum(entry.dense_bytes for entry in (*self.entries, *self.embeddings))

    @property
    def lean_bytes(self) -> int:
        """Bytes of all listed layers as they are."""
        return sum(entry.lean_bytes for entry in (*self.entries, *self.embeddings))

    def to_dict(self) -> dict:
        """Entries and totals as plain lists, dicts and numbers."""
        return {
            "entries": [asdict(entry) for entry in self.entries],
            "encoders": [asdict(entry) for entry in self.encoders],
            "embeddings": [asdict(entry) for entry in self.embeddings],
            "replaced": self.replaced,
            "left_dense": len(self.entries) - self.replaced,
            "dense_bytes": self.dense_bytes,
            "lean_bytes": self.lean_bytes,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A header and one row of text per entry, for a table."""
        header = ("module", "became", "out x in", "blocks", "density", "dense", "lean", "note")
        return (
            [header]
            + [
                (
                    entry.name,
                    entry.became,
                    f"{entry.out_features} x {entry.in_features}",
                    "x".join(map(str, entry.block_shape)) if entry.block_shape else "-",
                    f"{entry.density:.3f}",
                    readable_bytes(entry.dense_bytes),
                    readable_bytes(entry.lean_bytes),
                    entry.note,
                )
                for entry in self.entries
            ]
            + [
                (
                    entry.name,
                    entry.became,
                    f"{entry.num_embeddings} x {entry.embedding_dim}",
                    f"rank {entry.rank}",
                    "-",
                    readable_bytes(entry.dense_bytes),
                    readable_bytes(entry.lean_bytes),
                    entry.note,
                )
                for entry in self.embeddings
            ]
            + [
                (
                    entry.name,
                    "LeanEncoder",
                    f"{entry.layers} layers",
                    "-",
                    "-",
                    "-",
                    "-",
                    entry.note,
                )
                for entry in self.encoders
            ]
        )

    def summary(self) -> str:
        """One line: how many layers, the bytes before and after, what the encoders save."""
        left = len(self.entries) - self.replaced
        parts = [f"{entry.name}: {entry.note}" for entry in self.encoders]
        if self.embeddings:
            names = ", ".join(entry.name for entry in self.embeddings)
            parts.insert(0, f"{names} compressed")
        if self.entries:
            parts.insert(0, f"{self.replaced} layers block-sparse, {left} left dense")
        if self.entries or self.embeddings:
            sizes = f"{readable_bytes(self.dense_bytes)} -> {readable_bytes(self.lean_bytes)}"
            last = bool(self.entries) + bool(self.embeddings) - 1
            parts[last] += f": {sizes}"
        return "; ".join(parts)

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary()])


def readable_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, _ = size / 1024, units.pop(0)
    return f"{size:.4g} {units[0]}"


def attached(report: LeanReport) -> LeanReport:
    """The report; a module-level function, so that a model that carries it pickles and copies."""
    return report
