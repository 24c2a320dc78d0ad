# SPDX-License-Identifier: Apache-2.0
"""low_rank_logits: x codesᵀ + bias + shift, the wide product of a tied low-rank head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels._autocast import autocast
from lean_kernels._dispatch import Kernel


def _table(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return codes
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scales.to(wide)[:, None]).to(dtype)


def _reference(x, codes, scales, bias, shift):
    y = F.linear(x, _table(codes, scales, x.dtype), bias)
    return y if shift is None else y + shift[..., None]


_kernel = Kernel(
    "low_rank_logits",
    "(Tensor x, Tensor codes, Tensor? scales, Tensor? bias, Tensor? shift) -> Tensor",
    reference=_reference,
    fake=lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]),
)


class _LowRankLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scales, bias, shift):
        ctx.save_for_backward(x, codes, scales)
        return _kernel.of(None, x.device.type)(x, codes, scales, bias, shift)

    @staticmethod
    def backward(ctx, grad):
        x, codes, scales = ctx.saved_tensors
        need_x, need_codes, _, need_bias, need_shift = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ _table(codes, scales, x.dtype) if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_codes else None,
            None,
            rows.sum(0) if need_bias else None,
            grad.sum(-1) if need_shift else None,
        )


def low_rank_logits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """x (scales · codes)ᵀ + bias + shift[..., None], for heads that have checked shapes.

    CPU kernels on CPU; elsewhere torch's products. Sums of halves run in float32. On CPU a row of
    the result depends on its row of x alone, bit for bit. Differentiable in all but `scales`, any
    number of times. Cast under autocast, like torch's products.

    Args:
        x: [..., rank].
        codes: [V, rank] in x's dtype, or int8 with `scales`.
        scales: float32 [V], by which rows of int8 codes are multiplied; None otherwise.
        bias: [V] in x's dtype, or None.
        shift: [...] in x's dtype, added to all logits of a row, or None.

    Returns:
        [..., V] in x's dtype.
    """
    x, codes, bias, shift = autocast(x.device.type, x, codes, bias, shift)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or codes.requires_grad
        or (bias is not None and bias.requires_grad)
        or (shift is not None and shift.requires_grad)
    ):
        return _LowRankLogits.apply(x, codes, scales, bias, shift)
    return _kernel.of(None, x.device.type)(x, codes, scales, bias, shift)
