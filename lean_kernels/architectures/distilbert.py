# SPDX-License-Identifier: Apache-2.0
"""DistilBERT: activation(lin1(x)) in the feed-forward."""

FUSABLE = {"transformers.models.distilbert.modeling_distilbert.FFN": ("lin1", "activation")}
