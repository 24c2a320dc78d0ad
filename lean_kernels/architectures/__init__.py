# SPDX-License-Identifier: Apache-2.0
"""What is known about model families: which activation follows which linear, and nothing else runs
in between. Modules are known by their qualified class name, so that nothing is imported and a
class of the same name elsewhere, with another forward, is not mistaken for one of these.
"""

from torch import nn

from lean_kernels.architectures import bert, distilbert, gpt2, llama

_FUSABLE = bert.FUSABLE | distilbert.FUSABLE | gpt2.FUSABLE | llama.FUSABLE

# Exact erf against tanh: transformers.activations keeps them apart by class, not by option.
_FUNCTION = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
}


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def activation_after(parent: nn.Module, child: str) -> str | None:
    """Name of the child of `parent` that does nothing but activate the output of `child`."""
    linear, activation = _FUSABLE.get(_qualified(parent), (None, None))
    return activation if linear == child else None


def activation_function(module) -> str | None:
    """What an activation module computes, as the ops name it; None when it is none of theirs."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return _FUNCTION.get(_qualified(module))


def activation_module(function: str) -> nn.Module:
    """The torch module that computes what the ops call `function`."""
    return {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "silu": nn.SiLU,
    }[function]()
