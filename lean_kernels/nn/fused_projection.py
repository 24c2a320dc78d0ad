# SPDX-License-Identifier: Apache-2.0
"""One product for block-sparse layers that read the same input: query, key and value.

Dense layers have no such product: torch computes three of them as fast as one.
"""

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lean_kernels.nn.block_sparse_linear import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear import bsr, op

# Two threads that moved the same parameters at once would each believe they share their memory.
_MOVING = threading.Lock()


class _Fused:
    """The layers' parameters as views of one tensor each, and their patterns one below the other.

    Sharing memory, it can never be out of date, however the parameters are written. It is when they
    were given other memory (`.to`, `load_state_dict(assign=True)`, a copy) or another pattern.
    """

    def __init__(self, layers: list[BlockSparseLinear]) -> None:
        first = layers[0]
        counts = [layer.nnz for layer in layers]
        like = {"dtype": first.weight.dtype, "device": first.weight.device}
        self.weight = bsr.blocks_empty(sum(counts), first.block_shape, **like)
        self.bias = None
        for layer, part in zip(layers, self.weight.split(counts), strict=True):
            layer.weight.data = part.copy_(layer.weight)
        self.widths = [layer.out_features for layer in layers]
        if first.bias is not None:
            self.bias = torch.empty(sum(self.widths), **like)
            for layer, part in zip(layers, self.bias.split(self.widths), strict=True):
                layer.bias.data = part.copy_(layer.bias)
        starts = [sum(counts[:place]) for place in range(len(layers))]
        tails = [layer.crow_indices[1:] + at for layer, at in zip(layers, starts, strict=True)]
        self.crow_indices = torch.cat([first.crow_indices[:1], *tails])
        self.col_indices = torch.cat([layer.col_indices for layer in layers])
        self.signature = _signature(layers)

    def memory(self) -> set[int]:
        """Addresses of the shared parameters."""
        return {address for entry in self.signature for address in entry[:2]}


def _signature(layers: list[BlockSparseLinear]) -> list[tuple]:
    """What changes when a layer's memory or pattern does."""
    found = []
    for layer in layers:
        own, buffers = layer._parameters, layer._buffers
        crow, col, bias = buffers["crow_indices"], buffers["col_indices"], own.get("bias")
        found.append(
            (
                own["weight"].data_ptr(),
                0 if bias is None else bias.data_ptr(),
                crow.data_ptr(),
                crow._version,
                col.data_ptr(),
                col._version,
            )
        )
    return found


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling it is its product and no more; anybody may change that at any time."""
    return (
        type(layer) is BlockSparseLinear
        and layer.activation is None
        and layer.weight_scales is None
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _fusable(layers: list[BlockSparseLinear]) -> bool:
    first = layers[0]
    return all(
        (layer.in_features, layer.block_shape) == (first.in_features, first.block_shape)
        and layer.out_features % layer.block_shape[0] == 0
        and layer.nnz > 0
        and (layer.bias is None) == (first.bias is None)
        and all(map(_is_ours, layer._parameters.values()))
        for layer in layers
    )


def _is_ours(parameter: nn.Parameter | None) -> bool:
    """Whether its memory may be moved: on CPU, plain, and no other process's as well."""
    if parameter is None:
        return True
    plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu"
    return plain and not parameter.is_inference() and not parameter.is_shared()


class FusedProjections:
    """The fused products of an encoder, each made when it is first wanted."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, _Fused] = WeakKeyDictionary()

    def __call__(self, layers: list[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
        """Each layer's output [T, out_features], or None where they do not fuse.

        Gradients do not flow; call it where none are wanted.
        """
        if not all(map(_is_bare, layers)):
            return None
        fused = self._current(layers)
        if fused is None:
            with _MOVING:
                fused = self._current(layers) or self._make(layers)
            if fused is None:
                return None
        y = op.apply(
            x, fused.weight, fused.crow_indices, fused.col_indices, fused.bias, None,
            sum(fused.widths), None,
        )  # fmt: skip
        return y.split(fused.widths, dim=1)

    def _current(self, layers: list[BlockSparseLinear]) -> _Fused | None:
        fused = self._entries.get(layers[0])
        return None if fused is None or fused.signature != _signature(layers) else fused

    def _make(self, layers: list[BlockSparseLinear]) -> _Fused | None:
        if not _fusable(layers):
            return None
        with torch.inference_mode(False), torch.no_grad():
            fused = self._entries[layers[0]] = _Fused(layers)
        return fused

    def give_own_memory(self, module, state_dict: dict, prefix: str, metadata) -> None:
        """Hook of `state_dict`: what it holds shares no memory, which file formats refuse."""
        shared = set().union(*(fused.memory() for fused in self._entries.values()))
        for name, tensor in state_dict.items():
            if not name.startswith(prefix) or not isinstance(tensor, Tensor):
                continue
            if type(tensor) is not nn.Parameter and tensor.data_ptr() in shared:
                state_dict[name] = tensor.clone()
