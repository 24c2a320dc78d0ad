# SPDX-License-Identifier: Apache-2.0
"""What ragged_attention means, in plain PyTorch: one sequence after the other, all scores at once.

Half precisions are computed in float32 and rounded once, as the kernels do.
"""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _spans(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None):
    """(slice of queries, slice of keys) of each sequence that has queries or keys."""
    q = cu_seqlens.tolist()
    k = q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _distance(rows: slice, keys: slice, positions, key_positions, device) -> Tensor:
    """Position of each key minus that of each query [rows, keys]; without positions both end at
    the same one."""
    count, length = rows.stop - rows.start, keys.stop - keys.start
    if positions is None:
        of_rows = torch.arange(length - count, length, device=device)
        of_keys = torch.arange(length, device=device)
    else:
        of_rows = positions[rows].long()  # a difference, or a window, need not fit int32
        of_keys = (positions if key_positions is None else key_positions)[keys].long()
    return of_keys - of_rows[:, None]


def _probabilities(query, key, rows, keys, distance, scale, left, right) -> tuple[Tensor, Tensor]:
    """Softmax [heads, rows, keys] of one sequence, 0 where no key is visible, and its LSE."""
    group = query.shape[1] // key.shape[1]
    k = _wide(key[keys]).repeat_interleave(group, dim=1)
    logits = torch.einsum("ihd,jhd->hij", _wide(query[rows]), k) * scale
    if left >= 0:
        logits = logits.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        logits = logits.masked_fill(distance > right, -torch.inf)
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp(), lse


def _weights(heads: int, rows: int, distance: Tensor, mean, per_head, exclude_diagonal, dtype):
    """How much each probability counts in its key's score [rows, keys]."""
    weights = torch.ones(distance.shape, dtype=dtype, device=distance.device)
    if exclude_diagonal:
        weights = weights.masked_fill(distance == 0, 0)
    return weights / (rows * (1 if per_head else heads)) if mean and rows else weights


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    left: int,
    right: int,
    scored: bool,
    mean: bool,
    per_head: bool,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total, heads, _ = query.shape
    group = heads // key.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full((total, heads), -torch.inf, dtype=wide, device=query.device)
    scores = torch.zeros(len(key) if scored else 0, heads, dtype=wide, device=query.device)
    for rows, keys in _spans(cu_seqlens, cu_seqlens_k):
        distance = _distance(rows, keys, positions, key_positions, query.device)
        p, row_lse = _probabilities(query, key, rows, keys, distance, scale, left, right)
        v = _wide(value[keys]).repeat_interleave(group, dim=1)
        out[rows] = torch.einsum("hij,jhd->ihd", p, v).to(out.dtype)
        lse[rows] = row_lse.t()
        if scored:
            weights = _weights(heads, p.shape[1], distance, mean, per_head, exclude_diagonal, wide)
            scores[keys] = torch.einsum("hij,ij->jh", p, weights)
    return out, lse, scores if per_head else scores.sum(1)


def grad(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    left: int,
    right: int,
    mean: bool,
    per_head: bool,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format, dtype=wide)
                  for t in (query, key, value))  # fmt: skip
    for rows, keys in _spans(cu_seqlens, cu_seqlens_k):
        distance = _distance(rows, keys, positions, key_positions, query.device)
        p, _ = _probabilities(query, key, rows, keys, distance, scale, left, right)
        k, v = (_wide(t[keys]).repeat_interleave(group, dim=1) for t in (key, value))
        upstream = _wide(grad_out[rows])
        g = torch.einsum("ihd,jhd->hij", upstream, v)  # of the probabilities
        if grad_scores is not None:
            weights = _weights(heads, p.shape[1], distance, mean, per_head, exclude_diagonal, wide)
            of_keys = grad_scores[keys].t()[:, None] if per_head else grad_scores[keys]
            g = g + weights * of_keys
        ds = p * (g - (p * g).sum(-1, keepdim=True)) * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", ds, k)
        q = _wide(query[rows])
        for grad_kv, part in (
            (dk, torch.einsum("hij,ihd->jhd", ds, q)),
            (dv, torch.einsum("hij,ihd->jhd", p, upstream)),
        ):
            grad_kv[keys] = part.unflatten(1, (-1, group)).sum(2)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)
