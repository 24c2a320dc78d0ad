# SPDX-License-Identifier: Apache-2.0
"""The description of a lean model that is saved beside its weights, and the model built from it.

`describe` writes it, `rebuild` puts lean encoders, compressed embeddings and block-sparse layers,
the latter two unset, into a dense model as it says. Both take any nn.Module; README, "File format",
says what each key means.
"""

from torch import Tensor, nn

from lean_kernels import embedding_kinds, embeddings
from lean_kernels.architectures import activation_after, activation_function, find_encoders
from lean_kernels.encoders import (
    attach_exits,
    check_rules,
    describe_encoders,
    install,
    read_rules,
)
from lean_kernels.matching import aliases, replace
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear import bsr, int8, op

FORMAT_VERSION = 3
FLOATS = embedding_kinds.FLOATS
_KIND = "block_sparse_linear"
_KEYS = {
    "kind": str,
    "in_features": int,
    "out_features": int,
    "block_shape": list,
    "nnz": int,
    "bias": bool,
    "activation": (str, type(None)),
    "fused_module": (str, type(None)),
}
_EMBEDDING_KEYS = {"kind": str, "head": bool}


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: x W + b, W [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def why_not_convertible(module: nn.Module) -> str | None:
    """None for an nn.Linear or a transformers Conv1D of a dtype the kernels have, else a reason."""
    name = type(module).__name__
    if isinstance(module, BlockSparseLinear):
        return f"{name}, block-sparse already"
    if type(module) is not nn.Linear and not is_conv1d(module):
        subclass = "a subclass of nn.Linear that may use its weight in its own way"
        return f"{name}, {subclass}" if isinstance(module, nn.Linear) else name
    if type(module.weight) not in (nn.Parameter, Tensor) or module.weight.dtype not in op.DTYPES:
        kind = type(module.weight).__name__
        return f"{name} with a weight of type {kind}, {module.weight.dtype}"
    return None


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return linear.weight.shape[1], linear.weight.shape[0]


def describe(model: nn.Module) -> dict:
    """The saved description of the lean layers of `model`: plain lists, dicts, numbers, strings."""
    modules = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BlockSparseLinear):
            continue
        parent, _, child = name.rpartition(".")
        fused = activation_after(model.get_submodule(parent), child) if layer.activation else None
        if fused and not isinstance(model.get_submodule(parent).get_submodule(fused), nn.Identity):
            fused = None
        modules[name] = {
            "kind": _KIND,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "block_shape": list(layer.block_shape),
            "nnz": layer.nnz,
            "bias": layer.bias is not None,
            "activation": layer.activation,
            "fused_module": fused,
        }
        if layer.weight_scales is not None:
            modules[name]["int8"] = True
    for name, layer in embeddings.compressed(model).items():
        modules[name] = embedding_kinds.describe(embeddings.table_of(layer)) | {
            "head": embeddings.owns_table(layer)
        }
    encoders = describe_encoders(model)
    version = version_of(modules, encoders)
    description = {"quant_method": "lean", "format_version": version, "modules": modules}
    return description | ({"encoders": encoders} if encoders else {})


def version_of(modules: dict, encoders: dict | None) -> int:
    """The first format version that can say this."""
    if any(
        entry.get("kind") in embedding_kinds.KINDS or "int8" in entry for entry in modules.values()
    ):
        return 3
    return 2 if encoders else 1


def tensors_of(entry: dict) -> dict[str, tuple[str, ...]]:
    """The tensors of a layer by name within it, and what safetensors may call their dtype."""
    if entry["kind"] == _KIND:
        tensors = {"crow_indices": ("I32",), "col_indices": ("I32",)}
        tensors["weight"] = ("I8",) if "int8" in entry else FLOATS
        if "int8" in entry:
            tensors["weight_scales"] = ("F32",)
        return tensors | ({"bias": FLOATS} if entry["bias"] else {})
    tensors = embedding_kinds.tensors(entry)
    if entry["head"]:
        tensors = {f"embedding.{name}": dtypes for name, dtypes in tensors.items()}
        tensors["bias"] = FLOATS
    return tensors | {"weight": FLOATS}


def check(modules: dict, encoders: dict | None = None) -> None:
    """Raise ValueError unless both tables, from a file of unknown origin, are well formed."""
    if encoders is not None:
        read_rules(encoders)
    if not isinstance(modules, dict) or not (modules or encoders):
        raise ValueError(f"lean model: modules must be a non-empty table, got {modules!r}")
    for name, entry in modules.items():
        where = f"lean model: module {name!r}"
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind in embedding_kinds.KINDS:
            _check_keys(where, entry, _EMBEDDING_KEYS | embedding_kinds.keys(kind))
            try:
                embedding_kinds.check(entry)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        else:
            is_int8 = isinstance(entry, dict) and entry.get("int8") is True
            _check_keys(where, entry, _KEYS | ({"int8": bool} if is_int8 else {}))
            _check_linear(where, entry)


def _check_keys(where: str, entry: dict, keys: dict) -> None:
    if not isinstance(entry, dict) or entry.keys() != keys.keys():
        raise ValueError(f"{where} must have exactly the keys {list(keys)}, got {entry!r}")
    for key, expected in keys.items():
        value = entry[key]
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise ValueError(f"{where}: {key} has the wrong type, got {value!r}")


