# SPDX-License-Identifier: Apache-2.0
"""GPT-2: act(c_fc(x)) in the feed-forward; its linears are transformers' Conv1D."""

FUSABLE = {"transformers.models.gpt2.modeling_gpt2.GPT2MLP": ("c_fc", "act")}
