# SPDX-License-Identifier: Apache-2.0
"""low_rank_embedding: rows activation(codes[id] decoderᵀ + bias), made as they are looked up."""

import torch
from torch import Tensor

from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops import _row_norm
from lean_kernels.ops._row_norm import RowNorm
from lean_kernels.ops.low_rank_embedding import reference

NAME = "low_rank_embedding"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
ACTIVATIONS = (None, "relu", "gelu", "elu")  # the index is the code in the schema
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _reference_forward(ids, codes, scales, decoder, bias, activation, *end):
    *added, norm, norm_weight, norm_bias, eps = end
    _check(ids, codes, scales, decoder, bias)
    _row_norm.check_bounds(NAME, ids, codes.shape[0])
    for at, table in zip(added[::2], added[1::2], strict=True):
        _row_norm.check_bounds(NAME, at, 0 if table is None else table.shape[0], "added ids")
    return reference.forward(
        ids, codes, scales, decoder, bias, ACTIVATIONS[activation], added,
        norm, norm_weight, norm_bias, eps,
    )  # fmt: skip


def _reference_grad(grad, ids, codes, scales, decoder, bias, activation, *options):
    _row_norm.check_bounds(NAME, ids, codes.shape[0])
    name = ACTIVATIONS[activation]
    return reference.grad(grad, ids, codes, scales, decoder, bias, name, *options)


def _fake_grad(grad, ids, codes, scales, decoder, bias, activation, padding, freq, sparse, *need):
    used = 0
    if need[0] and sparse:
        used = torch.library.get_ctx().new_dynamic_size()
    rows = used if sparse else codes.shape[0]
    shapes = ((rows, codes.shape[1]), decoder.shape, decoder.shape[:1])
    return ids.new_empty(used, dtype=torch.int64), *(
        decoder.new_empty(shape if needed else (0,))
        for shape, needed in zip(shapes, need, strict=True)
    )


_TABLE = "Tensor codes, Tensor? scales, Tensor decoder, Tensor? bias, int activation"
_TRITON = "lean_kernels.ops.low_rank_embedding.triton"
_forward = Kernel(
    "low_rank_embedding",
    f"(Tensor ids, {_TABLE}, {_row_norm.SCHEMA}) -> Tensor",
    reference=_reference_forward,
    fake=lambda ids, codes, scales, decoder, *_: decoder.new_empty(*ids.shape, decoder.shape[0]),
    triton=f"{_TRITON}:forward",
)
_grad = Kernel(
    "low_rank_embedding_grad",
    f"(Tensor grad, Tensor ids, {_TABLE}, int padding_idx, bool by_frequency, bool sparse, "
    "bool need_codes, bool need_decoder, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_grad,
    fake=_fake_grad,
    triton=f"{_TRITON}:grad",
)


class _LowRankEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, end, options, impl, codes, decoder, bias, *_):
        ids, scales, activation = table
        ctx.save_for_backward(ids, codes, scales, decoder, bias, *(t for t in end if _is(t)))
        ctx.end = [None if _is(t) else t for t in end]
        ctx.present = [_is(t) for t in end]
        ctx.activation, ctx.options, ctx.impl = activation, options, impl
        kernel = _forward.of(impl, codes.device.type)
        return kernel(ids, codes, scales, decoder, bias, activation, *end)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, codes, scales, decoder, bias, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        end = [next(tensors) if p else t for p, t in zip(ctx.present, ctx.end, strict=True)]
        need = ctx.needs_input_grad[4:]
        table = codes, scales, decoder, bias, ctx.activation
        end_grads = (None,) * 4
        if not _row_norm.plain(end):
            rows = _forward.of(ctx.impl, codes.device.type)(ids, *table, *_row_norm.NOTHING)
            grad, end_grads = _row_norm.end_grad(grad, rows, end, need[3:])
        padding_idx, by_frequency, sparse = ctx.options
        grads = (None,) * 3
        if any(need[:3]):
            kernel = _grad.of(ctx.impl, codes.device.type)
            rows, *grads = kernel(
                grad, ids, *table, -1 if padding_idx is None else padding_idx, by_frequency, sparse,
                *need[:3],
            )  # fmt: skip
            grads = [g if n else None for g, n in zip(grads, need[:3], strict=True)]
            if need[0] and sparse:
                grads[0] = torch.sparse_coo_tensor(
                    rows[None], grads[0], codes.shape, is_coalesced=True, check_invariants=False
                )
        return (None,) * 4 + (*grads, *end_grads)


def _is(value) -> bool:
    return isinstance(value, Tensor)


