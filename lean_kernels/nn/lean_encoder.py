# SPDX-License-Identifier: Apache-2.0
"""An encoder that spends nothing on padding, on dropped tokens and on samples that are done."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lean_kernels.nn import exits
from lean_kernels.nn.encoder_layout import Layout
from lean_kernels.nn.fused_projection import FusedProjections
from lean_kernels.nn.packed_pass import PackedPass
from lean_kernels.nn.token_profile import check_profile, rescale


class LeanEncoder(nn.Module):
    """Takes the place of a transformer's encoder and computes the same on packed tokens.

    It unpads once, runs every sublayer on [T, D], drops tokens between a layer's attention and its
    feed-forward as `tokens` says, lets samples that `exits` finds done leave the batch, and pads
    once, with zeros. With neither rule it computes what the encoder does, to rounding. A sequence
    that is all padding comes back as zeros.

    It takes over the encoder's submodules under their names, so that state dicts stay the same
    (`exits.<n>.*` come on top), and calls linears, activations and heads as modules. The layers
    themselves it does not call: their forward hooks run, with padded states, others do not.
    Usually `lean_kernels.convert` makes it.

    Lengths are read on the host, where torch.compile breaks the graph: it computes the same and
    gains nothing within the encoder, and `fullgraph=True` raises.

    Within a sequence classifier, samples leave early when the classifier is called; a call of its
    base model alone runs all layers.

    In training with attention dropout, attention runs as eager attention does and costs as much
    (`dropout_attention`); hidden dropout acts as ever.

    Args:
        encoder: the module to replace; its layers are shared, not copied.
        layout: what the submodules of a layer are.
        tokens: a `lean_kernels.recipe.TokenRule`; None packs and drops nothing.
        exits: a `lean_kernels.recipe.ExitRule`, with `exit_heads`; None runs all layers.
        exit_heads: one per layer but the last, each [B, D] -> [B, C].
        first_only: compute only the first token in the last layer, and return zeros for the others.

    Attributes:
        token_rule, exit_rule: the rules; assign another to change it.
        observe_scores: None, or called as (layer, scores [T], cu_seqlens [B + 1]) with each layer's
            key scores, reduced as `token_rule` says.
        soft_thresholds: None, or a module (scores [T], layer) -> [T] that says how much of each
            token stays. Where it is set, training multiplies each layer's output by it and drops
            nothing (LTP); protected tokens stay whole.

    Raises:
        ValueError: the encoder or the rules cannot be used; the message says why.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layout: Layout,
        *,
        tokens=None,
        exits=None,
        exit_heads: nn.ModuleList | None = None,
        first_only: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.replaced = (encoder,)  # in a tuple, so that it is no submodule
        self._modules.update(encoder._modules)
        if (reason := self._refuse(encoder)) is not None:
            raise ValueError(f"LeanEncoder: cannot replace {type(encoder).__name__}: {reason}")
        self.token_rule = tokens
        self.exit_rule = exits
        self.has_classifier = False  # that takes the logits of its exits; see `exits.attach`
        self.first_only = first_only
        self.observe_scores: Callable[[int, Tensor, Tensor], None] | None = None
        self.soft_thresholds: nn.Module | None = None
        self._fused: FusedProjections | None = None
        self.register_state_dict_post_hook(_give_own_memory)
        if exit_heads is not None:
            self.exits = exit_heads
        self.training = encoder.training

    def _refuse(self, encoder: nn.Module) -> str | None:
        if isinstance(encoder, LeanEncoder):
            return "it is lean already; assign its token_rule and exit_rule"
        if not self.layers:
            return "it has no layers"
        for index, layer in enumerate(self.layers):
            if (path := self.layout.missing(layer)) is not None:
                return f"layer {index}, a {type(layer).__name__}, has no {path}"
        return self.layout.refuse(encoder)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_fused": None}  # a copy has memory of its own

    @property
    def fused(self) -> FusedProjections:
        """Products of block-sparse query, key and value in one."""
        if self._fused is None:
            self._fused = FusedProjections()
        return self._fused

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, first to last."""
        name = self.layout.layers
        holder = self._modules[name] if name else self
        return [layer for key, layer in holder._modules.items() if key.isdigit()]

    @property
    def token_rule(self):
        """How tokens are dropped: a `TokenRule`, or None."""
        return self._token_rule

    @token_rule.setter
    def token_rule(self, rule) -> None:
        count = len(self.layers)
        if rule is not None and rule.layers not in (None, count):
            raise ValueError(
                f"LeanEncoder: the token rule is for {rule.layers} layers, the encoder has {count}"
            )
        profile = None if rule is None else rule.profile
        if profile is not None:
            profile = rescale(check_profile(profile, count), rule.speed)
        self._token_rule, self._profile = rule, profile

    @property
    def exit_logits(self) -> list[Tensor]:
        """Logits of the last forward pass, of each exit [B, C] in training mode; the model's own
        are the last exit's. At inference one tensor, 0 where a sample reached the last layer."""
        outcome = exits.latest(self)
        return [] if outcome is None else outcome.logits

    @property
    def exit_layers(self) -> Tensor | None:
        """Int64 [B], after which layer each sample of the last inference left; None without any."""
        outcome = exits.latest(self)
        return None if outcome is None else outcome.layers

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> object:
        """[B, S, D] and a padding mask -> what the replaced encoder returns.

        Raises:
            ValueError: an argument that an encoder on packed tokens cannot honour.
        """
        run = PackedPass(self, hidden_states, attention_mask, kwargs)
        for index in range(len(run.layers)):
            run.layer(index)
            if run.empty:
                break
        return self.layout.result(self.replaced[0], run.finish())

    # Some models have no encoder module: their own forward goes through a list of layers, and this
    # takes that list's place.

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]

    def __iter__(self) -> Iterator["_Step"]:
        """The layers of one forward pass: the first step unpads, the last one pads."""
        run: list[PackedPass] = []
        return (_Step(self, run, index, layer) for index, layer in enumerate(self.layers))

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        rules = {"tokens": self.token_rule, "exits": self.exit_rule}
        parts = [f"{name}={rule.to_dict()}" for name, rule in rules.items() if rule is not None]
        return ", ".join(parts + ["first_only=True"] * self.first_only)


def _give_own_memory(encoder: LeanEncoder, *args) -> None:
    encoder.fused.give_own_memory(encoder, *args)


class _Step:
    """One layer of a pass through a LeanEncoder that stands in for a list of layers."""

    def __init__(self, encoder: LeanEncoder, run: list, index: int, layer: nn.Module) -> None:
        self._encoder, self._run, self._index, self._layer = encoder, run, index, layer

    def __getattr__(self, name: str):
        return getattr(self._layer, name)

    def __call__(
        self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs
    ) -> Tensor:
        if self._index == 0:
            self._run[:] = [PackedPass(self._encoder, hidden_states, attention_mask, kwargs)]
        run = self._run[0]
        if not run.empty:
            run.layer(self._index, position_embeddings)
        return run.finish() if self._index == len(run.layers) - 1 else hidden_states
