# SPDX-License-Identifier: Apache-2.0
"""tensor_product_embedding: rows of a table that is a sum of tensor products, and their norm."""

import torch
from torch import Tensor

from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops import _row_norm
from lean_kernels.ops._row_norm import RowNorm
from lean_kernels.ops.tensor_product_embedding import reference

NAME = "tensor_product_embedding"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON, Impl.CUDA)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)
ORDERS = (2, 3, 4)
_MODULE = "lean_kernels.ops.tensor_product_embedding.triton"
_ADDED = "Tensor? ids0, Tensor? table0, Tensor? ids1, Tensor? table1, int norm, Tensor? weight"


def _check_values(ids, morphemes, factors, ids0, table0, ids1, table1) -> None:
    _row_norm.check_bounds(NAME, ids, morphemes.shape[0])
    _row_norm.check_bounds(NAME, morphemes, factors.shape[0], "morphemes")
    for at, table in ((ids0, table0), (ids1, table1)):
        _row_norm.check_bounds(NAME, at, 0 if table is None else table.shape[0], "added ids")


def _reference_forward(ids, morphemes, factors, embedding_dim, *added_and_norm):
    _check_values(ids, morphemes, factors, *added_and_norm[:4])
    return reference.forward(ids, morphemes, factors, embedding_dim, *added_and_norm)


def _fake_forward(ids, morphemes, factors, embedding_dim, *_):
    return factors.new_empty((*ids.shape, embedding_dim))


def _reference_grad(grad, ids, morphemes, factors, *rest):
    _check_values(ids, morphemes, factors, *rest[:4])
    return reference.grad(grad, ids, morphemes, factors, *rest)


def _fake_grad(grad, ids, morphemes, factors, ids0, table0, ids1, table1, norm, *_):
    wide = torch.float64 if factors.dtype == torch.float64 else torch.float32

    def like(tensor):
        return factors.new_empty(0 if tensor is None else tensor.shape, dtype=wide)

    size = grad.shape[-1] if norm else 0
    norms = (factors.new_empty(size, dtype=wide) for _ in range(2))
    return like(factors), like(table0), like(table1), *norms


