# SPDX-License-Identifier: Apache-2.0
"""Make a model lean, in place, as a recipe says; and dense again."""

import difflib
import fnmatch
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lean_kernels.architectures import (
    activation_after,
    activation_function,
    activation_module,
    find_encoders,
)
from lean_kernels.encoders import attach_exits, check_rules, install, remove
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.nn.block_sparse_linear import dense_weight, magnitude_mask
from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.ops.block_sparse_linear.break_even import break_even, device_kind
from lean_kernels.recipe import LinearRule, Recipe
from lean_kernels.report import Entry, LeanReport, attached
from lean_kernels.spec import describe, is_conv1d, replace, why_not_convertible

__all__ = ["LeanReport", "convert", "store_description", "to_dense"]


@dataclass(frozen=True)
class _Match:
    """A module that a rule matched. It is named, not held: a replaced layer is freed at once."""

    names: list[str]  # all names of the one module object
    rule: LinearRule
    left_dense: str | None  # why a layer that is matched stays as it is


@torch.no_grad()
def convert(
    model: nn.Module,
    recipe: Recipe | dict | str | os.PathLike,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replace linear layers by block-sparse ones and encoders by lean ones, in place.

    Layers go one by one, each dense weight freed before the next. `model.lean_report()` then lists
    what was replaced and what was left dense, and why: a layer whose kept density is above the
    break-even (see `LinearRule.dense_above`) keeps its full weight, and so does one whose weight
    another module shares, such as an output embedding tied to the input embedding. Modules that
    share one layer go on sharing it.

    With `[tokens]` or `[exits]` the model's encoder becomes an `nn.LeanEncoder`. Exit heads start
    as copies of the model's own head, and need training. Where the encoder is lean already, it
    takes the rules that the recipe has and keeps the others.

    Args:
        model: any nn.Module; nn.Linear and transformers' Conv1D can be replaced, and the encoders
            of the transformers models in `lean_kernels.architectures`.
        recipe: a Recipe, the same as a dict, or the path of a TOML file.
        progress: called as progress(done, total, name) before each layer and once at the end.

    Returns:
        The model.

    Raises:
        ValueError: the recipe is wrong, a glob matches nothing or nothing that can be replaced, a
            weight is not finite or has no data, or the model has no encoder for the recipe's
            rules. The model is then unchanged.
    """
    recipe = _as_recipe(recipe)
    if not isinstance(model, nn.Module):
        raise ValueError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    lean_encoder = recipe.tokens is not None or recipe.exits is not None
    if not recipe.linear and not lean_encoder:
        raise ValueError(
            'convert: the recipe has no rules; add a [linear."<glob>"], [tokens] or [exits] section'
        )
    _check_quantization(model)
    if why_not_convertible(model) is None:
        raise ValueError(
            f"convert: the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; use lean_kernels.nn.BlockSparseLinear.from_linear"
        )
    matches = _match(model, recipe)
    _check_weights(model, matches)
    if lean_encoder:
        check_rules(model, recipe.tokens, recipe.exits)

    entries = {}
    for done, match in enumerate(matches):
        if progress is not None:
            progress(done, len(matches), match.names[0])
        entries[match.names[0]] = _replace_linear(model, match)
    if progress is not None:
        progress(len(matches), len(matches), "")
    if lean_encoder:
        for place in find_encoders(model):
            install(model, place, recipe.tokens, recipe.exits)
    attach_exits(model)
    now = LeanReport.of(model)
    for entry in now.entries:
        entries.setdefault(entry.name, entry)
    model.lean_report = partial(attached, LeanReport(list(entries.values()), now.encoders))
    store_description(model)
    return model


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: dense layers with the weights the block-sparse ones have, and the
    encoders that were there before. Exit heads are lost.

    Raises:
        ValueError: a layer has an activation and no place in the model to give it back to. The
            model is then unchanged.
    """
    aliases = _aliases(model)
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BlockSparseLinear)
    }
    fused = {name: entry["fused_module"] for name, entry in describe(model)["modules"].items()}
    for name, layer in layers.items():
        if layer.activation is not None and fused[name] is None:
            raise ValueError(
                f"to_dense: {name or type(model).__name__} applies {layer.activation} itself; "
                "replace it by hand with its to_linear() and that activation"
            )
    for name in list(layers):
        layer = layers.pop(name)
        if fused[name] is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, fused[name], activation_module(layer.activation))
        replace(model, aliases[id(layer)], _dense_layer(layer))
    remove(model)
    model.__dict__.pop("lean_report", None)
    model.__dict__.pop("hf_quantizer", None)
    store_description(model)
    return model


