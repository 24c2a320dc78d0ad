# SPDX-License-Identifier: Apache-2.0
"""select_tokens, gather_tokens, scatter_tokens: which tokens of packed sequences go on, and how."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.token_selection import reference

NAME = "token_selection"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
MODES = ("fraction", "counts", "threshold")  # the index is the code in the schema


@dataclass(frozen=True)
class Threshold:
    """Keep the tokens that score at least `value`, rounded to the scores' dtype (LTP)."""

    value: float


def kept_count(fraction: float, length: int) -> int:
    """How many of `length` tokens select_tokens keeps: ceil(fraction * length - 1e-6), at least 1.

    The 1e-6 takes back what floating point adds: 0.07 * 100 is above 7, and 7 is meant.
    """
    if length == 0:
        return 0
    return min(max(math.ceil(fraction * length - reference.SLACK), 1), length)


def _check_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    # Reading the values would stall an accelerator: the kernels there clamp what they read.
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"select_tokens: cu_seqlens must rise from 0 to the number of tokens, {tokens}; "
            f"got first {int(cu_seqlens[0])}, last {int(cu_seqlens[-1])}"
        )


def _check_bounds(op: str, indices: Tensor, rows: int, distinct: bool) -> None:
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not len(indices):
        return
    low, high = (int(extreme) for extreme in indices.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"{op}: indices must lie in [0, {rows}), the number of tokens, got {low} to {high}"
        )
    if distinct and len(indices.unique()) < len(indices):
        raise ValueError(
            f"{op}: indices must not repeat; of two rows with the same index only one could be kept"
        )


def _reference_select(scores, cu_seqlens, protect, counts, value, mode, total, tensors):
    _check_select(scores, cu_seqlens, protect, counts, tensors)
    _check_seqlens(cu_seqlens, scores.shape[0])
    threshold = MODES[mode] == "threshold"
    indices, cu_kept = reference.select(scores, cu_seqlens, protect, counts, value, threshold)
    if total is not None and not torch.compiler.is_compiling() and len(indices) != total:
        raise ValueError(
            f"select_tokens: total is {total}, but {len(indices)} tokens are kept; leave it out "
            "where the number is not known"
        )
    return indices, cu_kept, reference.gather(tensors, indices)


def _reference_gather(tensors, indices):
    _check_bounds("gather_tokens", indices, tensors[0].shape[0], False)
    return reference.gather(tensors, indices)


def _reference_scatter(packed, indices, total):
    _check_bounds("scatter_tokens", indices, total, True)
    return reference.scatter(packed, indices, total)


def _reference_scatter_into(out, packed, indices):
    _check_bounds("scatter_tokens", indices, out.shape[0], True)
    reference.scatter_into(out, packed, indices)


def _fake_select(scores, cu_seqlens, protect, counts, value, mode, total, tensors):
    if total is None:
        total = torch.library.get_ctx().new_dynamic_size()
    return (
        scores.new_empty(total, dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape),
        [t.new_empty((total, *t.shape[1:])) for t in tensors],
    )


def _fake_gather(tensors, indices):
    return [t.new_empty((indices.shape[0], *t.shape[1:])) for t in tensors]


_MODULE = "lean_kernels.ops.token_selection.triton"
_select = Kernel(
    "select_tokens",
    "(Tensor scores, Tensor cu_seqlens, Tensor? protect, Tensor? counts, float value, int mode, "
    "SymInt? total, Tensor[] tensors) -> (Tensor, Tensor, Tensor[])",
    reference=_reference_select,
    fake=_fake_select,
    triton=f"{_MODULE}:select",
)
_gather = Kernel(
    "gather_tokens",
    "(Tensor[] tensors, Tensor indices) -> Tensor[]",
    reference=_reference_gather,
    fake=_fake_gather,
    triton=f"{_MODULE}:gather",
)
_scatter = Kernel(
    "scatter_tokens",
    "(Tensor packed, Tensor indices, SymInt total) -> Tensor",
    reference=_reference_scatter,
    fake=lambda packed, indices, total: packed.new_empty((total, *packed.shape[1:])),
    triton=f"{_MODULE}:scatter",
)
_scatter_into = Kernel(
    "scatter_tokens_into",
    "(Tensor(a!) out, Tensor packed, Tensor indices) -> ()",
    reference=_reference_scatter_into,
    fake=lambda out, packed, indices: None,
    triton=f"{_MODULE}:scatter_into",
)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, impl, scores, *tensors):
        select = _select.of(impl, scores.device.type)
        indices, cu_kept, rows = select(scores, *arguments, list(tensors))
        ctx.save_for_backward(indices)
        ctx.total, ctx.impl = scores.shape[0], impl
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, cu_kept)
        return indices, cu_kept, *rows

    @staticmethod
    def backward(ctx, _, __, *grads):
        return None, None, None, *_scatter_each(ctx, grads)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, impl, *tensors):
        ctx.save_for_backward(indices)
        ctx.total, ctx.impl = tensors[0].shape[0], impl
        ctx.set_materialize_grads(False)
        return tuple(_gather.of(impl, indices.device.type)(list(tensors), indices))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *_scatter_each(ctx, grads)