_forward = Kernel(
    NAME,
    f"(Tensor ids, Tensor morphemes, Tensor factors, SymInt embedding_dim, {_ADDED}, "
    "Tensor? bias, float eps) -> Tensor",
    reference=_reference_forward,
    fake=_fake_forward,
    triton=f"{_MODULE}:forward",
    cuda=True,
)
_grad = Kernel(
    f"{NAME}_grad",
    f"(Tensor grad, Tensor ids, Tensor morphemes, Tensor factors, {_ADDED}, float eps, "
    "SymInt padding_idx) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_grad,
    fake=_fake_grad,
    triton=f"{_MODULE}:grad",
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, factors, table0, table1, weight, bias,
        ids, morphemes, embedding_dim, ids0, ids1, norm, eps, padding_idx, impl,
    ):  # fmt: skip
        ctx.save_for_backward(factors, table0, table1, weight, ids, morphemes, ids0, ids1)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = norm, eps, padding_idx, impl
        kernel = _forward.of(impl, factors.device.type)
        return kernel(
            ids, morphemes, factors, embedding_dim, ids0, table0, ids1, table1, norm, weight, bias,
            eps,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        factors, table0, table1, weight, ids, morphemes, ids0, ids1 = ctx.saved_tensors
        norm, eps, padding_idx, impl = ctx.options
        grads = raw_grad(
            grad, ids, morphemes, factors, ids0, table0, ids1, table1, norm, weight, eps,
            padding_idx, impl,
        )  # fmt: skip
        dtypes = [None if t is None else t.dtype for t in (factors, table0, table1, weight)]
        needed = zip(ctx.needs_input_grad, grads, [*dtypes, ctx.bias_dtype], strict=False)
        return *(g.to(dtype) if need else None for need, g, dtype in needed), *(None,) * 9


def raw_grad(grad, ids, morphemes, factors, *rest) -> tuple[Tensor, ...]:
    """The gradients of one implementation, wide: `rest` as in the schema, then the Impl."""
    *arguments, impl = rest
    return _grad.of(impl, factors.device.type)(grad, ids, morphemes, factors, *arguments)


def check(ids, morphemes, factors, embedding_dim: int, impl: Impl | None, op: str = NAME) -> None:
    """Raise ValueError or RuntimeError unless the tensors describe a table and ids of its rows."""

    def fail(problem: str) -> None:
        raise ValueError(f"{op}: {problem}")

    if factors.dim() != 3 or factors.dtype not in DTYPES or 0 in factors.shape[1:]:
        fail(
            f"factors must be [M, r, q] in one of {', '.join(map(str, DTYPES))}, r and q at least "
            f"1, got {factors.dtype} {list(factors.shape)}"
        )
    if morphemes.dim() != 2 or morphemes.shape[1] not in ORDERS:
        fail(f"morphemes must be [V, n] with n from 2 to 4, got {list(morphemes.shape)}")
    if morphemes.dtype not in INDEX_DTYPES:
        fail(f"morphemes must be int16, int32 or int64, got {morphemes.dtype}")
    order, size = morphemes.shape[1], factors.shape[2]
    if not 1 <= embedding_dim <= size**order:
        fail(
            f"embedding_dim must lie in [1, q^n = {size}^{order} = {size**order}], got "
            f"{embedding_dim}"
        )
    check_devices(op, factors=factors, morphemes=morphemes)
    _row_norm.check_ids(op, "ids", ids, factors.device)
    check_impl(op, impl, factors.device)


def tensor_product_embedding(
    ids: Tensor,
    morphemes: Tensor,
    factors: Tensor,
    *,
    embedding_dim: int,
    added: tuple = (),
    norm: RowNorm | None = None,
    padding_idx: int | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """Rows of the table that morphemes and factors stand for, without making the table.

    With f = factors and m = morphemes[id], the row of an id is
    sum over i < r of f[m[0], i] (x) f[m[1], i] (x) ... (x) f[m[n - 1], i], the tensor product of n
    vectors of q numbers, its last index running fastest, cut to its first D = embedding_dim
    numbers. Then come the added rows, then the norm, before anything is written.

    Args:
        ids: any shape; int32 or int64, in [0, V).
        morphemes: [V, n], n from 2 to 4; int16, int32 or int64, in [0, M).
        factors: [M, r, q]; float32, bfloat16, float16 or float64.
        embedding_dim: D, at most q^n.
        added: up to two (ids, table): rows of table [*, D] in the factors' dtype, whose int32 or
            int64 ids broadcast to the shape of `ids`; position and token type, for example.
        norm: a RowNorm, LayerNorm or RMSNorm of the sum; None for none.
        padding_idx: this id's positions pass no gradient on, as those of nn.Embedding; their rows
            are made like the others.
        impl: "reference", "cpu", "triton", "cuda" (its gradient is Triton's), or None for the best
            one of the device.

    Returns:
        [*ids.shape, D] in the factors' dtype, contiguous. Sums are taken in float32 (float64 for
        float64). On CPU an id that occurs again is not computed again, a row does not depend on
        the others, bit for bit, and neither rows nor gradients depend on the number of threads.

    Raises:
        ValueError: a shape, dtype, device, option or impl that does not fit.
        IndexError, RuntimeError: on CPU, an id or a morpheme out of bounds; elsewhere it gives a
            row of NaN and no gradient.
        RuntimeError: a named impl is not available here.

    Differentiable once in factors, the added tables and the norm's weight and bias. Memory beyond
    the gradients themselves does not grow with V or with the number of ids times D.

    MorphTE: arXiv 2210.15379, whose released code keeps factors as [r, M, q]. word2ket, arXiv
    1911.04975, is the case of morphemes = arange(V * n).view(V, n).
    """
    chosen = resolve(NAME, impl, IMPLS)
    check(ids, morphemes, factors, embedding_dim, chosen)
    _row_norm.check(NAME, norm, embedding_dim, factors.dtype, factors.device)
    _row_norm.check_added(NAME, added, ids.shape, embedding_dim, factors.dtype, factors.device)
    ids0, table0, ids1, table1 = _row_norm.spread(added, ids.shape)
    kind, weight, bias, eps = _row_norm.flatten(norm)
    learned = factors, table0, table1, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return _Embedding.apply(
            *learned, ids, morphemes, embedding_dim, ids0, ids1, kind, eps,
            -1 if padding_idx is None else padding_idx, chosen,
        )  # fmt: skip
    return _forward.of(chosen, factors.device.type)(
        ids, morphemes, factors, embedding_dim, ids0, table0, ids1, table1, kind, weight, bias, eps
    )
