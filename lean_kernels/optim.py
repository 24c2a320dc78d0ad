# SPDX-License-Identifier: Apache-2.0
"""An optimizer whose step costs what the rows of sparse gradients cost, not what the tables do."""

import torch
from torch import Tensor

from lean_kernels.ops import lazy_adam_


class LazyAdam(torch.optim.Adam):
    """Adam that moves only the rows which a sparse gradient has, and dense gradients as ever.

    For embeddings with `sparse=True` beside the rest of a model, in one optimizer: torch's Adam
    refuses sparse gradients, its SparseAdam dense ones. A row that a batch does not look up stays
    as it is, as do its moments; the bias corrections count the steps of the whole parameter.

        optimizer = lk.optim.LazyAdam(model.parameters(), lr=1e-3)

    Args:
        params, lr, betas, eps: as in torch.optim.Adam; numbers, not tensors.
        weight_decay: decoupled, as in torch.optim.AdamW, and for dense gradients alone.

    Dense gradients go through torch's fused kernel. The state has torch.optim.Adam's names and
    shapes, so either loads the other's `state_dict`. torch.nn.utils.clip_grad_norm_ does not take
    sparse gradients, whatever the optimizer: clip the dense ones alone.

    Raises:
        ValueError: a tensor for lr or betas; a sparse gradient where weight_decay is not 0, or one
            that `lk.ops.lazy_adam_` refuses.

    Adam: arXiv 1412.6980. Lazy rows: TensorFlow Addons' LazyAdam and torch.optim.SparseAdam.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if any(isinstance(value, Tensor) for value in (lr, *betas)):
            raise ValueError("LazyAdam: lr and betas must be numbers, got a tensor; use lr.item()")
        super().__init__(
            params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=True
        )
        # GradScaler then unscales gradients itself, sparse ones too.
        self._step_supports_amp_scaling = False

    def _init_group(self, group, *lists) -> bool:
        """Steps the group's sparse parameters, and lists the others for torch's own step."""
        sparse = [p for p in group["params"] if p.grad is not None and p.grad.is_sparse]
        if sparse and group["weight_decay"]:
            raise ValueError(
                f"LazyAdam: weight_decay must be 0 where gradients are sparse, got "
                f"{group['weight_decay']}; put the embeddings into a group of their own"
            )
        for param in sparse:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
            lazy_adam_(
                *(param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
            )
        chosen = set(sparse)
        dense = [p for p in group["params"] if p not in chosen]
        return super()._init_group({**group, "params": dense}, *lists)