def _scatter_each(ctx, grads):
    (indices,) = ctx.saved_tensors
    for grad in grads:
        yield None if grad is None else _scattered(grad, indices, ctx.total, ctx.impl)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, indices, total, impl):
        ctx.save_for_backward(indices)
        ctx.impl = impl
        return _scatter.of(impl, packed.device.type)(packed, indices, total)

    @staticmethod
    def backward(ctx, grad):
        return _gathered((grad,), ctx.saved_tensors[0], ctx.impl)[0], None, None, None


class _ScatterInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, packed, indices, impl):
        ctx.save_for_backward(indices)
        ctx.impl = impl
        ctx.mark_dirty(out)
        _scatter_into.of(impl, out.device.type)(out, packed, indices)
        return out

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        grad_packed = _gathered((grad,), indices, ctx.impl)[0] if ctx.needs_input_grad[1] else None
        return grad.index_fill(0, indices, 0), grad_packed, None, None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _gathered(tensors: tuple[Tensor, ...], indices: Tensor, impl: Impl | None) -> tuple:
    if _needs_grad(*tensors):
        return _Gather.apply(indices, impl, *tensors)
    return tuple(_gather.of(impl, indices.device.type)(list(tensors), indices))


def _scattered(packed: Tensor, indices: Tensor, total: int, impl: Impl | None) -> Tensor:
    if _needs_grad(packed):
        return _Scatter.apply(packed, indices, total, impl)
    return _scatter.of(impl, packed.device.type)(packed, indices, total)


def _mode(keep) -> tuple[Tensor | None, float, int]:
    """`keep` as (counts, value, mode) of the schema."""
    if isinstance(keep, Tensor):
        return keep, 0.0, MODES.index("counts")
    if isinstance(keep, Threshold):
        return None, float(keep.value), MODES.index("threshold")
    if isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1:
        return None, float(keep), MODES.index("fraction")
    raise ValueError(
        "select_tokens: keep must be a fraction in (0, 1], an int32 tensor [B] of counts, or a "
        f"Threshold, got {keep!r}"
    )


