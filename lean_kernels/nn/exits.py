# SPDX-License-Identifier: Apache-2.0
"""Early exits: the heads, the criteria, and how a sample's exit becomes the model's output."""

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class ExitHead(nn.Module):
    """Class logits of a sample from its first token: out(dropout(out_norm(act(dense(norm(x)))))).

    Args:
        dense, out: linear layers, D to D' and D' to the number of labels.
        activation: between them.
        norm: before `dense`, for encoders that end in a norm of their own.
        out_norm: after the activation.
        dropout: before `out`, in training.
    """

    def __init__(
        self,
        dense: nn.Module,
        out: nn.Module,
        *,
        activation: nn.Module,
        norm: nn.Module | None = None,
        out_norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.dense = dense
        self.activation = activation
        self.out_norm = out_norm
        self.dropout = nn.Dropout(dropout)
        self.out = out

    def forward(self, first: Tensor) -> Tensor:
        """First tokens [B, D] -> logits [B, C]."""
        x = first if self.norm is None else self.norm(first)
        x = self.activation(self.dense(x))
        if self.out_norm is not None:
            x = self.out_norm(x)
        return self.out(self.dropout(x))


class Criterion:
    """Decides exit by exit which samples are done. One per forward pass: patience has a memory.

    Args:
        rule: has `criterion`, `threshold` and `patience`; see `lean_kernels.recipe.ExitRule`.
    """

    def __init__(self, rule) -> None:
        self._rule = rule
        self._before: Tensor | None = None  # [alive], what the exit before predicted
        self._agreed: Tensor | None = None  # [alive], exits in a row that agreed

    def done(self, logits: Tensor) -> Tensor:
        """Bool [alive], from the logits [alive, C] of the next exit."""
        rule = self._rule
        if rule.criterion == "patience":
            return self._patient(logits)
        log_p = logits.float().log_softmax(dim=-1)
        if rule.criterion == "confidence":
            return log_p.amax(dim=-1).exp() >= rule.threshold
        return -(log_p.exp() * log_p).sum(dim=-1) < rule.threshold

    def _patient(self, logits: Tensor) -> Tensor:
        single = logits.shape[1] == 1
        found = logits[:, 0].float() if single else logits.argmax(dim=-1)
        if self._before is None:
            self._agreed = torch.zeros(len(found), dtype=torch.int64, device=found.device)
        elif single:
            same = (found - self._before).abs() < self._rule.threshold
            self._agreed = torch.where(same, self._agreed + 1, 0)
        else:
            self._agreed = torch.where(found == self._before, self._agreed + 1, 0)
        self._before = found
        return self._agreed >= self._rule.patience

    def restrict(self, alive: Tensor) -> None:
        """Forget all samples but those at the places `alive`."""
        if self._before is not None:
            self._before, self._agreed = self._before[alive], self._agreed[alive]


@dataclass
class ExitOutcome:
    """What the exits of one forward pass gave.

    In training `logits` has one tensor [B, C] per exit, and `layers` is None. At inference `logits`
    has one tensor [B, C], rows of samples that reached the last layer left 0, and `layers` int64
    [B] is the layer whose output was each sample's last, the last layer of all for those.
    """

    logits: list[Tensor]
    layers: Tensor | None
    last: int
    taken: bool = False  # whether the model's classifier has merged them


# Per thread, so that one model can serve several.
_LATEST = threading.local()


def latest(encoder: nn.Module) -> ExitOutcome | None:
    """The outcome of the encoder's last forward pass in this thread."""
    found = getattr(_LATEST, "outcomes", None)
    return None if found is None else found.get(encoder)


def remember(encoder: nn.Module, outcome: ExitOutcome | None) -> None:
    """Make it the latest.

    Raises:
        RuntimeError: nobody took the exits before: the model's classifier was replaced.
    """
    if not hasattr(_LATEST, "outcomes"):
        _LATEST.outcomes = WeakKeyDictionary()
    before = _LATEST.outcomes.pop(encoder, None)
    if before is not None and before.layers is not None and not before.taken:
        raise RuntimeError(
            "LeanEncoder: samples left early, but no classifier took their logits; it was replaced "
            "after convert, or the encoder was called without its head. Convert again with the "
            "same [exits], or set encoder.exit_rule = None to run all layers"
        )
    if outcome is not None:
        _LATEST.outcomes[encoder] = outcome


class TakeExitLogits:
    """Forward hook of a model's last linear layer: samples that left early get their exit's logits.

    A class, so that copies and pickles of a model point at their own encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, module: nn.Module, args, logits: Tensor) -> Tensor:
        """Logits [B, C] of the last layer -> [B, C] of every sample's own layer."""
        outcome = latest(self.encoder)
        if outcome is None or outcome.layers is None or outcome.taken:
            return logits
        outcome.taken = True
        early = outcome.layers < outcome.last
        return torch.where(early[:, None], outcome.logits[0].to(logits.dtype), logits)


def attach(encoder: nn.Module, classifier: nn.Module) -> None:
    """Have `classifier` return exit logits where there are some. Doing so twice changes nothing."""
    for hook in classifier._forward_hooks.values():
        if isinstance(hook, TakeExitLogits) and hook.encoder is encoder:
            return
    classifier.register_forward_hook(TakeExitLogits(encoder))


def detach(model: nn.Module, encoder: nn.Module) -> None:
    """Undo `attach`, wherever in the model it was done."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, TakeExitLogits) and hook.encoder is encoder:
                del module._forward_hooks[key]