def _as_recipe(recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, (str, os.PathLike)):
        return Recipe.from_toml(recipe)
    raise ValueError(
        f"convert: recipe must be a Recipe, a dict or a path, got {type(recipe).__name__}"
    )


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module object."""
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    return aliases


def _match(model: nn.Module, recipe: Recipe) -> list[_Match]:
    """The modules each rule takes, in the order of the model, after all checks on the globs."""
    matches, unusable = [], {glob: [] for glob in recipe.linear}
    usable, linears = set(), []
    shared = _shared_parameters(model)
    for names in _aliases(model).values():
        module = model.get_submodule(names[0])
        matching = [g for g in recipe.linear if any(fnmatch.fnmatchcase(n, g) for n in names if n)]
        reason = _why_not_here(model, names, module)
        if reason is None:
            linears.append(names[0])
        if not matching:
            continue
        reason = reason or _tied_note(names, module, shared)
        if reason is None:
            usable.update(matching)
        else:
            for glob in matching:
                unusable[glob].append(f"{names[0]} ({reason})")
        if reason is None or isinstance(module, nn.Linear) or is_conv1d(module):
            matches.append(_Match(names, recipe.linear[matching[0]], reason))
    for glob in recipe.linear:
        if glob in usable:
            continue
        if unusable[glob]:
            listed = ", ".join(unusable[glob][:5]) + (", ..." if len(unusable[glob]) > 5 else "")
            raise ValueError(
                f"convert: {glob!r} matches only modules that cannot be converted: {listed}; "
                "nn.Linear and transformers' Conv1D can"
            )
        raise ValueError(f"convert: {glob!r} matches no module{_near_misses(glob, linears)}")
    return matches


def _why_not_here(model: nn.Module, names: list[str], module: nn.Module) -> str | None:
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            return f"{type(module).__name__} of a layer whose fused path reads the weight itself"
    return why_not_convertible(module)


def _shared_parameters(model: nn.Module) -> dict[tuple, list[str]]:
    """Names of the parameters that live in the same memory, by that memory."""
    shared: dict[tuple, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(_memory(parameter), []).append(name)
    return shared


def _memory(tensor: torch.Tensor) -> tuple:
    plain = type(tensor) is nn.Parameter and not tensor.is_meta
    pointer = tensor.data_ptr() if plain else 0
    return (tensor.device, pointer) if pointer else (id(tensor),)


def _tied_note(names: list[str], module: nn.Module, shared: dict[tuple, list[str]]) -> str | None:
    for parameter in module.parameters():
        for owner in shared[_memory(parameter)]:
            if owner.rpartition(".")[0] not in names:
                return f"shares a parameter with {owner}, untie it to convert"
    return None


def _near_misses(glob: str, linears: list[str]) -> str:
    if not linears:
        return "; the model has no layer that can be converted"
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in linears)
    close = difflib.get_close_matches(glob, patterns, n=3, cutoff=0.5) or list(patterns)[:3]
    return f"; among those that can be converted are {', '.join(map(repr, close))}"


def _check_weights(model: nn.Module, matches: list[_Match]) -> None:
    for match in matches:
        if match.left_dense is not None:
            continue
        name = match.names[0]
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"convert: {name} is on the meta device; load its weights first")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"convert: the weight of {name} has NaN or infinite values")


def _replace_linear(model: nn.Module, match: _Match) -> Entry:
    name, rule = match.names[0], match.rule
    linear = model.get_submodule(name)
    if match.left_dense is not None:
        return Entry.of(name, linear, match.left_dense)
    weight, shape = dense_weight(linear), rule.block_shape
    if rule.density is None:
        mask = (bsr.block_view(weight, shape) != 0).any(-1).any(-1)
    else:
        mask = magnitude_mask(weight, shape, rule.density)
    density = mask.float().mean().item()
    limit, source = rule.dense_above, "dense_above"
    if limit is None:
        limit = break_even(shape, weight.dtype, weight.device)
        source = f"the break-even measured for {device_kind(weight.device)}"
    if density > limit:
        return Entry.of(name, linear, f"density {density:.3g} is above {limit:.3g}, {source}")
    activation, fused, note = None, None, ""
    if rule.fuse_activation and len(match.names) == 1:
        activation, fused, note = _activation(model, name)
    layer = BlockSparseLinear.from_linear(
        linear, block_shape=shape, mask=mask, activation=activation
    )
    layer.dense_type = type(linear)
    replace(model, match.names, layer)
    if activation is not None:
        setattr(model.get_submodule(name.rpartition(".")[0]), fused, nn.Identity())
    if density == 1 and rule.density is None:
        note = ", ".join(filter(None, (note, "no block is zero: set density to prune")))
    return Entry.of(name, layer, note)


def _activation(model: nn.Module, name: str) -> tuple[str | None, str | None, str]:
    """What to fuse into a layer, the sibling module that does it so far, and a note on it."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    sibling = activation_after(owner, child)
    if sibling is None:
        return None, None, ""
    module = getattr(owner, sibling)
    function = activation_function(module)
    if function is None:
        return None, None, f"{type(module).__name__} is none of the kernels' activations: not fused"
    return function, sibling, f"{function} fused"


def _dense_layer(layer: BlockSparseLinear) -> nn.Module:
    linear = layer.to_linear()
    kind = getattr(layer, "dense_type", nn.Linear)
    if kind is nn.Linear:
        return linear
    with torch.device("meta"):
        conv = kind(layer.out_features, layer.in_features)  # transformers' Conv1D: x W + b
    weight = linear.weight.detach().t().contiguous()
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(layer.training)


def _is_hugging_face(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def _check_quantization(model: nn.Module) -> None:
    if not _is_hugging_face(model):
        return
    stored = getattr(model.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    method = getattr(method, "quant_method", method)
    if method not in (None, "lean"):
        raise ValueError(
            f"convert: the model is quantized with {method!r}; convert it before quantizing, a "
            "checkpoint can describe only one of the two"
        )


def store_description(model: nn.Module) -> None:
    """Keep the description of a Hugging Face model where its save_pretrained will write it."""
    if not _is_hugging_face(model):
        return
    description = describe(model)
    if description["modules"] or "encoders" in description:
        model.config.quantization_config = description
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
