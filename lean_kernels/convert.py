# SPDX-License-Identifier: Apache-2.0
"""Make a model lean, in place, as a recipe says; and dense again."""

import os
from functools import partial

import torch
from torch import nn

from lean_kernels import embedding_kinds, embeddings
from lean_kernels._progress import Progress
from lean_kernels.architectures import (
    activation_after,
    activation_function,
    activation_module,
    find_encoders,
)
from lean_kernels.encoders import attach_exits, check_rules, install, remove
from lean_kernels.matching import Match, aliases, check_weights, match, owners, replace
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.nn.block_sparse_linear import dense_weight, magnitude_mask
from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.ops.block_sparse_linear.break_even import break_even, device_kind
from lean_kernels.recipe import Recipe
from lean_kernels.report import Entry, LeanReport, attached
from lean_kernels.spec import describe, is_conv1d, why_not_convertible

__all__ = ["LeanReport", "convert", "store_description", "to_dense"]


@torch.no_grad()
def convert(
    model: nn.Module,
    recipe: Recipe | dict | str | os.PathLike,
    *,
    tokenizer=None,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace linear layers by block-sparse ones, embeddings by compressed ones, and encoders by
    lean ones, in place.

    Layers go one by one, each dense weight freed before the next. `model.lean_report()` then lists
    what was replaced and what was left dense, and why: a layer whose kept density is above the
    break-even (see `LinearRule.dense_above`) keeps its full weight, and so does one whose weight
    another module shares, such as an output embedding tied to the input embedding. Modules that
    share one layer go on sharing it.

    Compressed embeddings are fitted to the tables before anything is replaced. An output head tied
    to one of them becomes its tied head, see `EmbeddingRule.head`.

    With `[tokens]` or `[exits]` the model's encoder becomes an `nn.LeanEncoder`. Exit heads start
    as copies of the model's own head, and need training. Where the encoder is lean already, it
    takes the rules that the recipe has and keeps the others.

    Args:
        model: any nn.Module; nn.Linear and transformers' Conv1D can be replaced, and the encoders
            of the transformers models in `lean_kernels.architectures`.
        recipe: a Recipe, the same as a dict, or the path of a TOML file.
        tokenizer: of the model; MorphTE takes its tokens apart.
        progress: called as progress(done, total, name) before each layer and once at the end; None
            shows a bar while embeddings are fitted.

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
    if not recipe.linear and not recipe.embedding and not lean_encoder:
        raise ValueError(
            'convert: the recipe has no rules; add a [linear."<glob>"], [embedding."<glob>"], '
            "[tokens] or [exits] section"
        )
    _check_quantization(model)
    if why_not_convertible(model) is None or embeddings.why_not_compressible(model) is None:
        raise ValueError(
            f"convert: the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; use from_linear or from_embedding of a layer in lean_kernels.nn"
        )
    tables = embeddings.find(model, recipe.embedding)
    taken = {id(layer) for found in tables for layer in _replaced(model, found)}
    linears = [
        found
        for found in _linears(model, recipe)
        if id(model.get_submodule(found.names[0])) not in taken
    ]
    check_weights(model, tables + linears)
    if lean_encoder:
        check_rules(model, recipe.tokens, recipe.exits)

    total, fitted = len(tables) + len(linears), []
    for done, found in enumerate(tables):
        fitted.append(_fit(model, found, tokenizer, _within(progress, done, total, found.names[0])))
    entries = {}
    for done, found in enumerate(linears, len(tables)):
        if progress is not None:
            progress(done, total, found.names[0])
        entries[found.names[0]] = _replace_linear(model, found)
    for found in tables:
        embeddings.install(model, found.names[0], fitted.pop(0), head=found.rule.head)
    embeddings.fuse_blocks(model)
    if progress is not None:
        progress(total, total, "")
    if lean_encoder:
        for place in find_encoders(model):
            install(model, place, recipe.tokens, recipe.exits)
    attach_exits(model)
    now = LeanReport.of(model)
    for entry in now.entries:
        entries.setdefault(entry.name, entry)
    report = LeanReport(list(entries.values()), now.encoders, now.embeddings)
    model.lean_report = partial(attached, report)
    store_description(model)
    return model


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: dense layers with the weights the block-sparse ones have, dense
    embeddings with the rows the compressed ones make, the encoders that were there before. Exit
    heads are lost.

    Raises:
        ValueError: a layer has an activation and no place in the model to give it back to. The
            model is then unchanged.
    """
    names = aliases(model)
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BlockSparseLinear)
    }
    described = describe(model)["modules"]
    fused = {name: described[name]["fused_module"] for name in layers}
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
        replace(model, names[id(layer)], _dense_layer(layer))
    embeddings.remove(model)
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


def _replaced(model: nn.Module, found: Match) -> list[nn.Module]:
    """The module that a rule takes, and the heads that change with it."""
    module = model.get_submodule(found.names[0])
    return [module, *embeddings.tied_heads(model, module)]


def _fit(model: nn.Module, found: Match, tokenizer, progress: Progress | None):
    try:
        return embedding_kinds.fit(
            found.rule, model.get_submodule(found.names[0]), tokenizer, progress
        )
    except ValueError as error:
        raise ValueError(f"convert: {found.names[0]}: {error}") from None


def _within(progress: Progress | None, done: int, total: int, name: str) -> Progress | None:
    """Progress of one step of `total`, told as the name of that step."""
    if progress is None:
        return None

    def inner(part: int, parts: int, what: str) -> None:
        progress(done, total, f"{name}: {what}, {part} of {parts}" if what else name)

    return inner


def _linears(model: nn.Module, recipe: Recipe) -> list[Match]:
    """The linear layers each rule takes."""
    if not recipe.linear:
        return []
    owners_of = owners(model)

    def why_not(names: list[str], module: nn.Module) -> str | None:
        return _why_not_here(model, names, module) or _tied_note(names, owners_of(module))

    def listed(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d(module)

    matches = match(model, recipe.linear, why_not, listed, "nn.Linear and transformers' Conv1D can")
    for found in matches:
        name, to_int8 = found.names[0], found.left_dense is None and found.rule.dtype == "int8"
        if to_int8 and model.get_submodule(name).weight.dtype == torch.float64:
            raise ValueError(f'convert: {name}: dtype "int8" takes no float64 weight; use .float()')
    return matches


def _why_not_here(model: nn.Module, names: list[str], module: nn.Module) -> str | None:
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            return f"{type(module).__name__} of a layer whose fused path reads the weight itself"
    return why_not_convertible(module)


def _tied_note(names: list[str], parameters: list[str]) -> str | None:
    for owner in parameters:
        if owner.rpartition(".")[0] not in names:
            return f"shares a parameter with {owner}, untie it to convert"
    return None


def _replace_linear(model: nn.Module, match: Match) -> Entry:
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
    if limit is None and rule.dtype == "int8":
        limit = 1.0  # it was faster than dense float32 at every density
    elif limit is None:
        limit = break_even(shape, weight.dtype, weight.device)
        source = f"the break-even measured for {device_kind(weight.device)}"
    if density > limit:
        return Entry.of(name, linear, f"density {density:.3g} is above {limit:.3g}, {source}")
    stored = int(mask.sum()) * shape[0] * shape[1]
    if stored > 2 * weight.numel():
        why = f"blocks of {shape[0]}x{shape[1]} would hold {stored} numbers, most of them padding"
        return Entry.of(name, linear, f"{why}: the layer has {weight.numel()}")
    activation, fused, note = None, None, ""
    if rule.fuse_activation and len(match.names) == 1:
        activation, fused, note = _activation(model, name)
    layer = BlockSparseLinear.from_linear(
        linear, block_shape=shape, mask=mask, activation=activation, weight_dtype=rule.dtype
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


def _quantized_by(model: nn.Module):
    stored = getattr(model.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    return getattr(method, "quant_method", method)


def _check_quantization(model: nn.Module) -> None:
    if not _is_hugging_face(model):
        return
    method = _quantized_by(model)
    if method not in (None, "lean"):
        raise ValueError(
            f"convert: the model is quantized with {method!r}; convert it before quantizing, a "
            "checkpoint can describe only one of the two"
        )


def store_description(model: nn.Module) -> dict:
    """Keep the description of a Hugging Face model where its save_pretrained will write it; of each
    one within a module of another kind."""
    embeddings.mark(model)
    description = describe(model)
    if not _is_hugging_face(model):
        for child in model.children():
            store_description(child)
        return description
    method = _quantized_by(model)
    if method not in (None, "lean"):
        return description  # a part of the model that `convert` did not touch
    if description["modules"] or "encoders" in description:
        model.config.quantization_config = description
    elif method == "lean":
        del model.config.quantization_config
    return description
