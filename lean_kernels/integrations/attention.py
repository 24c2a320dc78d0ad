# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="lean_ragged"`: attention without padding for any transformers model.

Importing this module registers it; `import lean_kernels` arranges for that by itself. The attention
of a layer then packs queries, keys and values and calls `ragged_attention`; every other layer still
sees the padding, which `LeanEncoder` removes too. Encoders and decoders, with and without key/value
cache, padding on either side, grouped heads, and sliding windows.
"""

import types

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from lean_kernels.nn.dropout_attention import dropout_attention
from lean_kernels.ops.ragged_attention import ragged_attention

NAME = "lean_ragged"

_PLAIN_MASKS = (bidirectional_mask_function, causal_mask_function)
_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "block_mask")


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Bool [B, kv_length], True for tokens; None where all keys are. Causality and windows are left
    to `attention`.

    Raises:
        ValueError: a pattern between tokens other than causal, bidirectional and windows.
    """
    if not _is_plain(mask_function):
        raise ValueError(
            f"{NAME}: the model masks by a pattern that is not causal, bidirectional or a sliding "
            "window (packed position_ids, chunks or blocks); use attn_implementation='sdpa'"
        )
    end = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        if end == kv_length or mask_function is bidirectional_mask_function:
            return None
        columns = (torch.arange(kv_length, device=device) < end).expand(batch_size, kv_length)
    else:
        # From the right, not from kv_offset: generate() may pass what it got from here before.
        columns = attention_mask[:, -kv_length:]
        missing = kv_length - columns.shape[1]
        if missing > 0:  # a cache of fixed size, beyond what it holds so far
            columns = nn.functional.pad(columns, (0, missing), value=False)
        # Elsewhere reading the values would stall the accelerator.
        if columns.device.type == "cpu" and bool(columns.all()):
            return None
    columns._lean_end = end
    return columns


def _is_plain(function) -> bool:
    if function in _PLAIN_MASKS:
        return True
    if not isinstance(function, types.FunctionType):
        return False
    maker, _, inner = function.__qualname__.partition(".<locals>.")
    if function.__module__ != causal_mask_function.__module__ or not inner:
        return False
    if maker == "and_masks":
        (cell,) = function.__closure__
        return all(map(_is_plain, cell.cell_contents))
    return maker in _WINDOWS


class _Packing:
    """Which rows of padded queries and keys are tokens, for all layers of a forward pass."""

    def __init__(self, seen: Tensor, queries: int, causal: bool) -> None:
        batch, keys = seen.shape
        self.of = (batch, queries, causal)
        self.keys = seen.reshape(-1).nonzero()[:, 0]
        self.cu_k = _cumulated(seen)
        self.key_columns = (self.keys % keys).to(torch.int32)
        # Causal queries are keys as well, the last ones held. Others may be another sequence.
        end = getattr(seen, "_lean_end", keys) if causal else queries
        asking = seen[:, end - queries : end] if causal else seen.new_ones(batch, queries)
        self.rows = asking.reshape(-1).nonzero()[:, 0]
        self.cu = _cumulated(asking)
        self.columns = (self.rows % queries + end - queries).to(torch.int32)


def _cumulated(seen: Tensor) -> Tensor:
    cu = torch.zeros(len(seen) + 1, dtype=torch.int32, device=seen.device)
    torch.cumsum(seen.sum(dim=1), dim=0, out=cu[1:])
    return cu


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the attention layer; its `is_causal` counts where none is given.
        query: [B, H, Q, D]. key, value: [B, H_kv, K, D].
        attention_mask: None or bool [B, K], as `mask` makes it.
        dropout: of the probabilities. Above 0 attention costs what eager attention does.
        sliding_window: how many positions to each side, its own included, a query sees.

    Returns:
        [B, Q, H, D], zeros in rows of padding; and None, as no probabilities are ever stored.

    Raises:
        ValueError: an option it does not have.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME}: {name} is not supported; use another attn_implementation")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{NAME}: attention probabilities are never stored; use attn_implementation='eager'"
        )
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and queries > keys:
        raise ValueError(f"{NAME}: {queries} causal queries for {keys} keys")
    options: dict = {"scale": size**-0.5 if scaling is None else scaling, "causal": bool(causal)}
    if sliding_window is not None:
        options["window"] = (sliding_window - 1, sliding_window - 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    packing = None
    if attention_mask is not None:
        packing = _packing(attention_mask, batch, queries, keys, options["causal"])
        q, k, v = q[packing.rows], k[packing.keys], v[packing.keys]
        cu, options["cu_seqlens_k"] = packing.cu, packing.cu_k
        if sliding_window is not None:
            options["positions"], options["key_positions"] = packing.columns, packing.key_columns
    else:
        cu = _even(batch, queries, q.device)
        if queries != keys:
            options["cu_seqlens_k"] = _even(batch, keys, q.device)
    if dropout > 0:
        out, _ = dropout_attention(q, k, v, cu, dropout, **options)
    else:
        out = ragged_attention(q, k, v, cu, **options)
    if packing is not None:
        out = out.new_zeros(batch * queries, heads, size).index_copy(0, packing.rows, out)
    return out.view(batch, queries, heads, size), None


def _packing(seen: Tensor, batch: int, queries: int, keys: int, causal: bool) -> _Packing:
    if seen.shape != (batch, keys) or seen.dtype != torch.bool:
        raise ValueError(
            f"{NAME}: attention_mask must be None or [{batch}, {keys}] (1 for tokens), as a "
            f"tokenizer gives it; got {seen.dtype} {list(seen.shape)}"
        )
    # All layers get the same tensor: what it says is worked out once and kept with it.
    found = getattr(seen, "_lean_packing", None)
    if found is None or found.of != (batch, queries, causal):
        found = seen._lean_packing = _Packing(seen, queries, causal)
    return found


def _even(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


# Registered for attention alone, transformers would pass no mask at all.
AttentionMaskInterface.register(NAME, mask)
AttentionInterface.register(NAME, attention)
