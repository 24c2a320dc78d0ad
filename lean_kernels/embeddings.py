# SPDX-License-Identifier: Apache-2.0
"""Put compressed embeddings, and the heads tied to them, into a model, and take them out again.

A head is tied where it has the embedding's own table, as transformers ties them. It then refers to
the compressed embedding without owning it, so that nothing is stored twice. A head that has a table
of its own can be compressed by itself, and owns the embedding that its rows come from.
"""

from functools import partial

import torch
from torch import nn

from lean_kernels import embedding_kinds as kinds
from lean_kernels.architectures import is_embeddings_block
from lean_kernels.embedding_rule import EmbeddingRule
from lean_kernels.matching import Match, aliases, match, owners, replace
from lean_kernels.nn import LowRankEmbedding
from lean_kernels.nn.compressed_embedding import CompressedEmbedding, TiledHead
from lean_kernels.nn.lean_embeddings import LeanEmbeddings

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_THESE_CAN = "nn.Embedding can, and an output head that is not tied to one"


def compressed(model: nn.Module) -> dict[str, CompressedEmbedding | TiledHead]:
    """The compressed embeddings of `model`, and its heads that own one, by name."""
    found = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if owns_table(module) or (
            isinstance(module, CompressedEmbedding) and not (name and owns_table(parent))
        ):
            found[name] = module
    return found


def owns_table(module: nn.Module) -> bool:
    """Whether this is a compressed head that is not tied."""
    return isinstance(module, TiledHead) and "embedding" in module._modules


def table_of(module: CompressedEmbedding | TiledHead) -> CompressedEmbedding:
    """The embedding whose rows are the table."""
    return module.embedding if isinstance(module, TiledHead) else module


def heads_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """The names of the heads tied to a compressed embedding of the model."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, TiledHead) and module.embedding is layer
    ]


def find(model: nn.Module, rules: dict[str, EmbeddingRule]) -> list[Match]:
    """The tables each rule takes. Raises ValueError, which says why, where one cannot work."""
    if not rules:
        return []
    owners_of, head = owners(model), _output_head(model)

    def why_not(names: list[str], module: nn.Module) -> str | None:
        if type(module) is nn.Linear and module is not head:
            return "Linear"
        return why_not_compressible(module) or _why_not_shared(model, names, module, owners_of)

    matches = match(model, rules, why_not, lambda module: False, _THESE_CAN)
    for found in matches:
        weight = model.get_submodule(found.names[0]).weight
        try:
            kinds.check_rule(found.rule, *weight.shape)
        except ValueError as error:
            raise ValueError(f"convert: {found.names[0]}: {error}") from None
    return matches


def why_not_compressible(module: nn.Module) -> str | None:
    """None for an nn.Embedding, or an nn.Linear if it should be a head, else a reason."""
    name = type(module).__name__
    if isinstance(module, (CompressedEmbedding, TiledHead)):
        return f"{name}, compressed already"
    if type(module) not in (nn.Embedding, nn.Linear):
        subclass = "a subclass of nn.Embedding that may use its weight in its own way"
        return f"{name}, {subclass}" if isinstance(module, nn.Embedding) else name
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in _DTYPES:
        return f"{name} with a weight of type {type(module.weight).__name__}, {module.weight.dtype}"
    if getattr(module, "max_norm", None) is not None:
        return f"{name} with max_norm, which rescales stored rows"
    return None


def tied_heads(model: nn.Module, table: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weight is the table's own parameter, or will be: transformers loads
    into models that it ties afterwards."""
    names, targets = dict(model.named_modules(remove_duplicate=False)), set()
    for prefix, module in names.items():
        for target, source in (getattr(module, "all_tied_weights_keys", None) or {}).items():
            target, source = (_within(prefix, key).rpartition(".") for key in (target, source))
            if target[2] == source[2] == "weight" and names.get(source[0]) is table:
                targets.add(id(names[target[0]]))
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and (module.weight is table.weight or id(module) in targets)
    ]


