# SPDX-License-Identifier: Apache-2.0
"""What families share: their output classes, and sequence classifiers that can exit early."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lean_kernels.nn.exits import ExitHead


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier whose logits depend on the first token's last state alone.

    Args:
        last: dotted name of its last linear layer.
        head: makes an exit head that starts as a copy of the model's own head.
        refuse: says why a model of this class is none after all, None if it is.
    """

    last: str
    head: Callable[[nn.Module], ExitHead]
    refuse: Callable[[nn.Module], str | None] = lambda model: None


def copied_head(
    dense: nn.Module,
    activation: nn.Module,
    dropout: nn.Dropout,
    out: nn.Module,
    norm: nn.Module | None = None,
    out_norm: nn.Module | None = None,
) -> ExitHead:
    """An exit head of copies of these modules, without the hooks that `out` may have."""
    out = copy.copy(out)
    out._forward_hooks = type(out._forward_hooks)()
    modules = {"dense": dense, "activation": activation, "norm": norm, "out_norm": out_norm}
    copies = {name: copy.deepcopy(module) for name, module in modules.items()}
    return ExitHead(out=copy.deepcopy(out), dropout=dropout.p, **copies)


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, model.base_model_prefix)


def output_class(encoder: nn.Module, name: str) -> type:
    """The class called `name` where the encoder's own class is defined."""
    return getattr(sys.modules[type(encoder).__module__], name)
