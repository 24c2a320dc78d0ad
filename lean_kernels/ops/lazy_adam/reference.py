# SPDX-License-Identifier: Apache-2.0
"""What lazy_adam_ means, in plain PyTorch: Adam's step on the rows a sparse gradient has.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

import torch
from torch import Tensor


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
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    grad = grad.to(wide)
    first = exp_avg[rows].to(wide) * beta1 + grad * (1 - beta1)
    second = exp_avg_sq[rows].to(wide) * beta2 + grad.square() * (1 - beta2)
    t = step.double()
    rate = (lr / (1 - beta1**t)).to(wide)
    root = (1 - beta2**t).sqrt().to(wide)
    moved = param[rows].to(wide) - rate * first / (second.sqrt() / root + eps)
    for table, value in ((param, moved), (exp_avg, first), (exp_avg_sq, second)):
        table.index_copy_(0, rows, value.to(param.dtype))
