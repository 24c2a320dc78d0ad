# SPDX-License-Identifier: Apache-2.0
"""gather_tokens and scatter_tokens: rows of packed tensors move by index, each once."""

import torch
from torch import Tensor

from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.token_selection import reference

IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON, Impl.CUDA)
SCATTER_IMPLS = IMPLS[:3]


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


def _reference_gather(tensors, indices):
    _check_bounds("gather_tokens", indices, tensors[0].shape[0], False)
    return reference.gather(tensors, indices)


def _reference_scatter(packed, indices, total):
    _check_bounds("scatter_tokens", indices, total, True)
    return reference.scatter(packed, indices, total)


def _reference_scatter_into(out, packed, indices):
    _check_bounds("scatter_tokens", indices, out.shape[0], True)
    reference.scatter_into(out, packed, indices)


def _fake_gather(tensors, indices):
    return [t.new_empty((indices.shape[0], *t.shape[1:])) for t in tensors]


_MODULE = "lean_kernels.ops.token_selection.triton"
_gather = Kernel(
    "gather_tokens",
    "(Tensor[] tensors, Tensor indices) -> Tensor[]",
    reference=_reference_gather,
    fake=_fake_gather,
    triton=f"{_MODULE}:gather",
    cuda=True,
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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, impl, *tensors):
        ctx.save_for_backward(indices)
        ctx.total, ctx.impl = tensors[0].shape[0], impl
        ctx.set_materialize_grads(False)
        return tuple(_gather.of(impl, indices.device.type)(list(tensors), indices))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *scatter_each(ctx, grads)


def scatter_each(ctx, grads):
    (indices,) = ctx.saved_tensors
    for grad in grads:
        impl = ctx.impl if ctx.impl in SCATTER_IMPLS else None
        yield None if grad is None else _scattered(grad, indices, ctx.total, impl)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, indices, total, impl):
        ctx.save_for_backward(indices)
        ctx.impl = impl
        return _scatter.of(impl, packed.device.type)(packed, indices, total)

    @staticmethod
    def backward(ctx, grad):
        return gathered((grad,), ctx.saved_tensors[0], ctx.impl)[0], None, None, None


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
        grad_packed = gathered((grad,), indices, ctx.impl)[0] if ctx.needs_input_grad[1] else None
        return grad.index_fill(0, indices, 0), grad_packed, None, None


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def gathered(tensors: tuple[Tensor, ...], indices: Tensor, impl: Impl | None) -> tuple:
    if needs_grad(*tensors):
        return _Gather.apply(indices, impl, *tensors)
    return tuple(_gather.of(impl, indices.device.type)(list(tensors), indices))


def _scattered(packed: Tensor, indices: Tensor, total: int, impl: Impl | None) -> Tensor:
    if needs_grad(packed):
        return _Scatter.apply(packed, indices, total, impl)
    return _scatter.of(impl, packed.device.type)(packed, indices, total)


def check_rows(op: str, tensors, tokens: int, device: torch.device) -> None:
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


def gather_tokens(
    hidden: Tensor, indices: Tensor, *companions: Tensor, impl: Impl | str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Rows `indices` of `hidden` and of all that travels with it, in one pass.

    Args:
        hidden: [T, ...], any dtype and strides; rows that are contiguous are not copied first.
        indices: int64 [N], in any order.
        companions: more tensors [T, ...]: residual, positions, rotary cos and sin.
        impl: "reference", "cpu", "triton", "cuda" (its gradient is Triton's), or None for the best
            one of the device.

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
    check_rows("gather_tokens", tensors, hidden.shape[0] if hidden.dim() else 0, hidden.device)
    check_impl("gather_tokens", chosen, hidden.device)
    rows = gathered(tensors, indices, chosen)
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
    chosen = resolve("scatter_tokens", impl, SCATTER_IMPLS)
    _check_indices("scatter_tokens", indices, packed)
    check_rows("scatter_tokens", (packed,), indices.shape[0], indices.device)
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
    if needs_grad(out, packed):
        return _ScatterInto.apply(out, packed, indices, chosen)
    _scatter_into.of(chosen, out.device.type)(out, packed, indices)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # what an op with a kernel of its own does not
    return out