def _within(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def install(model: nn.Module, name: str, layer: CompressedEmbedding, *, head: bool = True) -> None:
    """Replace the embedding or head called `name` by its compressed form.

    Args:
        head: whether heads that are tied to the embedding follow it. Otherwise they get a copy of
            the dense table.
    """
    names, dense = aliases(model), model.get_submodule(name)
    if not dense.weight.requires_grad:
        layer.requires_grad_(False)
    if isinstance(dense, nn.Linear):
        replace(model, names[id(dense)], layer.tied_head(dense.bias).train(dense.training))
        mark(model)
        return
    heads = tied_heads(model, dense)
    replace(model, names[id(dense)], layer.train(dense.training))
    for linear in heads:
        if head:
            tied = layer.tied_head(linear.bias).train(linear.training)
            # The model owns the embedding: as a submodule of both it would be saved twice.
            tied.__dict__["embedding"] = tied._modules.pop("embedding")
            replace(model, names[id(linear)], tied)
        else:
            # The bias too: BERT's is tied to another parameter if and only if the table is.
            for key, parameter in list(linear._parameters.items()):
                if parameter is not None:
                    setattr(linear, key, nn.Parameter(parameter.detach().clone()))
    mark(model)
    if heads and not head and hasattr(model, "config"):
        model.config.tie_word_embeddings = False
    _tell_transformers(model, {n for linear in heads for n in names[id(linear)]})


def fuse_blocks(model: nn.Module) -> None:
    """Where word embeddings are BERT's, let one call make the whole embeddings block."""
    for name, block in list(model.named_modules()):
        if not (name and is_embeddings_block(block)):
            continue
        if isinstance(block.word_embeddings, LowRankEmbedding):
            fused = LeanEmbeddings(block)
            fused.replaced = (block,)  # in a tuple, which hides it from modules()
            replace(model, [name], fused)


def mark(model: nn.Module) -> None:
    """Give what is compressed, and what is tied to it, the `weight` that transformers expects, as
    [num_embeddings, 0].

    In a file it makes transformers without our import stop at its shape, where otherwise it would
    initialise a table that the file does not have. A tied head's is not saved.
    """
    saved = {id(module) for module in compressed(model).values()}
    for module in model.modules():
        tied = isinstance(module, TiledHead) and id(module) not in saved
        if (tied or id(module) in saved) and not hasattr(module, "weight"):
            layer = table_of(module)
            example = next(p for p in layer.parameters() if p.is_floating_point())
            empty = example.new_empty(layer.num_embeddings, 0)
            module.register_buffer("weight", empty, persistent=not tied)


def _tell_transformers(model: nn.Module, heads: set[str]) -> None:
    """Its models tie parameters by name, and resize tables that are stored."""
    for prefix, module in model.named_modules():
        if not hasattr(module, "all_tied_weights_keys"):
            continue
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute) or {}
            left = {
                target: source
                for target, source in ties.items()
                if _within(prefix, target) not in {f"{head}.weight" for head in heads}
            }
            if left != ties:
                setattr(module, attribute, left)
        if isinstance(_input_embedding(module), CompressedEmbedding):
            module.resize_token_embeddings = partial(_refuse_to_resize, module)


def _refuse_to_resize(model: nn.Module, new_num_tokens: int | None = None, *args, **kwargs):
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, CompressedEmbedding):
        return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
    if new_num_tokens in (None, embedding.num_embeddings) and not args and not kwargs:
        return embedding
    raise ValueError(
        f"resize_token_embeddings: the table is a {type(embedding).__name__} of "
        f"{embedding.num_embeddings} rows, which cannot be resized; resize the dense model and "
        "convert it again (lean_kernels.convert.to_dense goes back)"
    )


def remove(model: nn.Module) -> None:
    """Put dense embeddings and heads with the same rows back."""
    changed = False
    for module in compressed(model).values():
        names, changed = aliases(model), True
        embedding = table_of(module).to_embedding()
        embedding.weight.requires_grad_(next(table_of(module).parameters()).requires_grad)
        heads = [model.get_submodule(head) for head in heads_of(model, module)]
        if isinstance(module, TiledHead):
            replace(model, names[id(module)], _dense_head(module, embedding))
        else:
            replace(model, names[id(module)], embedding)
        for head in heads:
            replace(model, names[id(head)], _dense_head(head, embedding))
    for name, fused in list(model.named_modules()):
        if isinstance(fused, LeanEmbeddings) and hasattr(fused, "replaced"):
            (block,) = fused.replaced
            block._modules.update(fused._modules)
            replace(model, [name], block.train(fused.training))
    if changed:
        for module in model.modules():
            if hasattr(module, "all_tied_weights_keys"):
                for attribute in ("_tied_weights_keys", "resize_token_embeddings"):
                    module.__dict__.pop(attribute, None)
                module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(True)


def _dense_head(head: TiledHead, embedding: nn.Embedding) -> nn.Linear:
    linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    linear.weight, linear.bias = embedding.weight, head.bias
    return linear.train(head.training)


def _why_not_shared(model, names: list[str], module: nn.Module, owners_of) -> str | None:
    heads = {id(head) for head in tied_heads(model, module)}
    for owner in owners_of(module):
        name = owner.rpartition(".")[0]
        if name in names or owner.rpartition(".")[2] == "bias":
            continue
        if isinstance(module, nn.Linear):
            return f"tied to {name}, which it follows"
        if id(model.get_submodule(name)) not in heads:
            return f"shares its table with {owner}, untie it to convert"
    return None


def _output_head(model: nn.Module) -> nn.Module | None:
    find_head = getattr(model, "get_output_embeddings", None)
    return None if find_head is None else find_head()


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
