# SPDX-License-Identifier: Apache-2.0
"""BERT, RoBERTa, MiniLM and kin: act(dense(x)) in the feed-forward and the prediction head."""

from torch import nn

from lean_kernels.architectures.classifier import Classifier, base_model, copied_head, output_class
from lean_kernels.nn.encoder_layout import PostNorm

_FEED_FORWARD = {
    "bert": "BertIntermediate",
    "camembert": "CamembertIntermediate",
    "electra": "ElectraIntermediate",
    "mpnet": "MPNetIntermediate",
    "roberta": "RobertaIntermediate",
    "xlm_roberta": "XLMRobertaIntermediate",
}

FUSABLE = {
    f"transformers.models.{model}.modeling_{model}.{name}": ("dense", "intermediate_act_fn")
    for model, name in _FEED_FORWARD.items()
} | {
    "transformers.models.bert.modeling_bert.BertPredictionHeadTransform": (
        "dense",
        "transform_act_fn",
    )
}


def _result(encoder: nn.Module, hidden):
    kind = output_class(encoder, "BaseModelOutputWithPastAndCrossAttentions")
    return kind(last_hidden_state=hidden)


def _refuse(encoder: nn.Module) -> str | None:
    if any(layer.is_decoder for layer in encoder.layer):
        return "it is a decoder; its attention is causal or looks at another sequence"
    return None


# Word, token type and position added, then LayerNorm and dropout.
EMBEDDINGS = {"transformers.models.bert.modeling_bert.BertEmbeddings"}

LAYOUT = PostNorm(
    layers="layer",
    head_size="attention.self.attention_head_size",
    result=_result,
    refuse=_refuse,
    attention_dropout="attention.self.dropout",
    config="attention.self.config",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    out_dropout="attention.output.dropout",
    out_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    down_dropout="output.dropout",
    down_norm="output.LayerNorm",
)

_FAMILIES = {
    "bert": "Bert",
    "camembert": "Camembert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
}


def _classes(families: dict[str, str], suffix: str) -> list[str]:
    return [
        f"transformers.models.{model}.modeling_{model}.{name}{suffix}"
        for model, name in families.items()
    ]


ENCODERS = {name: ("", LAYOUT) for name in _classes(_FAMILIES, "Encoder")}


def _pooled_head(model: nn.Module):
    dense = base_model(model).pooler.dense
    return copied_head(dense, nn.Tanh(), model.dropout, model.classifier)


def _roberta_head(model: nn.Module):
    head = model.classifier
    return copied_head(head.dense, nn.Tanh(), head.dropout, head.out_proj)


def _electra_head(model: nn.Module):
    head = model.classifier
    return copied_head(head.dense, head.activation, head.dropout, head.out_proj)


_ROBERTAS = {name: _FAMILIES[name] for name in ("camembert", "roberta", "xlm_roberta")}
_OF_CLASS = "ForSequenceClassification"
CLASSIFIERS = {
    name: Classifier("classifier.out_proj", _roberta_head)
    for name in _classes(_ROBERTAS, _OF_CLASS)
} | {
    "transformers.models.electra.modeling_electra.ElectraForSequenceClassification": Classifier(
        "classifier.out_proj", _electra_head
    ),
    "transformers.models.bert.modeling_bert.BertForSequenceClassification": Classifier(
        "classifier", _pooled_head
    ),
}

FIRST_ONLY = {
    *_classes(_FAMILIES, _OF_CLASS),
    *_classes({"bert": "Bert", **_ROBERTAS}, "ForMultipleChoice"),
    *_classes({"bert": "Bert"}, "ForNextSentencePrediction"),
}
