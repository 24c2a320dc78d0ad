# SPDX-License-Identifier: Apache-2.0
"""What follows the making of an embedding's row: rows of small tables added, the sum normalised.

Shared by the embedding ops: their checks, and what it means in plain PyTorch, with gradients.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = (None, "layer", "rms")  # the index is the code in the schemas
MOST_ADDED = 2
# How the schema of an op that takes `added` and `norm` ends: as `spread` and `flatten` give them.
SCHEMA = (
    "Tensor? ids0, Tensor? table0, Tensor? ids1, Tensor? table1, "
    "int norm, Tensor? norm_weight, Tensor? norm_bias, float eps"
)
NOTHING = (None, None, None, None, 0, None, None, 0.0)


@dataclass(frozen=True)
class RowNorm:
    """Normalisation of rows of D features, fused onto the op that makes them.

    Args:
        kind: "layer" (arXiv 1607.06450) or "rms" (arXiv 1910.07467: no mean is subtracted).
        weight: [D] or None; the rows' dtype, or float32 where they have a half precision.
        bias: [D] or None, like weight.
        eps: added to the variance, or to the mean square.
    """

    kind: str = "layer"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


def flatten(norm: RowNorm | None) -> tuple[int, Tensor | None, Tensor | None, float]:
    """`norm` as the arguments of a schema: `int norm, Tensor? weight, Tensor? bias, float eps`."""
    if norm is None:
        return 0, None, None, 0.0
    return KINDS.index(norm.kind), norm.weight, norm.bias, float(norm.eps)


def spread(added, shape: torch.Size) -> tuple[Tensor | None, ...]:
    """`added` as (ids, table, ids, table), the ids with `shape`; None where there are fewer."""
    flat = [t for ids, table in added for t in (torch.broadcast_to(ids, shape), table)]
    return (*flat, *(None,) * (2 * MOST_ADDED - len(flat)))


def check(op: str, norm: RowNorm | None, features: int, dtype: torch.dtype, device) -> None:
    """Raise ValueError unless `norm` fits rows of that many features."""
    if norm is None:
        return
    if not isinstance(norm, RowNorm) or norm.kind not in KINDS[1:]:
        raise ValueError(f"{op}: norm must be None or RowNorm('layer' or 'rms', ...), got {norm!r}")
    check_norm(op, norm.weight, norm.bias, norm.eps, features, dtype, device)


def check_norm(op: str, weight, bias, eps: float, features: int, dtype, device) -> None:
    """Raise ValueError unless a norm's parameters fit rows of that many features."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not eps >= 0:
        raise ValueError(f"{op}: norm eps must not be negative, got {eps}")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != (features,) or tensor.dtype not in (dtype, wide):
            raise ValueError(
                f"{op}: norm {label} must be [{features}] in "
                f"{' or '.join(sorted({str(dtype), str(wide)}))}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: norm {label} is on {tensor.device}, the tables on {device}")


def check_added(op: str, added, shape: torch.Size, features: int, dtype, device) -> None:
    """Raise ValueError unless `added` is up to two (ids, table) pairs that fit."""
    if len(added) > MOST_ADDED or any(len(pair) != 2 for pair in added):
        raise ValueError(f"{op}: added must hold at most {MOST_ADDED} pairs (ids, table)")
    for ids, table in added:
        check_ids(op, "added ids", ids, device)
        if ids.dim() > len(shape) or any(
            size not in (1, want) for size, want in zip(ids.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"{op}: added ids must broadcast to the ids' shape {list(shape)}, got "
                f"{list(ids.shape)}"
            )
        if table.dim() != 2 or table.shape[1] != features or table.dtype != dtype:
            raise ValueError(
                f"{op}: an added table must be {dtype} [*, {features}], got {table.dtype} "
                f"{list(table.shape)}"
            )
        if table.device != device:
            raise ValueError(f"{op}: an added table is on {table.device}, the others on {device}")


def check_ids(op: str, label: str, ids: Tensor, device) -> None:
    """Raise ValueError unless ids are int32 or int64 on that device."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {label} must be int32 or int64, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(
            f"{op}: {label} are on {ids.device}, the tables on {device}; move them to one device"
        )


def check_bounds(op: str, ids: Tensor | None, rows: int, label: str = "ids") -> None:
    """On CPU, raise IndexError unless ids lie in [0, rows). Elsewhere reading them would stall."""
    if ids is None or ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(extreme) for extreme in ids.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(f"{op}: {label} must lie in [0, {rows}), got {low} to {high}")


def wide(tensor: Tensor | None) -> Tensor | None:
    """float32 or float64 as they are, halves in float32."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def add(rows: Tensor, added: tuple[Tensor | None, ...]) -> Tensor:
    """rows (wide) plus those of up to two tables, `added` as `spread` makes it."""
    for ids, table in zip(added[::2], added[1::2], strict=True):
        if ids is not None:
            rows = rows + wide(F.embedding(ids, table))
    return rows


def forward(x: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The rows x (wide) normalised; wide."""
    if norm == 0:
        return x
    if KINDS[norm] == "layer":
        return F.layer_norm(x, x.shape[-1:], wide(weight), wide(bias), eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * wide(weight)
    return y if bias is None else y + wide(bias)


def grad(
    g: Tensor, x: Tensor, norm: int, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (wide), of weight [D] and of bias [D], for g like `forward`'s result."""
    if norm == 0:
        return g, g.new_empty(0), g.new_empty(0)
    shape = x.shape[-1:]
    if KINDS[norm] == "layer":
        # torch's CPU kernel needs a weight and a bias to tell the dtype of their gradients by.
        scale = x.new_ones(shape) if weight is None else wide(weight)
        _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
        return torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, rstd, scale, scale, [True, True, True]
        )
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normal = x * scale
    gw = g if weight is None else g * wide(weight)
    dx = (gw - normal * (gw * normal).mean(-1, keepdim=True)) * scale
    return dx, (g * normal).reshape(-1, *shape).sum(0), g.reshape(-1, *shape).sum(0)


def plain(end) -> bool:
    """Whether the arguments `end`, in the order of SCHEMA, leave rows as they are."""
    return end[0] is None and end[2] is None and end[4] == 0


def trained(end) -> tuple[Tensor | None, ...]:
    """What may be trained of `end`: two added tables, and the norm's weight and bias."""
    return end[1], end[3], end[5], end[6]


def end_grad(g: Tensor, rows: Tensor, end, need) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the rows and of what `trained` lists, None where not needed.

    Args:
        g: of the op's result.
        rows: what the op makes of the arguments NOTHING.
        end: the arguments it was called with.
        need: four bools.
    """
    *added, norm, weight, bias, eps = end
    g, *norms = grad(wide(g), add(wide(rows), tuple(added)), norm, weight, eps)
    tables = zip(added[::2], added[1::2], strict=True)
    grads = [
        torch.ops.aten.embedding_dense_backward(g, ids, table.shape[0], -1, False).to(rows.dtype)
        if needed
        else None
        for (ids, table), needed in zip(tables, need, strict=False)
    ]
    parameters = zip(norms, (weight, bias), need[2:], strict=True)
    return g.to(rows.dtype), [*grads, *(d.to(p.dtype) if n else None for d, p, n in parameters)]
