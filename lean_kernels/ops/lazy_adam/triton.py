# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of lazy_adam_: a program moves some whole rows, or a part of a long one.

Nothing here waits for the device: the kernel reads the step's number itself. A row out of bounds is
left out.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device, float64_bits, float64_of

_ELEMENTS = 1024  # of a program; not tuned on hardware
_VARYING = ["count", "table_rows", "lr", "beta1", "log_beta1", "beta2", "log_beta2", "eps"]


@triton.jit(do_not_specialize=_VARYING)
def _step_kernel(
    param_ptr,  # [table_rows, features], as its moments
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,  # [1] float32
    rows_ptr,  # [count] int64
    grad_ptr,  # [count, features] in strides
    count,
    table_rows,
    features,
    stride_gm,
    stride_gk,
    lr,  # the bits of float64 numbers, as those that follow
    beta1,
    log_beta1,
    beta2,
    log_beta2,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.cast(tl.program_id(1), tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.load(step_ptr).to(tl.float64)
    # In float32 the correction of 0.999 would lose four digits.
    rate = (float64_of(lr) / (1.0 - tl.exp(t * float64_of(log_beta1)))).to(ACC)
    root = tl.sqrt(1.0 - tl.exp(t * float64_of(log_beta2))).to(ACC)
    decay1, rest1 = float64_of(beta1).to(ACC), (1.0 - float64_of(beta1)).to(ACC)
    decay2, rest2 = float64_of(beta2).to(ACC), (1.0 - float64_of(beta2)).to(ACC)
    row = tl.load(rows_ptr + m, mask=m < count, other=-1)
    mask = ((row >= 0) & (row < table_rows))[:, None] & (k < features)[None, :]
    at = row[:, None] * features + k[None, :]
    g = tl.load(grad_ptr + m[:, None] * stride_gm + k[None, :] * stride_gk, mask=mask, other=0.0)
    g = g.to(ACC)
    first = tl.load(exp_avg_ptr + at, mask=mask, other=0.0).to(ACC) * decay1 + g * rest1
    second = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0).to(ACC) * decay2 + g * g * rest2
    moved = tl.load(param_ptr + at, mask=mask, other=0.0).to(ACC)
    moved -= rate * first / (tl.sqrt(second) / root + float64_of(eps).to(ACC))
    tl.store(exp_avg_ptr + at, first, mask=mask)
    tl.store(exp_avg_sq_ptr + at, second, mask=mask)
    tl.store(param_ptr + at, moved, mask=mask)


def step_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    rows: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Adam's step on `rows` of [V, D] tables, in place; see `op.lazy_adam_`."""
    check_device("lazy_adam", param)
    count, features = grad.shape
    if grad.numel() == 0:
        return
    width = min(triton.next_power_of_2(features), _ELEMENTS)
    height = _ELEMENTS // width
    log_beta1, log_beta2 = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    with torch.cuda.device_of(param):
        _step_kernel[(triton.cdiv(count, height), triton.cdiv(features, width))](
            *(param, exp_avg, exp_avg_sq, step, rows, grad),
            *(count, param.shape[0], features, *grad.stride()),
            *map(float64_bits, (lr, beta1, log_beta1, beta2, log_beta2, eps)),
            BLOCK_M=height,
            BLOCK_K=width,
            ACC=tl.float64 if param.dtype == torch.float64 else tl.float32,
        )
