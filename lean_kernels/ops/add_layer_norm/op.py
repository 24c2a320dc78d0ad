# SPDX-License-Identifier: Apache-2.0
"""add_layer_norm: LayerNorm(x + residual), of all rows or of chosen ones, in one pass."""

import torch
from torch import Tensor

from lean_kernels._autocast import autocast
from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.add_layer_norm import reference

NAME = "add_layer_norm"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_bounds(indices: Tensor | None, rows: int) -> None:
    # Plain indexing takes negative indices. Reading them would stall an accelerator or a compiler.
    if indices is None or indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= rows):
        raise ValueError(
            f"{NAME}: indices must lie in [0, {rows}), the rows of x, got "
            f"{int(indices.min())} to {int(indices.max())}"
        )


def _reference_forward(x, residual, weight, bias, indices, eps):
    _check(x, residual, weight, bias, indices, None)
    _check_bounds(indices, x.shape[0])
    return reference.forward(x, residual, weight, bias, indices, eps)


def _fake_forward(x, residual, weight, bias, indices, eps):
    return x.new_empty(x.shape if indices is None else (indices.shape[0], x.shape[1]))


_forward = Kernel(
    "add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? indices, float eps)"
    " -> Tensor",
    reference=_reference_forward,
    fake=_fake_forward,
    triton="lean_kernels.ops.add_layer_norm.triton:forward",
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, indices, eps, impl):
        ctx.save_for_backward(x, residual, weight, indices)
        ctx.eps = eps
        return _forward.of(impl, x.device.type)(x, residual, weight, bias, indices, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, residual, weight, indices = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = reference.grad(
            grad, x, residual, weight, indices, ctx.eps,
            need_x or need_residual, need_weight, need_bias,
        )  # fmt: skip
        added = dx if need_residual else None
        return dx if need_x else None, added, dweight, dbias, None, None, None


def _check(x, residual, weight, bias, indices, impl) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    shape, dtype = x.shape, x.dtype
    if not shape or shape[-1] < 1 or dtype not in DTYPES:
        fail(
            f"x must be [..., D], D at least 1, in one of {', '.join(map(str, DTYPES))}, got "
            f"{dtype} {list(shape)}"
        )
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        fail(
            f"residual must be {dtype} {list(shape)} like x, got {residual.dtype} "
            f"{list(residual.shape)}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if weight.shape != shape[-1:] or weight.dtype not in (dtype, wide):
        fail(
            f"weight must be {list(shape[-1:])} in {' or '.join({str(dtype), str(wide)})}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        fail(
            f"bias must be {weight.dtype} {list(weight.shape)} like weight, got {bias.dtype} "
            f"{list(bias.shape)}"
        )
    if indices is not None and (indices.dtype != torch.int64 or indices.dim() != 1 or x.dim() != 2):
        fail(
            f"indices must be int64 [N] and x then [T, D], got indices {indices.dtype} "
            f"{list(indices.shape)}, x {list(x.shape)}"
        )
    check_devices(NAME, x=x, residual=residual, weight=weight, bias=bias, indices=indices)
    check_impl(NAME, impl, x.device)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    indices: Tensor | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """LayerNorm(x + residual) * weight + bias over the last dimension, in one pass over memory.

    With `indices`, y[i] = LayerNorm(x[j] + residual[j]) * weight + bias for j = indices[i]: rows
    that are not chosen are neither read nor normalised, so dropping tokens costs no pass.

    Args:
        x: [..., D], or [T, D] with indices; float32, bfloat16, float16 or float64. Any strides.
        residual: like x, or None.
        weight: [D]; x's dtype, or float32 for half-precision x.
        bias: [D] in weight's dtype, or None.
        eps: added to the variance; BERT's 1e-12 by default.
        indices: int64 [N], rows to take, in any order; a row may be taken twice.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        x's shape, or [N, D] with indices; x's dtype, contiguous. Sums, and the sum of x and
        residual, are taken in float32 (float64 for float64), the variance around the mean where
        that is larger than the spread. A row's result does not depend on the other rows, bit for
        bit.

    Raises:
        ValueError: a shape, dtype, device or impl that does not fit; on CPU also an index out of
            bounds (ValueError or RuntimeError), which elsewhere gives a row of NaN.
        RuntimeError: a named impl is not available here.

    Differentiable once in x, residual, weight and bias, whatever the impl by torch's own kernel
    for the gradient of layer_norm. Under autocast the inputs are cast to float32, as torch casts
    those of layer_norm on GPU. Layer normalisation: arXiv 1607.06450.
    """
    chosen = resolve(NAME, impl, IMPLS)
    device = x.device.type
    x, residual, weight, bias = autocast(device, x, residual, weight, bias, dtype=torch.float32)
    _check(x, residual, weight, bias, indices, chosen)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (residual is not None and residual.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _AddLayerNorm.apply(x, residual, weight, bias, indices, eps, chosen)
    return _forward.of(chosen, device)(x, residual, weight, bias, indices, eps)
