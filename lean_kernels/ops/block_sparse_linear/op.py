# SPDX-License-Identifier: Apache-2.0
"""block_sparse_linear: y = activation(x Wᵀ + bias) + residual over block-sparse (BSR) weights."""

import torch
from torch import Tensor

from lean_kernels._autocast import autocast
from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.block_sparse_linear import bsr, int8, reference

NAME = "block_sparse_linear"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")  # the index is the code in the schema
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_bounds(crow, col, in_features, block_in) -> None:
    # Plain indexing takes negative indices. Reading them would stall an accelerator or a compiler.
    if col.device.type == "cpu" and not torch.compiler.is_compiling():
        bsr.check_bounds(crow, col, -(-in_features // block_in), NAME)


def _reference_forward(x, weight, crow, col, bias, residual, out_features, activation):
    name = ACTIVATIONS[activation]
    _check(x, weight, crow, col, bias, residual, out_features, name, None)
    _check_bounds(crow, col, x.shape[-1], weight.shape[2])
    return reference.forward(x, weight, crow, col, bias, residual, out_features, name)


def _reference_grad(grad, x, weight, crow, col, in_features, *needed):
    _check_bounds(crow, col, in_features, weight.shape[2])
    return reference.gradients(grad, x, weight, crow, col, in_features, *needed)


def _fake_grad(grad, x, weight, crow, col, in_features, need_x, need_weight, need_bias):
    options = {"dtype": grad.dtype, "device": grad.device}
    return (
        grad.new_empty(*grad.shape[:-1], in_features) if need_x else grad.new_empty(0),
        bsr.blocks_empty(weight.shape[0], weight.shape[1:], **options)
        if need_weight
        else grad.new_empty(0),
        grad.new_empty(grad.shape[-1] if need_bias else 0),
    )


def _reference_int8(x, weight, scales, crow, col, bias, residual, out_features, activation):
    name = ACTIVATIONS[activation]
    _check(x, weight, crow, col, bias, residual, out_features, name, None, scales)
    _check_bounds(crow, col, x.shape[-1], 4 * weight.shape[1])
    return int8.forward(x, weight, scales, crow, col, bias, residual, out_features, name)


_INDICES = "Tensor weight, Tensor crow_indices, Tensor col_indices"
_TRITON = "lean_kernels.ops.block_sparse_linear.triton"
_forward = Kernel(
    "block_sparse_linear",
    f"(Tensor x, {_INDICES}, Tensor? bias, Tensor? residual, int out_features, int activation)"
    " -> Tensor",
    reference=_reference_forward,
    fake=lambda x, w, crow, col, b, r, n, a: x.new_empty(*x.shape[:-1], n),
    triton=f"{_TRITON}:forward",
)
# Gradients that are not needed are empty; x may be None where that of the weight is not.
_grad = Kernel(
    "block_sparse_linear_grad",
    f"(Tensor grad, Tensor? x, {_INDICES}, int in_features, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    reference=_reference_grad,
    fake=_fake_grad,
    triton=f"{_TRITON}:gradients",
)
_int8_forward = Kernel(
    "block_sparse_linear_int8",
    "(Tensor x, Tensor weight, Tensor weight_scales, Tensor crow_indices, Tensor col_indices, "
    "Tensor? bias, Tensor? residual, int out_features, int activation) -> Tensor",
    reference=_reference_int8,
    fake=lambda x, w, s, crow, col, b, r, n, a: x.new_empty(*x.shape[:-1], n),
    triton="lean_kernels.ops.block_sparse_linear.triton_int8:forward",
)


class _BlockSparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, crow, col, bias, residual, out_features, impl):
        ctx.save_for_backward(x, weight, crow, col)
        ctx.impl = impl
        kernel = _forward.of(impl, x.device.type)
        return kernel(x, weight, crow, col, bias, residual, out_features, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, crow, col = ctx.saved_tensors
        need_x, need_weight, _, _, need_bias, need_residual = ctx.needs_input_grad[:6]
        dx, dw, db = _grad.of(ctx.impl, grad.device.type)(
            grad, x, weight, crow, col, x.shape[-1], need_x, need_weight, need_bias
        )
        return (
            *(dx if need_x else None, dw if need_weight else None, None, None),
            *(db if need_bias else None, grad if need_residual else None, None, None),
        )


class _Int8(torch.autograd.Function):
    """The rounding of x counts as the identity in backward; the weight gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight, scales, crow, col, bias, residual, out_features, impl):
        ctx.save_for_backward(weight, scales, crow, col)
        ctx.in_features, ctx.impl = x.shape[-1], impl
        kernel = _int8_forward.of(impl, x.device.type)
        return kernel(x, weight, scales, crow, col, bias, residual, out_features, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, scales, crow, col = ctx.saved_tensors
        need_x, need_bias, need_residual = (ctx.needs_input_grad[i] for i in (0, 5, 6))
        dx = None
        if need_x:
            blocks = int8.dequantise(weight, scales, crow, grad.dtype)
            kernel = _grad.of(ctx.impl, grad.device.type)
            needed = True, False, False
            dx, _, _ = kernel(grad, None, blocks, crow, col, ctx.in_features, *needed)
        db = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return dx, None, None, None, None, db, grad if need_residual else None, None, None


def apply(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str | None,
    impl: Impl | None = None,
    weight_scales: Tensor | None = None,
) -> Tensor:
    """The op without the checks of `block_sparse_linear`, for layers that made them once."""
    device = "cpu" if x.is_cpu else x.device.type  # which takes eight times as long
    if device != "cpu" or torch.is_autocast_enabled("cpu"):
        x, weight, bias, residual = autocast(device, x, weight, bias, residual)
    if weight_scales is None:
        function, kernel, blocks = _BlockSparseLinear, _forward, (weight,)
    else:
        function, kernel, blocks = _Int8, _int8_forward, (weight, weight_scales)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        # With an activation its input is needed in backward: torch's own activation keeps it.
        inner = residual if activation is None else None
        y = function.apply(x, *blocks, crow_indices, col_indices, bias, inner, out_features, impl)
        if activation is not None:
            y = reference.ACTIVATIONS[activation](y)
            if residual is not None:
                _check_added("residual", residual, y.shape, y.dtype)
                y = y + residual
        return y
    code = ACTIVATIONS.index(activation)
    run = kernel.of(impl, device)
    return run(x, *blocks, crow_indices, col_indices, bias, residual, out_features, code)


def _check_added(label: str, tensor: Tensor | None, shape, dtype: torch.dtype) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
        raise ValueError(
            f"{NAME}: {label} must be {dtype} {list(shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def _check(
    x, weight, crow, col, bias, residual, out_features, activation, impl, scales=None
) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if activation not in ACTIVATIONS:
        fail(f"unknown activation {activation!r}; expected one of {ACTIVATIONS}")
    shape, blocks, dtype = x.shape, weight.shape, x.dtype  # once: each read takes 0.1 us
    is_int8 = weight.dtype == torch.int8
    if is_int8:
        int8.check(x, weight, scales, out_features)
    elif scales is not None:
        fail(f"weight_scales go with an int8 weight, got one of {weight.dtype}")
    elif len(blocks) != 3:
        fail(f"weight must be [nnz, block_out, block_in], got shape {tuple(blocks)}")
    nnz, block_out, block_in = (blocks[0], *int8.block_shape(weight)) if is_int8 else blocks
    if not shape or shape[-1] < 1 or out_features < 1 or block_out < 1 or block_in < 1:
        fail(
            f"x must be [..., in_features], and in_features, out_features and block sizes "
            f"positive, got x {list(shape)}, out_features {out_features}, weight {list(blocks)}"
        )
    if not is_int8 and (dtype not in DTYPES or weight.dtype != dtype):
        fail(
            f"x and weight must share one of {', '.join(map(str, DTYPES))}, "
            f"got {dtype} and {weight.dtype}"
        )
    block_rows = -(-out_features // block_out)
    for label, index, size in (("crow", crow, block_rows + 1), ("col", col, nnz)):
        if index.dtype != torch.int32 or index.shape != (size,):
            fail(
                f"{label}_indices must be int32 [{size}], got {index.dtype} {list(index.shape)}; "
                f"out_features is {out_features}, weight {list(blocks)}"
            )
    _check_added("bias", bias, (out_features,), dtype)
    if residual is not None:
        _check_added("residual", residual, (*shape[:-1], out_features), dtype)
    check_devices(
        NAME, x=x, weight=weight, weight_scales=scales, crow_indices=crow, col_indices=col,
        bias=bias, residual=residual,
    )  # fmt: skip
    check_impl(NAME, impl, x.device)


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str | None = None,
    residual: Tensor | None = None,
    weight_scales: Tensor | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """activation(x Wᵀ + bias) + residual, with W [out_features, in_features] kept as BSR blocks.

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Any strides.
        weight: [nnz, block_out, block_in], x's dtype; blocks over an edge are zero-padded.
        crow_indices: int32 [ceil(out_features / block_out) + 1].
        col_indices: int32 [nnz], ascending within a block row.
        bias: [out_features] or None.
        out_features: rows of W (not derivable from the padded blocks).
        activation: None, "relu", "gelu" (exact erf), "gelu_tanh" or "silu".
        residual: [..., out_features] or None, added after the activation.
        weight_scales: float32 [out_features], for a weight int8 [nnz, block_in / 4, block_out, 4]
            as `block_sparse_linear.int8.quantise` makes it. x (not float64) is then rounded to int8
            too, row by row; block_out must be a multiple of 16.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        [..., out_features] in x's dtype. Sums run in float32 (float64 for float64), block by block
        in index order. On CPU a row's result does not depend on the rest of the batch, bit for
        bit; on GPU it may change with the class of batch sizes a tile shape is chosen for.

    Raises:
        ValueError: a shape, dtype, device, activation or impl that does not fit.
        RuntimeError: a named impl is not available here.

    The values of the indices are not read here (that would stall an accelerator); check a pattern
    of unknown origin once with `lean_kernels.ops.block_sparse_linear.bsr.validate`. On CPU indices
    out of range are refused on every call; the Triton kernels mask them.

    Differentiable once in x, weight (kept blocks only; not an int8 one), bias and residual. The
    format is SciPy's and torch's BSR; block pruning of this kind: MLPruning, arXiv 2105.14636.
    """
    chosen = resolve(NAME, impl, IMPLS)
    x, weight, bias, residual = autocast(x.device.type, x, weight, bias, residual)
    arguments = (
        x, weight, crow_indices, col_indices, bias, residual, out_features, activation, chosen,
        weight_scales,
    )  # fmt: skip
    _check(*arguments)
    return apply(*arguments)
