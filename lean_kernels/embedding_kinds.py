# SPDX-License-Identifier: Apache-2.0
"""The kinds of compressed embeddings: how each is fitted, what a file says of it, how it is built.

An entry is what a file says of one of them; README, "File format", tells its keys. Fitting and
loading make layers in the same way: an entry, and the tensors under their names in the layer.
"""

import math

import torch
from torch import Tensor, nn

from lean_kernels._progress import Progress
from lean_kernels.compress import embedding as fits
from lean_kernels.compress.morphemes import build_morphemes, read_morphemes
from lean_kernels.embedding_rule import EmbeddingRule
from lean_kernels.nn import (
    AutoencoderEmbedding,
    LowRankEmbedding,
    MorphTEEmbedding,
    TensorTrainEmbedding,
)
from lean_kernels.nn.compressed_embedding import CompressedEmbedding
from lean_kernels.nn.low_rank_embedding import quantize_rows
from lean_kernels.nn.morphte_embedding import least_factor_size

_SIZES = {"num_embeddings": int, "embedding_dim": int}
FLOATS = ("F64", "F32", "F16", "BF16")
_NONE = type(None)


class _LowRank:
    """codes [V, r] and decoder [D, r]: SVD, and autoencoders."""

    NAME = "low_rank_embedding"
    KEYS = _SIZES | {"rank": int, "activation": (str, _NONE), "bias": bool, "int8": bool}

    @staticmethod
    def owns(layer: nn.Module) -> bool:
        return isinstance(layer, LowRankEmbedding)

    @staticmethod
    def describe(layer: LowRankEmbedding) -> dict:
        return {
            "rank": layer.rank,
            "activation": layer.activation,
            "bias": layer.bias is not None,
            "int8": layer.scales is not None,
        }

    @staticmethod
    def check(entry: dict) -> None:
        if entry["activation"] not in LowRankEmbedding.ACTIVATIONS:
            raise ValueError(
                f"unknown activation {entry['activation']!r}; expected one of "
                f"{LowRankEmbedding.ACTIVATIONS}"
            )
        _check_rank(entry["rank"], entry["num_embeddings"], entry["embedding_dim"])

    @staticmethod
    def tensors(entry: dict) -> dict[str, tuple[str, ...]]:
        return (
            {"codes": ("I8",) if entry["int8"] else FLOATS, "decoder": FLOATS}
            | ({"scales": FLOATS} if entry["int8"] else {})
            | ({"bias": FLOATS} if entry["bias"] else {})
        )

    @staticmethod
    def build(entry: dict, **options) -> LowRankEmbedding:
        kind = AutoencoderEmbedding if entry["bias"] else LowRankEmbedding
        return kind(
            entry["num_embeddings"],
            entry["embedding_dim"],
            entry["rank"],
            activation=entry["activation"],
            int8=entry["int8"],
            **options,
        )

    @staticmethod
    def count(entry: dict, size: int) -> tuple[int, str]:
        rows, columns, rank = entry["num_embeddings"], entry["embedding_dim"], entry["rank"]
        codes, text = rows * rank * size, "V r + D r"
        if entry["int8"]:
            codes, text = rows * (rank + 4), "V r (int8) + V (float32) + D r"
        bias = columns if entry["bias"] else 0
        return codes + (columns * rank + bias) * size, text + (" + D" if bias else "")

    @staticmethod
    def fit(rule: EmbeddingRule, weight: Tensor, tokenizer, progress: Progress | None):
        found = {"rank": rule.rank, "activation": rule.activation}
        if rule.kind == "low_rank":
            tensors = dict(zip(("codes", "decoder"), fits.fit_svd(weight, rule.rank), strict=True))
        else:
            options = _training(rule, weight, tokenizer)
            options |= {"activation": rule.activation, "progress": progress}
            fitted = fits.fit_autoencoder(weight, rule.rank, **options)
            tensors = dict(zip(("codes", "decoder", "bias"), fitted, strict=True))
        if rule.dtype == "int8":
            tensors["codes"], tensors["scales"] = quantize_rows(tensors["codes"])
        return found | {"bias": "bias" in tensors, "int8": "scales" in tensors}, tensors


