# SPDX-License-Identifier: Apache-2.0
"""All gradients in one call, for implementations that compute each of them apart."""

from collections.abc import Callable

from torch import Tensor


def gradients(
    grad_input: Callable,
    grad_weight: Callable,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    in_features: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, the weight and the bias; empty where not needed."""
    dx, dw, db = (grad.new_empty(0) for _ in range(3))
    if need_x:
        dx = grad_input(grad, weight, crow_indices, col_indices, in_features)
    if need_weight:
        dw = grad_weight(grad, x, crow_indices, col_indices, *weight.shape[1:])
    if need_bias:
        db = grad.reshape(-1, grad.shape[-1]).sum(0)
    return dx, dw, db