def apply(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    decoder: Tensor,
    bias: Tensor | None,
    activation: str | None,
    added,
    norm: RowNorm | None,
    options: tuple[int | None, bool, bool],
    impl: Impl | None = None,
) -> Tensor:
    """The op without the checks of `low_rank_embedding`, for layers that made them once.

    `options`: padding_idx, scale_grad_by_freq and sparse.
    """
    code = ACTIVATIONS.index(activation)
    end = (*_row_norm.spread(added, ids.shape), *_row_norm.flatten(norm))
    trained = (codes, decoder, bias, *_row_norm.trained(end))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return _LowRankEmbedding.apply((ids, scales, code), end, options, impl, *trained)
    kernel = _forward.of(impl, codes.device.type)
    return kernel(ids, codes, scales, decoder, bias, code, *end)


def _check(ids, codes, scales, decoder, bias) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if decoder.dim() != 2 or decoder.dtype not in DTYPES or 0 in decoder.shape:
        fail(
            f"decoder must be [D, rank], not empty, in one of {', '.join(map(str, DTYPES))}, got "
            f"{decoder.dtype} {list(decoder.shape)}"
        )
    features, rank = decoder.shape
    kind = decoder.dtype if scales is None else torch.int8
    if codes.dim() != 2 or codes.shape[1] != rank or codes.dtype != kind:
        fail(
            f"codes must be {kind} [V, {rank}] (the decoder's dtype, or int8 with scales), got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    if scales is not None and (scales.dtype, scales.shape) != (torch.float32, codes.shape[:1]):
        fail(
            f"scales must be torch.float32 [{codes.shape[0]}], got {scales.dtype} "
            f"{list(scales.shape)}"
        )
    if bias is not None and (bias.dtype, bias.shape) != (decoder.dtype, (features,)):
        fail(f"bias must be {decoder.dtype} [{features}], got {bias.dtype} {list(bias.shape)}")
    check_devices(NAME, codes=codes, scales=scales, decoder=decoder, bias=bias)
    _row_norm.check_ids(NAME, "ids", ids, codes.device)


def low_rank_embedding(
    ids: Tensor,
    codes: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scales: Tensor | None = None,
    added=(),
    norm: RowNorm | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    impl: Impl | str | None = None,
) -> Tensor:
    """norm(activation(codes[ids] decoderᵀ + bias) + added rows), without a row of codes in memory.

    The table activation(codes decoderᵀ + bias) [V, D] is never made. On CPU a row that occurs often
    in the batch is made once.

    Args:
        ids: int32 or int64, any shape.
        codes: [V, rank]; float32, bfloat16, float16 or float64, or int8 with `scales`.
        decoder: [D, rank]; the codes' dtype, and any of these with int8 codes. Any strides.
        bias: [D] in the decoder's dtype, or None.
        activation: None, "relu", "gelu" (exact erf) or "elu".
        scales: float32 [V], by which rows of int8 codes are multiplied; None otherwise.
        added: up to two pairs (ids, table): rows table[ids] to add, ids broadcast to the shape of
            `ids`, tables [*, D] in the decoder's dtype. BERT's positions and token types.
        norm: RowNorm, applied last, or None.
        padding_idx, scale_grad_by_freq, sparse: as in torch.nn.functional.embedding, for the
            gradients of codes, decoder and bias; `sparse` for that of codes alone, a coalesced
            sparse COO tensor of the rows that occur. On CUDA their number is waited for.
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        [*ids.shape, D] in the decoder's dtype. Sums run in float32 (float64 for float64). On CPU a
        row depends on its ids alone, bit for bit.

    Raises:
        ValueError: a shape, dtype, device, activation or impl that does not fit.
        IndexError or RuntimeError: on CPU, an id out of bounds; elsewhere its row is NaN.
        RuntimeError: a named impl is not available here.

    Differentiable once in codes, decoder, bias, the added tables and the norm's parameters, without
    anything of size V x D; int8 codes and their scales are constants. Not cast under autocast, like
    torch's embedding. Truncated SVD; ALBERT, arXiv 1909.11942; autoencoders trained on direction,
    arXiv 2106.08181.
    """
    chosen = resolve(NAME, impl, IMPLS)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{NAME}: unknown activation {activation!r}; expected one of {ACTIVATIONS}"
        )
    _check(ids, codes, scales, decoder, bias)
    features, device = decoder.shape[0], codes.device
    _row_norm.check_added(NAME, added, ids.shape, features, decoder.dtype, device)
    _row_norm.check(NAME, norm, features, decoder.dtype, device)
    if padding_idx is not None and not -len(codes) <= padding_idx < len(codes):
        raise ValueError(
            f"{NAME}: padding_idx must lie in [{-len(codes)}, {len(codes)}), got {padding_idx}"
        )
    check_impl(NAME, chosen, device)
    padding_idx = None if padding_idx is None else padding_idx % len(codes)
    options = (padding_idx, scale_grad_by_freq, sparse)
    return apply(ids, codes, scales, decoder, bias, activation, added, norm, options, chosen)
