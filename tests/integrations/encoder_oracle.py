# SPDX-License-Identifier: Apache-2.0
"""What a lean encoder must compute, by the layers of transformers themselves.

One sequence at a time, in float64, nothing removed: a dropped token is masked as a key from the
next layer on, and goes on being computed.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Traced:
    """Of one sequence of n tokens: hidden states after each layer [L][n, D] (of a dropped token the
    state it had last), what is left after each layer [L][n], and key scores [L][n]."""

    states: list[torch.Tensor]
    alive: list[torch.Tensor]
    scores: list[torch.Tensor]


def layers_of(base: nn.Module) -> list[nn.Module]:
    """The transformer layers of a base model."""
    for name in ("encoder.layer", "transformer.layer", "layers"):
        try:
            return list(base.get_submodule(name))
        except AttributeError:
            continue
    raise AssertionError(type(base))


def _attention_of(layer: nn.Module) -> nn.Module:
    if hasattr(layer, "attn"):
        return layer.attn
    return getattr(layer.attention, "self", layer.attention)


@torch.no_grad()
def trace(base, ids, choose, *, mean=True, exclude_diagonal=False) -> Traced:
    """Run token ids [n] through a dense float64 base model with eager attention.

    Args:
        choose: (layer, scores [n], alive [n]) -> bool [n], which of the alive tokens stay.
    """
    base.set_attn_implementation("eager")
    n, ids = len(ids), ids[None]
    x = base.embeddings(ids)
    alive = torch.ones(n, dtype=torch.bool)
    final, traced = x[0], Traced([], [], [])
    place = torch.arange(n)
    for index, layer in enumerate(layers_of(base)):
        seen, keywords = alive[None].expand(n, n), {}
        if hasattr(base, "rotary_emb"):
            kind = layer.attention_type
            keywords["position_embeddings"] = base.rotary_emb(x, place[None], kind)
            if kind == "sliding_attention":
                window = base.config.sliding_window
                seen = seen & ((place[:, None] - place).abs() <= window)
        mask = torch.zeros(n, n, dtype=x.dtype).masked_fill(~seen, -math.inf)[None, None]
        weights = []
        hook = _attention_of(layer).register_forward_hook(
            lambda module, args, output, into=weights: into.append(output[1][0])
        )
        y = layer(x, attention_mask=mask, **keywords)
        hook.remove()
        p = weights[0] * alive[:, None]  # only tokens that are left ask
        if exclude_diagonal:
            p = p * (1 - torch.eye(n, dtype=p.dtype))
        scores = p.sum(dim=(0, 1))
        if mean:
            scores = scores / (len(p) * alive.sum())
        stay = alive & choose(index, scores, alive)
        final = torch.where(stay[:, None], y[0], final)
        traced.states.append(final.clone())
        traced.alive.append(stay)
        traced.scores.append(scores)
        alive, x = stay, y
    return traced


def keep_highest(counts, protected=(0,)):
    """`choose` for `trace`: after layer l the counts[l] highest scores stay, and the protected."""

    def choose(layer, scores, alive):
        ranked = torch.where(alive, scores, -1.0)
        ranked[list(protected)] = math.inf
        stay = torch.zeros_like(alive)
        order = ranked.sort(descending=True, stable=True).indices  # ties: lower index first
        stay[order[: counts[layer]]] = True
        return stay

    return choose


def keep_above(thresholds):
    """`choose` for `trace`: scores of at least thresholds[l] stay, and the first token."""

    def choose(layer, scores, alive):
        stay = scores >= thresholds[layer]
        stay[0] = True
        return stay

    return choose


def keep_all(layer, scores, alive):
    """`choose` for `trace`: nothing is dropped."""
    return alive
