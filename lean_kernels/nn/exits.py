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


class _PerThread(threading.local):
    """One model can serve several threads."""

    def __init__(self) -> None:
        self.outcomes: WeakKeyDictionary[nn.Module, ExitOutcome] = WeakKeyDictionary()
        self.running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # classifier calls


_HERE = _PerThread()


def latest(encoder: nn.Module) -> ExitOutcome | None:
    """The outcome of the encoder's last forward pass in this thread."""
    return _HERE.outcomes.get(encoder)


def remember(encoder: nn.Module, outcome: ExitOutcome | None) -> None:
    """Make it the latest."""
    _HERE.outcomes.pop(encoder, None)
    if outcome is not None:
        _HERE.outcomes[encoder] = outcome


def may_leave(encoder: nn.Module) -> bool:
    """Whether there is somebody to take the logits of samples that leave early. Where `attach` gave
    the encoder a classifier, that is so in calls that go through it."""
    return not encoder.has_classifier or bool(_HERE.running.get(encoder))


class _Begin:
    """Forward pre-hook of a whole classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, module: nn.Module, args) -> None:
        _HERE.running[self.encoder] = _HERE.running.get(self.encoder, 0) + 1


class _End:
    """Forward hook of a whole classifier. Raises RuntimeError where nobody took the exits."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, module: nn.Module, args, output) -> None:
        _HERE.running[self.encoder] -= 1
        outcome = latest(self.encoder)
        unread = outcome is not None and outcome.layers is not None and not outcome.taken
        if output is not None and unread:  # None after an error, which is the one to see
            raise RuntimeError(
                "LeanEncoder: samples left early, but no classifier took their logits; it was "
                "replaced after convert. Convert again with the same [exits], or set "
                "encoder.exit_rule = None to run all layers"
            )


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


def attach(encoder: nn.Module, classifier: nn.Module, last: nn.Module) -> None:
    """Have `last`, the last linear layer of `classifier`, return exit logits where there are some,
    and let samples leave only when `classifier` is called. Doing so twice changes nothing."""
    encoder.has_classifier = True
    if not _keys(last._forward_hooks, encoder):
        last.register_forward_hook(TakeExitLogits(encoder))
    if not _keys(classifier._forward_pre_hooks, encoder):
        classifier.register_forward_pre_hook(_Begin(encoder))
        classifier.register_forward_hook(_End(encoder), always_call=True)


def detach(model: nn.Module, encoder: nn.Module) -> None:
    """Undo `attach`, wherever in the model it was done."""
    encoder.has_classifier = False
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in _keys(hooks, encoder):
                del hooks[key]


def _keys(hooks: dict, encoder: nn.Module) -> list[int]:
    """Those of our hooks for this encoder."""
    ours = (TakeExitLogits, _Begin, _End)
    return [
        key for key, hook in hooks.items() if isinstance(hook, ours) and hook.encoder is encoder
    ]
