# SPDX-License-Identifier: Apache-2.0
"""What is known about model families: which activation follows which linear with nothing in
between, where their encoder is, and what their heads read of it. Modules are known by their
qualified class name, so that nothing is imported and a class of the same name elsewhere, with
another forward, is not mistaken for one of these.
"""

from dataclasses import dataclass

from torch import nn

from lean_kernels.architectures import bert, distilbert, gpt2, llama, modernbert
from lean_kernels.architectures.classifier import Classifier
from lean_kernels.nn.encoder_layout import Layout
from lean_kernels.nn.lean_encoder import LeanEncoder

_FUSABLE = bert.FUSABLE | distilbert.FUSABLE | gpt2.FUSABLE | llama.FUSABLE
_ENCODERS = bert.ENCODERS | distilbert.ENCODERS | modernbert.ENCODERS
_CLASSIFIERS = bert.CLASSIFIERS | distilbert.CLASSIFIERS | modernbert.CLASSIFIERS
_FIRST_ONLY = bert.FIRST_ONLY | distilbert.FIRST_ONLY | modernbert.FIRST_ONLY
ENCODER_FAMILIES = "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, MiniLM, DistilBERT and ModernBERT"

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


def is_embeddings_block(module: nn.Module) -> bool:
    """Whether `nn.LeanEmbeddings` computes what this module does."""
    return _qualified(module) in bert.EMBEDDINGS


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


@dataclass(frozen=True)
class Encoder:
    """An encoder within a model.

    Args:
        name: its dotted name, of the module that LeanEncoder replaces or has replaced.
        layout: what its layers are made of.
        first_only: whether the model reads nothing but its first token.
        classifier_name: dotted name of the sequence classifier around it, None where there is none.
        classifier: how that classifier exits early, None where it cannot.
        why_no_exits: why not.
    """

    name: str
    layout: Layout
    first_only: bool
    classifier_name: str | None
    classifier: Classifier | None
    why_no_exits: str | None


def find_encoders(model: nn.Module) -> list[Encoder]:
    """The encoders of `model`, replaced ones included, in its order."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LeanEncoder):
            found.append(_encoder(model, name, module.layout))
            continue
        child, layout = _ENCODERS.get(_qualified(module), (None, None))
        if layout is None:
            continue
        name = f"{name}.{child}".strip(".")
        if not isinstance(model.get_submodule(name), LeanEncoder):
            found.append(_encoder(model, name, layout))
    return found


def _encoder(model: nn.Module, name: str, layout: Layout) -> Encoder:
    classifier_name, classifier, first_only = None, None, False
    reason = "no sequence classifier around it that reads the first token"
    around = name
    while around:
        around = around.rpartition(".")[0]
        module = model.get_submodule(around)
        kind = _qualified(module)
        if kind in _CLASSIFIERS:
            classifier_name, classifier = around, _CLASSIFIERS[kind]
            reason = classifier.refuse(module)
        first_only = first_only or kind in _FIRST_ONLY
    if reason is not None and classifier is not None:
        classifier_name, classifier, first_only = None, None, False
    return Encoder(name, layout, first_only, classifier_name, classifier, reason)
