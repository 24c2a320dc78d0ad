# SPDX-License-Identifier: Apache-2.0
"""lazy_adam_: Adam's step, in place, on the rows of a table that a sparse gradient has."""

import torch
from torch import Tensor

from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.lazy_adam import reference

NAME = "lazy_adam"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_step = Kernel(
    "lazy_adam_",
    "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step, Tensor rows, "
    "Tensor grad, float lr, float beta1, float beta2, float eps) -> ()",
    reference=reference.step_,
    fake=lambda *_: None,
    triton="lean_kernels.ops.lazy_adam.triton:step_",
)


def _check(param, grad, exp_avg, exp_avg_sq, step) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if param.dtype not in DTYPES or param.dim() < 1 or not param.is_contiguous():
        fail(
            f"param must be contiguous [V, ...] in one of {', '.join(map(str, DTYPES))}, got "
            f"{param.dtype} {list(param.shape)} of strides {list(param.stride())}"
        )
    for label, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if (moment.shape, moment.dtype) != (param.shape, param.dtype) or not moment.is_contiguous():
            fail(
                f"{label} must be contiguous {param.dtype} {list(param.shape)} like param, got "
                f"{moment.dtype} {list(moment.shape)} of strides {list(moment.stride())}"
            )
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        fail(
            "grad must be sparse in its first dimension alone, as layers with sparse=True give it, "
            f"got {grad.layout} {list(grad.shape)}; give dense gradients to torch.optim.Adam"
        )
    if (grad.shape, grad.dtype) != (param.shape, param.dtype):
        fail(
            f"grad must be {param.dtype} {list(param.shape)} like param, got {grad.dtype} "
            f"{list(grad.shape)}"
        )
    if step.numel() != 1 or step.dtype != torch.float32:
        fail(f"step must be one float32, got {step.dtype} {list(step.shape)}")
    check_devices(NAME, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)


@torch.no_grad()
def lazy_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    impl: Impl | str | None = None,
) -> None:
    """One step of Adam on the rows of `param` that `grad` has; the others and their moments stay.

    On those rows it is the step of torch.optim.Adam without weight decay: moments m and v, then
    param -= lr / (1 - beta1ᵗ) * m / (sqrt(v / (1 - beta2ᵗ)) + eps). The cost goes with the rows of
    the gradient, not with those of the table.

    Args:
        param: [V, ...], contiguous; float32, bfloat16, float16 or float64. Changed in place.
        grad: sparse COO of param's shape and dtype, sparse in the first dimension alone. One that
            is not coalesced is coalesced first, which on CUDA waits for the device.
        exp_avg, exp_avg_sq: m and v, like param. Changed in place.
        step: t, one float32 on param's device, 1 at the first step. Read by the kernel: nothing
            waits for the device.
        lr, betas, eps: Adam's.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Raises:
        ValueError: a shape, dtype, layout, device or impl that does not fit.
        IndexError or RuntimeError: on CPU, a row out of bounds; elsewhere it is left out.
        RuntimeError: a named impl is not available here.

    Computed in float32 (float64 for float64), and rounded once. Adam: arXiv 1412.6980, algorithm 1,
    with rows left alone as torch.optim.SparseAdam leaves them; that one adds eps before the second
    moment's correction.
    """
    chosen = resolve(NAME, impl, IMPLS)
    _check(param, grad, exp_avg, exp_avg_sq, step)
    check_impl(NAME, chosen, param.device)
    grad = grad.coalesce()
    rows, values = grad._indices()[0], grad._values()
    if param.dim() != 2:
        features = param.shape[1:].numel()
        param, exp_avg, exp_avg_sq = (
            t.view(len(t), features) for t in (param, exp_avg, exp_avg_sq)
        )
        values = values.reshape(len(rows), features)
    kernel = _step.of(chosen, param.device.type)
    kernel(param, exp_avg, exp_avg_sq, step, rows, values, lr, *betas, eps)
    # A backward that has saved them must not go on with what they are now.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))