def _check_linear(where: str, entry: dict) -> None:
    if entry["kind"] != _KIND:
        expected = ", ".join(map(repr, (_KIND, *embedding_kinds.KINDS)))
        raise ValueError(f"{where}: unknown kind {entry['kind']!r}; expected one of {expected}")
    if entry["activation"] not in op.ACTIVATIONS:
        raise ValueError(
            f"{where}: unknown activation {entry['activation']!r}; expected one of {op.ACTIVATIONS}"
        )
    shape, block = (entry["out_features"], entry["in_features"]), entry["block_shape"]
    if len(block) != 2 or any(type(size) is not int or size < 1 for size in (*block, *shape)):
        raise ValueError(f"{where}: sizes must be positive integers, got {shape} in {block}")
    if "int8" in entry:
        int8.check_block_shape(tuple(block), where)
    rows, cols = bsr.grid(*shape, tuple(block))
    if not 0 <= entry["nnz"] <= rows * cols:
        raise ValueError(
            f"{where}: nnz must lie in [0, {rows * cols}] for a {rows} x {cols} grid of blocks, "
            f"got {entry['nnz']}"
        )


def rebuild(
    model: nn.Module, modules: dict, encoders: dict | None = None, *, partial: bool = False
) -> dict[str, str]:
    """Replace the linears that `modules` names by block-sparse layers and the embeddings by
    compressed ones, all unset, and the encoders that `encoders` names by lean ones.

    Names carry over between a Hugging Face base model and one with a head, as its weights do.

    Args:
        model: the dense model; `modules` must fit it, and is checked before it is touched.
        modules: `describe(...)["modules"]`.
        encoders: `describe(...)["encoders"]`, None where it has none.
        partial: pass over modules and exits that `model` does not have, so long as it has some.

    Returns:
        Name in `model` of each layer built, to its name in `modules`.

    Raises:
        ValueError: malformed, or not a description of this model.
    """
    check(modules, encoders)
    encoders, prefix = encoders or {}, getattr(model, "base_model_prefix", "")
    # A base model saved out of one with a head shares its config, and so that one's description.
    if prefix and not hasattr(model, prefix):
        partial = partial or any(n.startswith(f"{prefix}.") for n in (*modules, *encoders))
    _rebuild_encoders(model, encoders, partial)
    names, found = aliases(model), dict(model.named_modules(remove_duplicate=False))
    plan = {}
    for saved, entry in modules.items():
        name = _resolve(saved, found, prefix)
        if name is not None:
            _check_fits(found, name, entry)
            plan[name] = saved
        elif not partial:
            raise ValueError(f"lean model: {type(model).__name__} has no module {saved!r}")
    if modules and not plan:
        raise ValueError(f"lean model: {type(model).__name__} has none of its lean layers")
    for name, saved in plan.items():
        entry, dense = modules[saved], found[name]
        if entry["kind"] != _KIND:
            embeddings.install(model, name, embedding_kinds.build(entry, dense))
            continue
        layer = BlockSparseLinear(
            entry["in_features"],
            entry["out_features"],
            entry["nnz"],
            block_shape=tuple(entry["block_shape"]),
            bias=entry["bias"],
            activation=entry["activation"],
            weight_dtype="int8" if "int8" in entry else None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        layer.dense_type = type(dense)
        replace(model, names[id(dense)], layer.train(dense.training))
        if entry["fused_module"] is not None:
            parent = name.rpartition(".")[0]
            setattr(model.get_submodule(parent), entry["fused_module"], nn.Identity())
    attach_exits(model)
    return plan


def _rebuild_encoders(model: nn.Module, encoders: dict, partial: bool) -> None:
    places = {place.name: place for place in find_encoders(model)}
    prefix = getattr(model, "base_model_prefix", "")
    for saved, (tokens, exit_rule) in read_rules(encoders).items():
        name = _resolve(saved, places, prefix)
        if name is None:
            if partial:
                continue
            raise ValueError(f"lean model: {type(model).__name__} has no encoder {saved!r}")
        if partial and places[name].classifier is None:
            exit_rule = None
        try:
            check_rules(model, tokens, exit_rule)
        except ValueError as error:
            raise ValueError(f"lean model: encoder {saved!r}: {error}") from None
        install(model, places[name], tokens, exit_rule)


def _resolve(name: str, found: dict, prefix: str) -> str | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate and candidate in found:
            return candidate
    return None


def _check_fits(found: dict[str, nn.Module], name: str, entry: dict) -> None:
    linear, where = found[name], f"lean model: module {name!r}"
    if entry["kind"] != _KIND:
        _check_table_fits(where, linear, entry)
        return
    if (reason := why_not_convertible(linear)) is not None:
        raise ValueError(f"{where} must be a linear layer in the dense model, it is {reason}")
    shape = (entry["out_features"], entry["in_features"])
    if linear_shape(linear) != shape or (linear.bias is not None) != entry["bias"]:
        raise ValueError(
            f"{where} is saved as out x in features {shape}, bias {entry['bias']}; the dense model "
            f"has {linear_shape(linear)}, bias {linear.bias is not None}"
        )
    if entry["fused_module"] is not None:
        parent = name.rpartition(".")[0]
        replaced = found.get(f"{parent}.{entry['fused_module']}".lstrip("."))
        if entry["activation"] is None or activation_function(replaced) != entry["activation"]:
            raise ValueError(
                f"{where} is said to run {entry['fused_module']!r} as {entry['activation']!r}, but "
                f"there the dense model has {type(replaced).__name__}"
            )


def _check_table_fits(where: str, dense: nn.Module, entry: dict) -> None:
    expected, kind = (
        (nn.Linear, "an output head") if entry["head"] else (nn.Embedding, "an embedding")
    )
    reason = embeddings.why_not_compressible(dense)
    if reason is not None or not isinstance(dense, expected):
        got = reason or type(dense).__name__
        raise ValueError(f"{where} must be {kind} in the dense model, it is {got}")
    shape = (entry["num_embeddings"], entry["embedding_dim"])
    if tuple(dense.weight.shape) != shape:
        raise ValueError(
            f"{where} is saved as a table of {shape}, the dense model has "
            f"{tuple(dense.weight.shape)}"
        )
