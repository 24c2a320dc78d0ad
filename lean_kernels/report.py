# SPDX-License-Identifier: Apache-2.0
"""What `convert` did to a model, layer by layer."""

from dataclasses import asdict, dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from lean_kernels.nn import BlockSparseLinear
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
            dense_size = numbers * layer.weight.element_size()
            block_shape, density = layer.block_shape, layer.density
            return cls(
                name, "BlockSparseLinear", *shape, block_shape, density, dense_size, size, note
            )
        out_features, in_features = linear_shape(layer)
        return cls(name, "dense", in_features, out_features, None, 1.0, size, size, note)


@dataclass(frozen=True)
class LeanReport:
    """Every layer that was replaced, or matched and left dense, with sizes and densities."""

    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> "LeanReport":
        """The block-sparse layers `model` has, however they came there."""
        return cls(
            [
                Entry.of(name, layer)
                for name, layer in model.named_modules()
                if isinstance(layer, BlockSparseLinear)
            ]
        )

    @property
    def replaced(self) -> int:
        """Number of layers that are block-sparse."""
        return sum(entry.became != "dense" for entry in self.entries)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all listed layers, were they dense."""
        return sum(entry.dense_bytes for entry in self.entries)

    @property
    def lean_bytes(self) -> int:
        """Bytes of all listed layers as they are."""
        return sum(entry.lean_bytes for entry in self.entries)

    def to_dict(self) -> dict:
        """Entries and totals as plain lists, dicts and numbers."""
        return {
            "entries": [asdict(entry) for entry in self.entries],
            "replaced": self.replaced,
            "left_dense": len(self.entries) - self.replaced,
            "dense_bytes": self.dense_bytes,
            "lean_bytes": self.lean_bytes,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A header and one row of text per entry, for a table."""
        header = ("module", "became", "out x in", "blocks", "density", "dense", "lean", "note")
        return [header] + [
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

    def summary(self) -> str:
        """One line: how many layers, and the bytes before and after."""
        left = len(self.entries) - self.replaced
        return (
            f"{self.replaced} layers block-sparse, {left} left dense: "
            f"{readable_bytes(self.dense_bytes)} -> {readable_bytes(self.lean_bytes)}"
        )

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
