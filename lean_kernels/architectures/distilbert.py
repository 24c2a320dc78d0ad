# SPDX-License-Identifier: Apache-2.0
"""DistilBERT: activation(lin1(x)) in the feed-forward."""

from torch import nn

from lean_kernels.architectures.classifier import Classifier, copied_head, output_class
from lean_kernels.nn.encoder_layout import PostNorm

_MODULE = "transformers.models.distilbert.modeling_distilbert"
FUSABLE = {f"{_MODULE}.FFN": ("lin1", "activation")}


def _result(encoder: nn.Module, hidden):
    return output_class(encoder, "BaseModelOutput")(last_hidden_state=hidden)


def _refuse(encoder: nn.Module) -> str | None:
    return None


LAYOUT = PostNorm(
    layers="layer",
    head_size="attention.attention_head_size",
    result=_result,
    refuse=_refuse,
    attention_dropout="attention.dropout",
    config="attention.config",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    out_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    down_dropout="ffn.dropout",
    down_norm="output_layer_norm",
)
ENCODERS = {f"{_MODULE}.Transformer": ("", LAYOUT)}


def _head(model: nn.Module):
    return copied_head(model.pre_classifier, nn.ReLU(), model.dropout, model.classifier)


CLASSIFIERS = {f"{_MODULE}.DistilBertForSequenceClassification": Classifier("classifier", _head)}
FIRST_ONLY = {*CLASSIFIERS, f"{_MODULE}.DistilBertForMultipleChoice"}
