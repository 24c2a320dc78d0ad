# SPDX-License-Identifier: Apache-2.0
"""What select_tokens, gather_tokens and scatter_tokens mean, in plain PyTorch.

Tokens are ranked by sorts, each stable, so that the lower index wins a tie.
"""

import torch
from torch import Tensor

SLACK = 1e-6  # 0.07 * 100 is above 7 in floating point, and 7 is meant


def _counts(lengths: Tensor, guarded: Tensor, counts: Tensor | None, fraction: float) -> Tensor:
    """int64 [B], tokens to keep."""
    if counts is None:
        wanted = torch.ceil(lengths.double() * fraction - SLACK).long().clamp_min(1)
    else:
        wanted = counts.long().clamp_min(0)
    return torch.maximum(torch.minimum(wanted, lengths), guarded)


def select(
    scores: Tensor,
    cu_seqlens: Tensor,
    protect: Tensor | None,
    counts: Tensor | None,
    value: float,
    threshold: bool,
) -> tuple[Tensor, Tensor]:
    """indices int64 [T'] and cu_seqlens int32 [B + 1] of the kept tokens."""
    cu = cu_seqlens.long()
    lengths = cu.diff()
    tokens = torch.arange(scores.shape[0], device=scores.device)
    sequence = torch.searchsorted(cu[1:], tokens, right=True)  # [T]: empty ones own no token
    if protect is None:
        protect = tokens == cu[sequence]
    if threshold:
        kept = protect | (scores >= value)
    else:
        guarded = torch.zeros_like(lengths).index_add_(0, sequence, protect.long())
        # Least significant first: by score, then by what comes before it.
        order = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)
        group = 4 * sequence + 2 * ~protect + scores.isnan()
        order = order[torch.argsort(group[order], stable=True)]
        rank = torch.empty_like(tokens)
        rank[order] = tokens
        rank -= cu[sequence]  # within the sequence
        kept = rank < _counts(lengths, guarded, counts, value)[sequence]
    before = torch.zeros(len(tokens) + 1, dtype=torch.int32, device=scores.device)
    before[1:] = kept.cumsum(0)
    return kept.nonzero().squeeze(1), before[cu]


def gather(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    return [t.index_select(0, indices) for t in tensors]


def scatter(packed: Tensor, indices: Tensor, total: int) -> Tensor:
    out = packed.new_zeros((total, *packed.shape[1:]))
    return out.index_copy_(0, indices, packed)


def scatter_into(out: Tensor, packed: Tensor, indices: Tensor) -> None:
    out.index_copy_(0, indices, packed)
