# SPDX-License-Identifier: Apache-2.0
"""Padded batches as packed tokens, and how many of them each layer of an encoder keeps."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lean_kernels.ops.token_selection.reference import SLACK


def padding_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Bool [B, S], True for tokens, of whatever form a model passes its attention mask in.

    Args:
        mask: None (no padding), [B, S] with 0 for padding, or [B or 1, heads or 1, S, S] of which
            all query rows are alike: bool, or added to the logits (0, or the dtype's minimum).

    Raises:
        ValueError: another shape, or a mask that says more than which tokens are padding.
    """
    if mask is None:
        return None
    if mask.shape == (batch, length):
        return mask if mask.dtype == torch.bool else mask != 0
    shape = list(mask.shape)
    fits = [batch, shape[1], length, length] if mask.dim() == 4 else []
    if len(shape) == 4 and all(a in (1, b) for a, b in zip(shape, fits, strict=True)):
        row = mask[:, :1, :1]
        visible = row if mask.dtype == torch.bool else row == 0
        hidden = mask.dtype == torch.bool or bool(((row < -1e4) | visible).all())
        if hidden and bool((mask == row).all()):
            return visible[:, 0, 0].expand(batch, length)
        raise ValueError(
            "LeanEncoder: the attention mask must say only which tokens are padding, and hide them "
            "from all others; got one whose query rows or heads differ"
        )
    raise ValueError(
        f"LeanEncoder: attention_mask must be None, [{batch}, {length}] or "
        f"[{batch}, 1, {length}, {length}], got {shape}"
    )


def unpad(mask: Tensor | None, batch: int, length: int) -> tuple[np.ndarray, Tensor | None]:
    """Tokens of each sequence, int64 [B], and their places among the B * S rows, int64 [T].

    The places are None where there is no padding. Reads the lengths on the host, once.
    """
    if mask is None:
        return np.full(batch, length, dtype=np.int64), None
    lengths = mask.sum(dim=1).cpu().numpy()
    total = int(lengths.sum())
    if total == batch * length:
        return lengths, None
    return lengths, torch.nonzero_static(mask.reshape(-1), size=total)[:, 0]


def check_first(mask: Tensor, lengths: np.ndarray) -> None:
    """Raise ValueError unless each sequence that has a token has one in the first place, where a
    model that reads nothing else reads."""
    if int(mask[:, 0].sum()) != np.count_nonzero(lengths):
        raise ValueError(
            "LeanEncoder: a sequence begins with padding, where this model reads its first token; "
            'pad on the right (tokenizer.padding_side = "right")'
        )


def kept_counts(
    lengths: np.ndarray,
    layers: int,
    *,
    profile: Sequence[float] | None = None,
    counts: Sequence[int] | None = None,
    protected: int = 1,
    first_only: bool = False,
) -> np.ndarray:
    """How many tokens each sequence has before layer l (row l) and after the last: [L + 1, B].

    Args:
        lengths: tokens of each sequence, int64 [B].
        profile: fraction of them kept after each layer's attention.
        counts: number of them kept after each layer's attention.
        protected: tokens of a sequence that always stay.
        first_only: the last layer keeps one token of each sequence.
    """
    rows = np.broadcast_to(lengths, (layers + 1, len(lengths))).copy()
    least = np.minimum(lengths, protected)
    if profile is not None:
        # As kept_count rounds: 0.1 * 30 is a little above 3 in floating point.
        wanted = np.ceil(np.asarray(profile)[:, None] * lengths - SLACK).astype(np.int64)
    elif counts is not None:
        wanted = np.broadcast_to(np.asarray(counts)[:, None], (layers, len(lengths)))
    else:
        wanted = rows[1:]
    np.minimum(rows[1:], np.maximum(wanted, least), out=rows[1:])
    np.minimum.accumulate(rows, axis=0, out=rows)
    if first_only:
        rows[-1] = np.minimum(lengths, 1)
    return rows


class Schedule:
    """Lengths of the packed sequences before each layer, all prepared before the first one.

    Row l of everything belongs to the input of layer l, row L to the output of the last.

    Args:
        counts: tokens of each sequence, int64 [L + 1, B], on the host.
        device: where the kernels run.
    """

    __slots__ = ("counts", "cu_seqlens", "keep", "longest", "totals")

    def __init__(self, counts: np.ndarray, device: torch.device) -> None:
        layers, batch = counts.shape
        self.counts = counts
        offsets = np.zeros((2, layers, batch + 1), dtype=np.int32)
        np.cumsum(counts, axis=1, out=offsets[0, :, 1:])
        offsets[1, :, 1:] = counts
        self.totals = offsets[0, :, -1].tolist()
        self.longest = counts.max(axis=1, initial=0).tolist()
        both = torch.from_numpy(offsets)
        if device.type != "cpu":
            both = both.to(device, non_blocking=True)
        self.cu_seqlens = list(both[0].unbind(0))
        self.keep = both[1, :, 1:]

    def drops(self, layer: int) -> bool:
        """Whether that layer drops any token."""
        return self.totals[layer + 1] != self.totals[layer]

    def restrict(self, alive: list[int]) -> "Schedule":
        """The schedule of these sequences alone."""
        return Schedule(self.counts[:, alive], self.keep.device)

    def after_threshold(self, layer: int, cu_seqlens: Tensor, total: int) -> None:
        """Take over the lengths that a data-dependent selection in `layer` left."""
        counts = cu_seqlens.diff().cpu().numpy().astype(np.int64)
        self.counts[layer + 1 :] = np.minimum(self.counts[layer + 1 :], counts)
        rest = Schedule(self.counts[layer + 1 :], self.keep.device)
        self.keep[layer + 1 :] = rest.keep
        for mine, theirs in (
            (self.totals, rest.totals),
            (self.longest, rest.longest),
            (self.cu_seqlens, rest.cu_seqlens),
        ):
            mine[layer + 1 :] = theirs
