# SPDX-License-Identifier: Apache-2.0
"""BERT, RoBERTa, MiniLM and kin: act(dense(x)) in the feed-forward and the prediction head."""

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