class _MorphTE:
    """Sums of tensor products of morpheme factors [M, r, q]."""

    NAME = "tensor_product_embedding"
    KEYS = _SIZES | {
        "order": int,
        "rank": int,
        "num_morphemes": int,
        "factor_size": int,
        "layer_norm": bool,
    }

    @staticmethod
    def owns(layer: nn.Module) -> bool:
        return isinstance(layer, MorphTEEmbedding)

    @staticmethod
    def describe(layer: MorphTEEmbedding) -> dict:
        return {
            "rank": layer.rank,
            "order": layer.order,
            "num_morphemes": layer.num_morphemes,
            "factor_size": layer.factors.shape[2],
            "layer_norm": layer.layer_norm is not None,
        }

    @staticmethod
    def check(entry: dict) -> None:
        if entry["order"] not in (2, 3, 4):
            raise ValueError(f"order must be 2, 3 or 4, got {entry['order']}")
        most = entry["num_embeddings"] * entry["order"]
        if not 1 <= entry["num_morphemes"] <= most:
            raise ValueError(f"num_morphemes must lie in [1, {most}], got {entry['num_morphemes']}")
        columns, size = entry["embedding_dim"], entry["factor_size"]
        if not least_factor_size(columns, entry["order"]) <= size <= columns:
            raise ValueError(
                f"factor_size^order must be at least embedding_dim, {columns}, and factor_size at "
                f"most that, got {size}"
            )

    @staticmethod
    def tensors(entry: dict) -> dict[str, tuple[str, ...]]:
        norm = {"layer_norm.weight": FLOATS, "layer_norm.bias": FLOATS}
        return {"factors": FLOATS, "morphemes": ("I32",)} | (norm if entry["layer_norm"] else {})

    @staticmethod
    def build(entry: dict, *, device, dtype, **options) -> MorphTEEmbedding:
        shape = entry["num_embeddings"], entry["order"]
        padding_idx = options.pop("padding_idx", None)
        layer = MorphTEEmbedding(
            torch.zeros(shape, dtype=torch.int32, device=device),
            entry["embedding_dim"],
            order=entry["order"],
            rank=entry["rank"],
            num_morphemes=entry["num_morphemes"],
            factor_size=entry["factor_size"],
            layer_norm=entry["layer_norm"],
            device=device,
            dtype=dtype,
            **options,
        )
        layer.padding_idx = padding_idx  # given before, it reads the morphemes, which are unset
        return layer

    @staticmethod
    def count(entry: dict, size: int) -> tuple[int, str]:
        factors = entry["num_morphemes"] * entry["rank"] * entry["factor_size"]
        norm, text = (2 * entry["embedding_dim"], " + 2 D") if entry["layer_norm"] else (0, "")
        indices = 4 * entry["num_embeddings"] * entry["order"]
        return (factors + norm) * size + indices, f"M r q + V n (int32){text}"

    @staticmethod
    def fit(rule: EmbeddingRule, weight: Tensor, tokenizer, progress: Progress | None):
        options = {"order": rule.order, "num_embeddings": len(weight)}
        if rule.morphemes is not None:
            morphemes, _ = read_morphemes(rule.morphemes, tokenizer=tokenizer, **options)
        elif tokenizer is not None:
            options |= {"seed": rule.seed, "progress": progress}
            morphemes, _ = build_morphemes(tokenizer, **options)
        else:
            raise ValueError(
                "kind 'morphte' takes the tokens apart: pass convert(..., tokenizer=...), or name "
                "a JSON file with `morphemes`"
            )
        options = _training(rule, weight, tokenizer)
        options |= {"layer_norm": rule.layer_norm, "progress": progress}
        factors, scale, shift = fits.fit_morphte(weight, morphemes, rule.rank, **options)
        tensors = {"factors": factors, "morphemes": morphemes}
        if rule.layer_norm:
            tensors |= {"layer_norm.weight": scale, "layer_norm.bias": shift}
        found = {"order": rule.order, "layer_norm": rule.layer_norm}
        sizes = zip(("num_morphemes", "rank", "factor_size"), factors.shape, strict=True)
        return found | dict(sizes), tensors


class _TensorTrain:
    """Cores [v_k, r_k-1, d_k, r_k] of a tensor train."""

    NAME = "tensor_train_embedding"
    KEYS = _SIZES | {"ranks": list, "row_factors": list, "col_factors": list}

    @staticmethod
    def owns(layer: nn.Module) -> bool:
        return isinstance(layer, TensorTrainEmbedding)

    @staticmethod
    def describe(layer: TensorTrainEmbedding) -> dict:
        return {
            "ranks": list(layer.ranks[1:-1]),
            "row_factors": list(layer.row_factors),
            "col_factors": list(layer.col_factors),
        }

    @staticmethod
    def check(entry: dict) -> None:
        order = len(entry["row_factors"])
        lengths = {"ranks": order - 1, "row_factors": order, "col_factors": order}
        for key, length in lengths.items():
            numbers = entry[key]
            if len(numbers) != length or any(type(n) is not int or n < 1 for n in numbers):
                raise ValueError(f"{key} must be {length} positive integers, got {numbers}")
        # No more of anything than the table has, so that no file asks for more memory than that.
        for key, size in (("row_factors", "num_embeddings"), ("col_factors", "embedding_dim")):
            if max(entry[key]) > entry[size]:
                raise ValueError(f"{key} must be at most {size}, {entry[size]}, got {entry[key]}")
        if max(entry["ranks"]) > entry["num_embeddings"] * entry["embedding_dim"]:
            raise ValueError(f"ranks are larger than the table: {entry['ranks']}")

    @staticmethod
    def tensors(entry: dict) -> dict[str, tuple[str, ...]]:
        return {f"cores.{k}": FLOATS for k in range(len(entry["row_factors"]))}

    @staticmethod
    def build(entry: dict, **options) -> TensorTrainEmbedding:
        return TensorTrainEmbedding(
            entry["num_embeddings"],
            entry["embedding_dim"],
            rank=entry["ranks"],
            order=len(entry["row_factors"]),
            row_factors=entry["row_factors"],
            col_factors=entry["col_factors"],
            **options,
        )

    @staticmethod
    def count(entry: dict, size: int) -> tuple[int, str]:
        ranks = [1, *entry["ranks"], 1]
        axes = zip(entry["row_factors"], ranks, entry["col_factors"], ranks[1:], strict=False)
        return size * sum(math.prod(core) for core in axes), "sum of v r d r'"

    @staticmethod
    def fit(rule: EmbeddingRule, weight: Tensor, tokenizer, progress: Progress | None):
        cores = fits.fit_tensor_train(weight, rule.rank, order=rule.order)
        found = {
            "ranks": [core.shape[3] for core in cores[:-1]],
            "row_factors": [core.shape[0] for core in cores],
            "col_factors": [core.shape[2] for core in cores],
        }
        return found, {f"cores.{k}": core for k, core in enumerate(cores)}


