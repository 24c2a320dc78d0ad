# SPDX-License-Identifier: Apache-2.0
"""One forward pass of a LeanEncoder: the tokens that are left, and where they belong."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lean_kernels.nn import exits
from lean_kernels.nn.dropout_attention import dropout_attention
from lean_kernels.nn.packing import Schedule, check_first, kept_counts, padding_mask, unpad
from lean_kernels.ops.ragged_attention import ragged_attention
from lean_kernels.ops.token_selection import (
    Threshold,
    compact_tokens,
    gather_tokens,
    scatter_tokens,
)

_PROTECTED = {"first": 1, "ends": 2}
_UNSUPPORTED = {
    "encoder_hidden_states": "cross-attention",
    "past_key_values": "a key/value cache",
    "cu_seq_lens_q": "a batch that is packed already",
    "output_attentions": "attention probabilities, which its kernel never writes",
}


class _Here(NamedTuple):
    """Where a pass is. Checkpointing computes a layer again, when the pass itself is further on."""

    index: int
    layer: nn.Module
    rotary: tuple[Tensor, Tensor] | None
    window: int | None
    positions: Tensor | None
    ends: Tensor | None


class PackedPass:
    """The packed tokens of a batch on their way through the layers.

    Args:
        encoder: the LeanEncoder.
        hidden: [B, S, D].
        mask: as `packing.padding_mask` takes it.
        kwargs: what else the model passes to its encoder.
    """

    def __init__(self, encoder, hidden, mask, kwargs: dict) -> None:
        for name, what in _UNSUPPORTED.items():
            given = kwargs.get(name)
            if given is not None and given is not False:
                raise ValueError(f"LeanEncoder: {name} was given, but it has no {what}")
        self.encoder, self.layout, self.rule = encoder, encoder.layout, encoder.token_rule
        self.layers = encoder.layers
        self.fused = None if torch.is_grad_enabled() else encoder.fused
        self.config = self.layout.number(self.layers[0], "config")
        batch, length, _ = self.shape = hidden.shape
        self.padded: Tensor | None = hidden  # the state as [B, S, D], where it is at hand
        tokens = padding_mask(mask, batch, length)
        lengths, self.places = unpad(tokens, batch, length)
        if encoder.first_only and self.places is not None:
            check_first(tokens, lengths)
        x = hidden.flatten(0, 1)
        self.x = x if self.places is None else gather_tokens(x, self.places)
        self.soft = encoder.soft_thresholds if encoder.training else None
        wants_states = kwargs.get("output_hidden_states") or getattr(
            self.config, "output_hidden_states", False
        )
        self.first_only = encoder.first_only and not wants_states
        rule = None if self.soft is not None else self.rule
        protect = "first" if self.rule is None else self.rule.protect
        counts = kept_counts(
            lengths,
            len(self.layers),
            profile=None if rule is None else encoder._profile,
            counts=None if rule is None else rule.counts,
            protected=_PROTECTED[protect],
            first_only=self.first_only,
        )
        self.threshold = None if rule is None else rule.threshold
        self.schedule = Schedule(counts, hidden.device)
        self.keep_last = not self.first_only and (rule is None or rule.dropped == "last")
        self.ends = self._ends() if protect == "ends" else None
        self.positions: Tensor | None = None  # int32 [T], where window and rotary need them
        self.rotary: dict = {}
        self.finished: list[tuple[Tensor, Tensor]] = []  # rows, and their places
        self.alive = list(range(batch))
        self.outcome, self.criterion = self._exits()

    @property
    def empty(self) -> bool:
        """Whether every sample has left."""
        return not self.alive and self.shape[0] > 0

    def _ends(self) -> Tensor:
        """Bool [T], the first and the last token of each sequence."""
        cu = self.schedule.cu_seqlens[0].long()
        ends = torch.zeros(len(self.x) + 1, dtype=torch.bool, device=self.x.device)
        ends[cu] = True
        ends[cu[1:] - 1] = True  # an empty sequence marks its neighbour's, which is marked anyway
        return ends[:-1]

    def _exits(self) -> tuple["exits.ExitOutcome | None", "exits.Criterion | None"]:
        encoder = self.encoder
        if encoder.exit_rule is None or not (encoder.training or exits.may_leave(encoder)):
            exits.remember(encoder, None)
            return None, None
        last = len(self.layers) - 1
        if encoder.training:
            outcome = exits.ExitOutcome([], None, last)
            exits.remember(encoder, outcome)
            return outcome, None
        where = torch.full(self.shape[:1], last, dtype=torch.int64, device=self.x.device)
        outcome = exits.ExitOutcome([], where, last)
        exits.remember(encoder, outcome)
        return outcome, exits.Criterion(encoder.exit_rule)

    def layer(self, index: int, position_embeddings=None) -> None:
        """Run a layer, drop its tokens, and let the samples go that are done."""
        layer, rotary = self.layers[index], None
        hooks, before = layer._forward_hooks, None
        if hooks:
            before = self._pad() if self.padded is None else self.padded
        if self.layout.rotary:
            rotary = self._packed_rotary(layer, position_embeddings)
        window = self.layout.number(layer, "window")
        if window is not None and self.positions is None:
            self.positions = self._columns()
        here = _Here(index, layer, rotary, window, self.positions, self.ends)
        compute = partial(self._compute, here)
        if self.encoder.training and getattr(layer, "gradient_checkpointing", False):
            y, indices, cu = layer._gradient_checkpointing_func(compute, self.x)
        else:
            y, indices, cu = compute(self.x)
        if indices is not None:
            self._drop(index, indices, cu)
        self.x = y
        self.padded = None
        if hooks:
            self._run_hooks(layer, before)
        if self.outcome is not None and index < self.outcome.last:
            self._exit(index)

    def _run_hooks(self, layer, before: Tensor) -> None:
        self.padded = self._pad()
        for key, hook in list(layer._forward_hooks.items()):
            keywords = ({},) if key in layer._forward_hooks_with_kwargs else ()
            if hook(layer, (before,), *keywords, self.padded) is not None:
                raise ValueError(
                    "LeanEncoder: a forward hook of a layer returned an output to take instead; "
                    "put it on a module within the layer"
                )

    def _compute(self, here: _Here, x: Tensor):
        """The layer's output, and which tokens it kept (None: all), with their cu_seqlens."""
        index, layer, layout, schedule = here.index, here.layer, self.layout, self.schedule
        options = {"scale": layout.number(layer, "head_size") ** -0.5}
        if here.window is not None:
            options["window"] = (here.window - 1, here.window - 1)
            options["positions"] = here.positions
        if self.first_only and index == len(self.layers) - 1:
            return self._compute_first(here, x, options)
        by_threshold = self.threshold is not None
        dropping = by_threshold or schedule.drops(index)
        observe = self.encoder.observe_scores
        if dropping or observe is not None or self.soft is not None:
            rule = self.rule
            options["key_scores"] = "mean" if rule is None else rule.reduction
            options["exclude_diagonal"] = rule is not None and rule.exclude_diagonal
        cu = schedule.cu_seqlens[index]
        query, key, value = layout.project(layer, x, here.rotary, self.fused)
        context, scores = self._attend(here, query, key, value, cu, options)
        if observe is not None:
            observe(index, scores.detach(), cu)
        indices = after = None
        if dropping:
            keep, total = schedule.keep[index + 1], schedule.totals[index + 1]
            if by_threshold:
                keep, total = Threshold(self.threshold[index]), None
            indices, after, context, x = compact_tokens(
                scores.detach(), cu, context, x, keep=keep, protect=here.ends, total=total
            )
        y = layout.feed_forward(layer, layout.merge(layer, context, x))
        if self.soft is not None:
            y = y * self._soft_mask(here, scores, cu).to(y.dtype)[:, None]
        return y, indices, after

    def _compute_first(self, here: _Here, x: Tensor, options: dict):
        """The same for the first token of each sequence alone, which still sees all tokens."""
        index, layer, layout, schedule = here.index, here.layer, self.layout, self.schedule
        cu, after = schedule.cu_seqlens[index], schedule.cu_seqlens[index + 1]
        lengths = schedule.counts[index]
        firsts = cu[:-1].long()
        if not lengths.all():
            firsts = firsts[torch.from_numpy(lengths > 0).to(firsts.device)]
        x_first = gather_tokens(x, firsts)
        rotary_first = here.rotary and tuple(t[firsts] for t in here.rotary)
        _, key, value = layout.project(layer, x, here.rotary, self.fused)  # may move the weights
        query = layout.query_rows(layer, x_first, rotary_first)
        options["cu_seqlens_k"] = cu
        if here.window is not None:
            options["positions"] = here.positions[firsts]
            options["key_positions"] = here.positions
        context, _ = self._attend(here, query, key, value, after, options)
        return layout.feed_forward(layer, layout.merge(layer, context, x_first)), firsts, after

    def _attend(self, here: _Here, query, key, value, cu: Tensor, options: dict):
        """What each token gathers [T, heads * head_size], and the key scores or None."""
        dropout = 0.0
        if self.encoder.training:
            dropout = self.layout.dropout_of_attention(here.layer)
        if dropout > 0:
            out, scores = dropout_attention(query, key, value, cu, dropout, **options)
        else:
            longest = self.schedule.longest[here.index]
            out = ragged_attention(query, key, value, cu, max_seqlen=longest, **options)
            out, scores = out if "key_scores" in options else (out, None)
        return out.flatten(1), scores

    def _soft_mask(self, here: _Here, scores: Tensor, cu: Tensor) -> Tensor:
        mask = self.soft(scores, here.index)
        protected = here.ends
        if protected is None:
            protected = torch.zeros(len(mask) + 1, dtype=torch.bool, device=mask.device)
            protected = protected.index_fill_(0, cu[:-1].long(), True)[:-1]
        return mask.masked_fill(protected, 1.0)

    def _drop(self, index: int, indices: Tensor, cu_seqlens: Tensor) -> None:
        if self.keep_last:
            gone = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
            gone[indices] = False
            gone = torch.nonzero_static(gone, size=len(self.x) - len(indices))[:, 0]
            self.finished.append((gather_tokens(self.x, gone), self._all_places()[gone]))
        self.places = self._all_places()[indices]
        if self.threshold is not None:
            self.schedule.after_threshold(index, cu_seqlens, len(indices))
        self._keep_companions(indices)

    def _keep_companions(self, indices: Tensor) -> None:
        if self.ends is not None:
            self.ends = self.ends[indices]
        if self.positions is not None:
            self.positions = self.positions[indices]
        for kind, pair in self.rotary.items():
            self.rotary[kind] = tuple(gather_tokens(pair[0], indices, pair[1]))

    def _all_places(self) -> Tensor:
        if self.places is None:
            self.places = torch.arange(len(self.x), device=self.x.device)
        return self.places

    def _columns(self) -> Tensor:
        return (self._all_places() % self.shape[1]).to(torch.int32)

    def _packed_rotary(self, layer, position_embeddings) -> tuple[Tensor, Tensor]:
        """cos and sin of each token [T, head_size], from [B or 1, S, head_size]."""
        kind = getattr(layer, "attention_type", None)
        if kind not in self.rotary:
            batch, length = self.shape[:2]
            places = self._all_places()
            self.rotary[kind] = tuple(
                t[0][places % length] if len(t) == 1 else t.reshape(batch * length, -1)[places]
                for t in position_embeddings
            )
        return self.rotary[kind]

    def _exit(self, index: int) -> None:
        logits = self.encoder.exits[index](self._first_rows(index + 1))
        if self.criterion is None:
            self.outcome.logits.append(logits)
            return
        done = self.criterion.done(logits)
        if not self.outcome.logits:
            shape = (self.shape[0], logits.shape[1])
            self.outcome.logits.append(logits.new_zeros(shape))
        left = done.tolist()
        if not any(left):
            return
        device = self.x.device
        ids = torch.tensor(self.alive, device=device)
        leaving = ids[done]
        self.outcome.logits[0].index_copy_(0, leaving, logits.detach()[done])
        self.outcome.layers.index_fill_(0, leaving, index)
        stay = (~done).nonzero()[:, 0]
        self.criterion.restrict(stay)
        lengths = self.schedule.keep[index + 1].long()
        token_leaves = done.repeat_interleave(lengths, output_size=len(self.x))
        rows = token_leaves.nonzero()[:, 0]
        self.finished.append((gather_tokens(self.x, rows), self._all_places()[rows]))
        rows = (~token_leaves).nonzero()[:, 0]
        self.places = self.places[rows]
        self.x = gather_tokens(self.x, rows)
        self._keep_companions(rows)
        kept = [place for place, gone in enumerate(left) if not gone]
        self.alive = [self.alive[place] for place in kept]
        self.schedule = self.schedule.restrict(kept)

    def _first_rows(self, row: int) -> Tensor:
        """First token of each sample that is left [alive, D], 0 where it has none."""
        counts, cu = self.schedule.counts[row], self.schedule.cu_seqlens[row]
        if counts.all():
            return gather_tokens(self.x, cu[:-1].long())
        some = torch.from_numpy(counts > 0).to(self.x.device)
        found = gather_tokens(self.x, cu[:-1].long()[some])
        return scatter_tokens(found, some.nonzero()[:, 0], len(counts))

    def _pad(self) -> Tensor:
        """[B, S, D]: what is left, over what has been finished, over zeros."""
        batch, length, _ = self.shape
        if self.places is None and not self.finished:
            return self.x.view(self.shape)
        rows, places = zip(*self.finished, (self.x, self._all_places()), strict=True)
        rows = torch.cat(rows) if len(rows) > 1 else rows[0]
        places = torch.cat(places) if len(places) > 1 else places[0]
        return scatter_tokens(rows, places, batch * length).view(self.shape)

    def finish(self) -> Tensor:
        """[B, S, D]."""
        if self.outcome is not None and self.criterion is not None and not self.outcome.logits:
            self.outcome.taken = True  # a single layer: there was no exit
        return self._pad()
