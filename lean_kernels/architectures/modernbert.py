# SPDX-License-Identifier: Apache-2.0
"""ModernBERT: its model runs the layers itself, so the encoder to replace is their list."""

from torch import nn

from lean_kernels.architectures.classifier import Classifier, base_model, copied_head
from lean_kernels.nn.encoder_layout import PreNorm

_MODULE = "transformers.models.modernbert.modeling_modernbert"
FUSABLE: dict[str, tuple[str, str]] = {}  # act(a) * b with a, b halves of one linear


def _result(encoder: nn.Module, hidden):
    return hidden


def _refuse(encoder: nn.Module) -> str | None:
    return None


LAYOUT = PreNorm(
    layers="",
    head_size="attn.head_dim",
    result=_result,
    refuse=_refuse,
    attention_dropout="attn.attention_dropout",
    config="config",
    window="attn.sliding_window",
    attention_norm="attn_norm",
    qkv="attn.Wqkv",
    out="attn.Wo",
    out_dropout="attn.out_drop",
    mlp_norm="mlp_norm",
    up="mlp.Wi",
    activation="mlp.act",
    mlp_dropout="mlp.drop",
    down="mlp.Wo",
)
ENCODERS = {f"{_MODULE}.ModernBertModel": ("layers", LAYOUT)}


def _head(model: nn.Module):
    head, norm = model.head, base_model(model).final_norm
    return copied_head(head.dense, head.act, model.drop, model.classifier, norm, head.norm)


def _pools(model: nn.Module) -> str | None:
    if model.config.classifier_pooling == "cls":
        return None
    return f"it pools by {model.config.classifier_pooling!r}, not by the first token"


CLASSIFIERS = {
    f"{_MODULE}.ModernBertForSequenceClassification": Classifier("classifier", _head, _pools)
}
FIRST_ONLY = set(CLASSIFIERS)