def _check_select(scores, cu_seqlens, protect, counts, tensors) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"select_tokens: {problem}")

    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1:
        fail(f"scores must be float32 or float64 [T], got {scores.dtype} {list(scores.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail(f"cu_seqlens must be int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if protect is not None and (protect.dtype != torch.bool or protect.shape != scores.shape):
        fail(
            f"protect must be bool {list(scores.shape)} like scores, got {protect.dtype} "
            f"{list(protect.shape)}"
        )
    sequences = cu_seqlens.shape[0] - 1
    if counts is not None and (counts.dtype != torch.int32 or counts.shape != (sequences,)):
        fail(
            f"keep must be int32 [{sequences}], one count per sequence, got {counts.dtype} "
            f"{list(counts.shape)}"
        )
    check_devices(
        "select_tokens", scores=scores, cu_seqlens=cu_seqlens, protect=protect, keep=counts
    )
    _check_rows("compact_tokens", tensors, scores.shape[0], scores.device)


def _check_rows(op: str, tensors, tokens: int, device: torch.device) -> None:
    for t in tensors:
        if t.dim() < 1 or t.shape[0] != tokens:
            raise ValueError(
                f"{op}: tensors must be [T, ...] with T = {tokens}, got {list(t.shape)}"
            )
        if t.device != device:
            raise ValueError(f"{op}: a tensor is on {t.device}, another on {device}")


def _check_indices(op: str, indices: Tensor, tensor: Tensor) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(
            f"{op}: indices must be int64 [N], got {indices.dtype} {list(indices.shape)}"
        )
    check_devices(op, indices=indices, tokens=tensor)


def compact_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    *tensors: Tensor,
    keep: float | Tensor | Threshold,
    protect: Tensor | None = None,
    total: int | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, ...]:
    """select_tokens and gather_tokens in one call: on CUDA two launches for all of it.

    Args: as of `select_tokens`; `tensors` [T, ...], of any dtype, lose the tokens not kept.

    Returns:
        (indices, cu_seqlens, *tensors); see there. Differentiable in `tensors`.
    """
    chosen = resolve("select_tokens", impl, IMPLS)
    counts, value, mode = _mode(keep)
    _check_select(scores, cu_seqlens, protect, counts, tensors)
    check_impl("select_tokens", chosen, scores.device)
    arguments = cu_seqlens, protect, counts, value, mode, total
    if _needs_grad(*tensors):
        return _Select.apply(arguments, chosen, scores, *tensors)
    select = _select.of(chosen, scores.device.type)
    indices, cu_kept, rows = select(scores.detach(), *arguments, list(tensors))
    return indices, cu_kept, *rows


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    keep: float | Tensor | Threshold,
    protect: Tensor | None = None,
    total: int | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of each of B packed sequences that go on, best scores first, order preserved.

    Args:
        scores: [T]; float32 or float64. Higher is better; NaN is worst. Of equal scores the lower
            index wins.
        cu_seqlens: int32 [B + 1], rising from 0 to T. Empty sequences stay empty.
        keep: how many. A fraction in (0, 1]: ceil(keep * length - 1e-6) of a sequence (the 1e-6
            takes back what floating point adds to a product), at least 1; see `kept_count`. An
            int32 tensor [B]: that many, at most all (PoWER-BERT). A `Threshold`: those that score
            at least that (LTP).
        protect: bool [T], tokens kept whatever their score and before all others; a count below
            theirs rises to it. None: the first token of each sequence.
        total: the number of kept tokens where it is known. On a GPU nothing then waits for the
            device, and torch.compile sees a shape; should more be kept there, the last are left
            out, and should fewer be, -1 follows. On CPU a wrong total is an error.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        indices int64 [T'], ascending, of the kept tokens, and int32 [B + 1], their cu_seqlens.

    Raises:
        ValueError: a shape, dtype, device, option or impl that does not fit.
        ValueError, RuntimeError: on CPU, values of cu_seqlens that do not rise from 0 to T, or a
            `total` that is not the number kept.
        RuntimeError: a named impl is not available here.

    Linear time, the same result on every device. Rules of this kind: PoWER-BERT, arXiv 2001.08950;
    LTP, arXiv 2107.00910; ACC, arXiv 2201.03327.
    """
    return compact_tokens(
        scores, cu_seqlens, keep=keep, protect=protect, total=total, impl=impl
    )  # fmt: skip


def gather_tokens(
    hidden: Tensor, indices: Tensor, *companions: Tensor, impl: Impl | str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Rows `indices` of `hidden` and of all that travels with it, in one pass.

    Args:
        hidden: [T, ...], any dtype and strides; rows that are contiguous are not copied first.
        indices: int64 [N], in any order.
        companions: more tensors [T, ...]: residual, positions, rotary cos and sin.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        [N, ...], or a tuple of them where there are companions; contiguous. On a GPU a row whose
        index is out of bounds is zero.

    Raises:
        ValueError: a shape, dtype, device or impl that does not fit.
        ValueError, RuntimeError: on CPU, an index out of bounds.

    Differentiable any number of times; the gradient is `scatter_tokens`, and so needs indices that
    do not repeat.
    """
    chosen = resolve("gather_tokens", impl, IMPLS)
    tensors = hidden, *companions
    _check_indices("gather_tokens", indices, hidden)
    _check_rows("gather_tokens", tensors, hidden.shape[0] if hidden.dim() else 0, hidden.device)
    check_impl("gather_tokens", chosen, hidden.device)
    rows = _gathered(tensors, indices, chosen)
    return rows if companions else rows[0]


def scatter_tokens(
    packed: Tensor,
    indices: Tensor,
    total: int,
    *,
    out: Tensor | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """The inverse of gather_tokens: row i of `packed` becomes row indices[i]; each is written once.

    Args:
        packed: [N, ...], any dtype and strides.
        indices: int64 [N], in any order, none twice.
        total: rows of the result.
        out: [total, ...] to write into: its other rows stay. None: they are zero.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        [total, ...]; `out` where it is given.

    Raises:
        ValueError: a shape, dtype, device or impl that does not fit.
        ValueError, RuntimeError: on CPU, an index out of bounds or repeated. On a GPU rows with
            indices out of bounds are left out, and which of two with the same index stays is not
            said.

    Differentiable any number of times in packed and out; the gradient is `gather_tokens`.
    """
    chosen = resolve("scatter_tokens", impl, IMPLS)
    _check_indices("scatter_tokens", indices, packed)
    _check_rows("scatter_tokens", (packed,), indices.shape[0], indices.device)
    if total < 0:
        raise ValueError(f"scatter_tokens: total must not be negative, got {total}")
    check_impl("scatter_tokens", chosen, packed.device)
    if out is None:
        return _scattered(packed, indices, total, chosen)
    expected = (total, *packed.shape[1:])
    if out.shape != expected or out.dtype != packed.dtype or out.device != packed.device:
        raise ValueError(
            f"scatter_tokens: out must be {packed.dtype} {list(expected)} on {packed.device}, got "
            f"{out.dtype} {list(out.shape)} on {out.device}"
        )
    if not out[:1].is_contiguous():
        raise ValueError(
            f"scatter_tokens: each row of out must be contiguous, got strides {out.stride()}"
        )
    if _needs_grad(out, packed):
        return _ScatterInto.apply(out, packed, indices, chosen)
    _scatter_into.of(chosen, out.device.type)(out, packed, indices)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # what an op with a kernel of its own does not
    return out
