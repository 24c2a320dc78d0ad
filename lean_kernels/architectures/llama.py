# SPDX-License-Identifier: Apache-2.0
"""Llama and kin: down_proj(act_fn(gate_proj(x)) * up_proj(x)); only the gate is activated."""

_FEED_FORWARD = {
    "gemma": "GemmaMLP",
    "llama": "LlamaMLP",
    "mistral": "MistralMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
}

FUSABLE = {
    f"transformers.models.{model}.modeling_{model}.{name}": ("gate_proj", "act_fn")
    for model, name in _FEED_FORWARD.items()
}
