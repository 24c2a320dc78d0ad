# SPDX-License-Identifier: Apache-2.0
"""Training a model with several exits: one loss over all of them, the last one teaching the others.

As in COST-EFF (EMNLP 2022, arXiv 2210.15523) and DeeBERT: cross entropy summed over the exits, and
soft labels. Plain PyTorch; the optimizer and the loop are yours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["joint_loss", "losses"]


def losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    distillation: float = 0.0,
    temperature: float = 1.0,
    teacher: Tensor | None = None,
) -> Tensor:
    """The loss of each exit, [exits], first to last.

    (1 - distillation) * hard + distillation * soft, with hard the cross entropy with `labels` (the
    squared error where an exit has one output), and soft temperature^2 * KL(teacher || exit) of the
    softmax of logits / temperature (the squared error to the teacher's output). The teacher is the
    last exit, detached, and learns from the labels alone; or `teacher`, which then teaches all.

    Args:
        logits: per exit [B, C], floating point.
        labels: classes int64 [B]; -100 is left out. Numbers [B] where C is 1.
        distillation: weight of the soft labels, in [0, 1]. COST-EFF takes 0.9.
        temperature: softens teacher and exit alike; positive.
        teacher: logits [B, C] of another model.

    Raises:
        ValueError: no exits, shapes that do not match, or an argument out of range.
    """
    _check(logits, labels, distillation, temperature, teacher)
    last = len(logits) - 1
    target = logits[-1].detach() if teacher is None else teacher.detach()
    found = []
    for place, exit_logits in enumerate(logits):
        hard = _hard(exit_logits, labels)
        share = distillation if teacher is not None or place < last else 0.0
        if share:
            hard = (1 - share) * hard + share * _soft(exit_logits, target, labels, temperature)
        found.append(hard)
    return torch.stack(found)


def joint_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 1.0,
    teacher: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the exits' `losses`, a scalar.

    Args:
        weights: one number per exit, not negative; None sums with weight 1 each, as DeeBERT and
            COST-EFF do. Rising weights (1, 2, ..., as PABEE has) favour the deep exits.
        logits, labels, distillation, temperature, teacher: as `losses` takes them.
    """
    found = losses(
        logits, labels, distillation=distillation, temperature=temperature, teacher=teacher
    )
    if weights is None:
        return found.sum()
    if len(weights) != len(logits) or any(weight < 0 for weight in weights):
        raise ValueError(
            f"joint_loss: weights must be {len(logits)} numbers that are not negative, one per "
            f"exit, got {list(weights)}"
        )
    return (found * found.new_tensor(list(weights))).sum()


def _hard(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def _soft(logits: Tensor, target: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if logits.shape[1] == 1:
        return F.mse_loss(logits, target)
    log_exit, log_target = (F.log_softmax(t / temperature, dim=-1) for t in (logits, target))
    divergence = F.kl_div(log_exit, log_target, reduction="none", log_target=True).sum(dim=-1)
    labelled = labels != -100
    return temperature**2 * divergence[labelled].mean()


def _check(logits, labels, distillation, temperature, teacher) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"exit losses: {problem}")

    if not logits:
        fail("expected the logits of at least one exit, got none")
    shapes = [list(t.shape) for t in (*logits, *([] if teacher is None else [teacher]))]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        fail(f"logits must be [B, C] and alike for all exits and the teacher, got {shapes}")
    if list(labels.shape) != shapes[0][:1]:
        fail(f"labels must be [{shapes[0][0]}], one per row of logits, got {list(labels.shape)}")
    if not 0 <= distillation <= 1:
        fail(f"distillation must lie in [0, 1], got {distillation}")
    if not temperature > 0:
        fail(f"temperature must be positive, got {temperature}")
