# SPDX-License-Identifier: Apache-2.0
"""How an encoder layer is computed, on packed tokens, from the submodules it keeps its weights in.

A layout names those submodules (`lean_kernels.architectures` has one per model family) and applies
them. Which tokens there are, and which are dropped in between, is `LeanEncoder`'s affair.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lean_kernels.nn.block_sparse_linear import BlockSparseLinear
from lean_kernels.nn.fused_projection import FusedProjections
from lean_kernels.ops.add_layer_norm import add_layer_norm

Rotary = tuple[Tensor, Tensor]  # cos and sin, [T, head_size]


@dataclass(frozen=True)
class Layout:
    """What all layouts share. Strings are dotted paths within a layer.

    Args:
        layers: name of the encoder's list of layers, or "" where the encoder is that list.
        head_size: attribute that holds the size of an attention head.
        result: makes what the encoder returns from (encoder that was replaced, hidden states).
        refuse: says why an encoder cannot be replaced, None if it can be.
        attention_dropout: dropout of the attention probabilities, an nn.Dropout or a number.
        window: attribute that holds how far a token of this layer sees to each side, plus 1; None
            there is all.
        config: attribute that holds the model's configuration.
    """

    layers: str
    head_size: str
    result: Callable
    refuse: Callable[[nn.Module], str | None]
    attention_dropout: str
    config: str
    window: str | None = None

    rotary = False

    def __post_init__(self) -> None:
        paths = {
            item.name: value.split(".")
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), str)
        }
        paths = {name: (tuple(path[:-1]), path[-1]) for name, path in paths.items()}
        object.__setattr__(self, "_paths", paths)  # name: (parents, child)

    def part(self, layer: nn.Module, name: str) -> nn.Module:
        """The submodule called `name` here. Faster than attributes of an nn.Module by far."""
        parents, child = self._paths[name]
        for parent in parents:
            layer = layer._modules[parent]
        found = layer._modules.get(child)
        return getattr(layer, child) if found is None else found  # an activation can be a function

    def missing(self, layer: nn.Module) -> str | None:
        """The dotted path of a part that `layer` does not have, None if it has all."""
        for name, (parents, child) in self._paths.items():
            path = (*parents, child)
            try:
                if name != "layers":
                    functools.reduce(getattr, path, layer)
            except AttributeError:
                return ".".join(path)
        return None

    def number(self, layer: nn.Module, name: str):
        """The attribute called `name` here; None where the layout has none."""
        if name not in self._paths:
            return None
        parents, child = self._paths[name]
        for parent in parents:
            layer = layer._modules[parent]
        return getattr(layer, child)

    def dropout_of_attention(self, layer: nn.Module) -> float:
        """Probability with which training drops attention probabilities."""
        found = self.number(layer, "attention_dropout")
        return found.p if isinstance(found, nn.Module) else found

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[T, heads * head_size] -> [T, heads, head_size]."""
        size = self.number(layer, "head_size")
        return x.view(x.shape[0], x.shape[1] // size, size)


@dataclass(frozen=True)
class PostNorm(Layout):
    """x = norm(x + out(attention(x))), x = norm(x + down(act(up(x)))): BERT, DistilBERT."""

    query: str = ""
    key: str = ""
    value: str = ""
    out: str = ""
    out_norm: str = ""
    up: str = ""
    activation: str = ""
    down: str = ""
    down_norm: str = ""
    out_dropout: str | None = None
    down_dropout: str | None = None

    def query_rows(self, layer: nn.Module, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Queries [T, heads, head_size] alone."""
        return self._heads(layer, self.part(layer, "query")(x))

    def project(
        self, layer: nn.Module, x: Tensor, rotary: Rotary | None, fused: FusedProjections | None
    ) -> tuple[Tensor, ...]:
        """Query, key and value, each [T, heads, head_size]."""
        linears = [self.part(layer, name) for name in ("query", "key", "value")]
        found = None if fused is None else fused(linears, x)
        if found is None:
            found = [linear(x) for linear in linears]
        return tuple(self._heads(layer, y) for y in found)

    def merge(self, layer: nn.Module, context: Tensor, x: Tensor) -> Tensor:
        """What attention gathered [T, heads * head_size] and its input x -> [T, D]."""
        y = self.part(layer, "out")(context)
        return self._add_norm(layer, "out", y, x)

    def feed_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[T, D] -> [T, D], residual and norm included."""
        inner = self.part(layer, "activation")(self.part(layer, "up")(x))
        return self._add_norm(layer, "down", self.part(layer, "down")(inner), x)

    def _add_norm(self, layer: nn.Module, name: str, y: Tensor, x: Tensor) -> Tensor:
        if layer.training and f"{name}_dropout" in self._paths:
            y = self.part(layer, f"{name}_dropout")(y)
        norm = self.part(layer, f"{name}_norm")
        if type(norm) is not nn.LayerNorm:
            return norm(y + x)
        weights = norm._parameters
        return add_layer_norm(y, x, weights["weight"], weights["bias"], eps=norm.eps)


@dataclass(frozen=True)
class PreNorm(Layout):
    """x += out(attention(norm(x))), x += down(act(a) * b) with a, b = up(norm(x)): ModernBERT.

    One linear makes query, key and value, with rotary positions on query and key.
    """

    attention_norm: str = ""
    qkv: str = ""
    out: str = ""
    out_dropout: str = ""
    mlp_norm: str = ""
    up: str = ""
    activation: str = ""
    mlp_dropout: str = ""
    down: str = ""

    rotary = True

    def query_rows(self, layer: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries [T, heads, head_size] alone."""
        linear, x = self.part(layer, "qkv"), self.part(layer, "attention_norm")(x)
        if type(linear) is nn.Linear:
            width = linear.out_features // 3
            bias = None if linear.bias is None else linear.bias[:width]
            query = nn.functional.linear(x, linear.weight[:width], bias)
        else:
            query = linear(x).chunk(3, dim=1)[0]
        return _rotate(self._heads(layer, query), *rotary)

    def project(
        self, layer: nn.Module, x: Tensor, rotary: Rotary, fused: FusedProjections | None
    ) -> tuple[Tensor, ...]:
        """Query, key and value, each [T, heads, head_size]."""
        qkv = self.part(layer, "qkv")(self.part(layer, "attention_norm")(x))
        qkv = self._heads(layer, qkv).unflatten(1, (3, -1))  # [T, 3, heads, head_size]
        cos, sin = rotary
        query, key = _rotate(qkv[:, :2], cos[:, None], sin[:, None]).unbind(1)
        return query, key, qkv[:, 2]

    def merge(self, layer: nn.Module, context: Tensor, x: Tensor) -> Tensor:
        """What attention gathered [T, heads * head_size] and its input x -> [T, D]."""
        return _add(self.part(layer, "out"), self.part(layer, "out_dropout"), context, x)

    def feed_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[T, D] -> [T, D], residual and norm included."""
        up, activation = self.part(layer, "up"), self.part(layer, "activation")
        value, gate = up(self.part(layer, "mlp_norm")(x)).chunk(2, dim=-1)
        inner = activation(value)
        inner = inner.mul_(gate) if _nobody_sees(up, activation) else inner * gate
        if layer.training:
            inner = self.part(layer, "mlp_dropout")(inner)
        return _add(self.part(layer, "down"), None, inner, x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [T, ..., heads, head_size], in float32 for half precisions."""
    dtype, half = x.dtype, x.shape[-1] // 2
    x, cos, sin = (t if t.dtype == torch.float64 else t.float() for t in (x, cos, sin))
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half], x[..., half:]
    rotated = torch.cat(
        (
            first * cos[..., :half] - second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
        ),
        dim=-1,
    )
    return rotated.to(dtype)


def _add(linear: nn.Module, dropout: nn.Module | None, x: Tensor, residual: Tensor) -> Tensor:
    """residual + dropout(linear(x)); a block-sparse linear adds as it stores."""
    dropped = dropout is not None and dropout.training
    # Under autocast the product is narrower than the residual, and the sum must not be.
    fuses = isinstance(linear, BlockSparseLinear) and not linear._forward_hooks
    if fuses and not dropped and not torch.is_autocast_enabled(x.device.type):
        return linear(x, residual)
    y = dropout(linear(x)) if dropped else linear(x)
    return y.add_(residual) if _nobody_sees(linear) and y.dtype == residual.dtype else y + residual


def _nobody_sees(*modules) -> bool:
    """Whether what they return may be overwritten: neither a gradient nor a hook wants it."""
    return not (torch.is_grad_enabled() or any(getattr(m, "_forward_hooks", ()) for m in modules))
