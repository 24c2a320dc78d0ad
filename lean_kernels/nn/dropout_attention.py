# SPDX-License-Identifier: Apache-2.0
"""Attention whose probabilities are dropped out in training, on padded copies of packed tokens.

The kernels of ragged_attention have no dropout. Training with it therefore costs what eager
attention costs, time and memory in the square of the longest sequence; a model trains with the
kernels once its attention dropout is set to 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    dropout: float,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float,
    key_scores: str | None = None,
    exclude_diagonal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`ragged_attention` with each probability zeroed with probability `dropout`, others rescaled.

    Arguments as there. Scores are those before the dropout, as nothing is dropped at inference.

    Returns:
        out [T, H, D], and the scores [T_k] or None.
    """
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_k is None:
        key_positions = positions
    rows, columns = _places(cu_seqlens), _places(cu_k)
    group = query.shape[1] // key.shape[1]
    q = _pad(query, rows)  # [B, S, H, D]
    k, v = (_pad(t.repeat_interleave(group, dim=1), columns) for t in (key, value))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    of_rows, of_keys = (
        _at_end(places, cu) if at is None else _pad(at, places)
        for places, cu, at in ((rows, cu_seqlens, positions), (columns, cu_k, key_positions))
    )
    distance = of_keys[:, None, :] - of_rows[:, :, None]
    seen = _is_token(columns, cu_k)[:, None, :] & _is_token(rows, cu_seqlens)[:, :, None]
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.softmax(dim=-1, dtype=wide) * seen[:, None]
    out = torch.einsum("bhij,bjhd->bihd", F.dropout(p, dropout).to(v.dtype), v)
    out = out.flatten(0, 1)[_flat(rows, cu_seqlens)]
    if key_scores is None:
        return out, None
    if exclude_diagonal:
        p = p.masked_fill((distance == 0)[:, None], 0)
    scores = p.sum(dim=(1, 2))  # [B, S_k]
    if key_scores == "mean":
        counts = cu_seqlens.diff().clamp_min(1)
        scores = scores / (counts[:, None] * query.shape[1])
    return out, scores.flatten()[_flat(columns, cu_k)]


def _places(cu: Tensor) -> Tensor:
    """Packed row of each place of the padded batch, int64 [B, S]; beyond a sequence any row."""
    longest = int(cu.diff().max()) if len(cu) > 1 else 0
    places = cu[:-1, None].long() + torch.arange(longest, device=cu.device)
    return places.clamp_max(max(int(cu[-1]) - 1, 0))


def _is_token(places: Tensor, cu: Tensor) -> Tensor:
    return torch.arange(places.shape[1], device=cu.device) < cu.diff()[:, None]


def _flat(places: Tensor, cu: Tensor) -> Tensor:
    """Place in the flattened padded batch of each packed row, int64 [T]."""
    return _is_token(places, cu).flatten().nonzero()[:, 0]


def _at_end(places: Tensor, cu: Tensor) -> Tensor:
    """Positions counted from the end of each sequence, where query and key rows meet, [B, S]."""
    return torch.arange(places.shape[1], device=cu.device) - cu.diff()[:, None]


def _pad(packed: Tensor, places: Tensor) -> Tensor:
    return packed[places.flatten()].unflatten(0, places.shape)