_KINDS = {kind.NAME: kind for kind in (_LowRank, _MorphTE, _TensorTrain)}
_OF_RULE = {
    "low_rank": _LowRank,
    "autoencoder": _LowRank,
    "morphte": _MorphTE,
    "tensor_train": _TensorTrain,
}
KINDS = tuple(_KINDS)


def check_rule(rule: EmbeddingRule, rows: int, columns: int) -> None:
    """Raise ValueError unless a table of that size can become what the rule says."""
    if _OF_RULE[rule.kind] is _LowRank:
        _check_rank(rule.rank, rows, columns)


def fit(
    rule: EmbeddingRule, dense: nn.Module, tokenizer, progress: Progress | None
) -> CompressedEmbedding:
    """The compressed form of the weight of an nn.Embedding or of an output head."""
    weight, kind = dense.weight.detach(), _OF_RULE[rule.kind]
    found, tensors = kind.fit(rule, weight, tokenizer, progress)
    sizes = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    layer = build({"kind": kind.NAME} | sizes | found, dense)
    layer.load_state_dict(tensors)
    return layer


def describe(layer: CompressedEmbedding) -> dict:
    """The entry of a layer. Raises ValueError for a class that files know nothing of."""
    for kind in _KINDS.values():
        if kind.owns(layer):
            sizes = {
                "num_embeddings": layer.num_embeddings,
                "embedding_dim": layer.embedding_dim,
            }
            return {"kind": kind.NAME} | sizes | kind.describe(layer)
    raise ValueError(f"lean model: {type(layer).__name__} cannot be saved; expected one of {KINDS}")


def keys(kind: str) -> dict[str, type | tuple]:
    """The keys of an entry of that kind, beside "kind", and their types."""
    return _KINDS[kind].KEYS


def check(entry: dict) -> None:
    """Raise ValueError unless the values of an entry, whose types are right, go together."""
    for key, value in entry.items():
        if type(value) is int and value < 1:
            raise ValueError(f"{key} must be positive, got {value}")
    _KINDS[entry["kind"]].check(entry)


def tensors(entry: dict) -> dict[str, tuple[str, ...]]:
    """The tensors of a layer by name, and what safetensors may call their dtype."""
    return _KINDS[entry["kind"]].tensors(entry)


def build(entry: dict, dense: nn.Module) -> CompressedEmbedding:
    """An unset layer in the place of `dense`, an nn.Embedding or an output head."""
    options = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if isinstance(dense, nn.Embedding):
        for name in ("padding_idx", "scale_grad_by_freq", "sparse"):
            options[name] = getattr(dense, name)
    return _KINDS[entry["kind"]].build(entry, **options)


def formula(layer: CompressedEmbedding) -> tuple[int, str]:
    """The bytes the published formula gives for the parameters of a layer, and the formula."""
    entry = describe(layer)
    return _KINDS[entry["kind"]].count(entry, next(layer.parameters()).element_size())


def rank(layer: CompressedEmbedding) -> int:
    """Its rank, the largest where it has several."""
    return max(layer.ranks) if isinstance(layer, TensorTrainEmbedding) else layer.rank


def _training(rule: EmbeddingRule, weight: Tensor, tokenizer) -> dict:
    options = {"seed": rule.seed}
    if rule.epochs is not None:
        options["epochs"] = rule.epochs
    if rule.texts is not None:
        if tokenizer is None:
            raise ValueError("`texts` are counted in tokens: pass convert(..., tokenizer=...)")
        with open(rule.texts, encoding="utf-8") as lines:
            options["frequencies"] = fits.count_tokens(tokenizer, lines, len(weight)) + 1
    return options


def _check_rank(rank: int, rows: int, columns: int) -> None:
    if rank > min(rows, columns):
        raise ValueError(
            f"rank must be at most {min(rows, columns)} for a table of {rows} x {columns}, got "
            f"{rank}"
        )
