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
    shapes, so either loads the other's `state_dict`; weight decay stays decoupled here.
    torch.nn.utils.clip_grad_norm_ does not take sparse gradients, whatever the optimizer: clip the
    dense ones alone. torch.compile leaves the step as it is.

    Raises:
        ValueError: a tensor for lr or betas; a sparse gradient in a group with weight_decay,
            amsgrad or maximize, or one that `lk.ops.lazy_adam_` refuses.

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
        super().__init__(
            params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=True
        )
        # GradScaler then unscales gradients itself, sparse ones too.
        self._step_supports_amp_scaling = False

    # Dynamo calls _init_group while it traces, and leaves it out of what it compiles.
    step = torch.compiler.disable(torch.optim.Adam.step)

    def add_param_group(self, param_group: dict) -> None:
        options = {**self.defaults, **param_group}
        if any(isinstance(value, Tensor) for value in (options["lr"], *options["betas"])):
            raise ValueError("LazyAdam: lr and betas must be numbers, got a tensor; use lr.item()")
        super().add_param_group(param_group)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a torch.optim.Adam, perhaps, which keeps steps on CPU
            group.update(fused=True, decoupled_weight_decay=True)
            for param in group["params"]:
                if param in self.state:
                    values = self.state[param]
                    values["step"] = values["step"].to(param.device, torch.float32)

    def _init_group(self, group, *lists) -> bool:
        """Steps the group's sparse parameters, and lists the others for torch's own step."""
        sparse = [p for p in group["params"] if p.grad is not None and p.grad.is_sparse]
        for option, off in (("weight_decay", 0), ("amsgrad", False), ("maximize", False)):
            if sparse and group[option]:
                raise ValueError(
                    f"LazyAdam: {option} must be {off} where gradients are sparse, got "
                    f"{group[option]}; put the embeddings into a group of their own"
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
