# SPDX-License-Identifier: Apache-2.0
"""tensor_train_embedding: rows of a table kept as a train of small tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.tensor_train_embedding import reference

NAME = "tensor_train_embedding"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = (2, 3, 4)


def _check_bounds(ids: Tensor, rows: int) -> None:
    # Reading them would stall an accelerator or a compiler; the kernel there masks what it reads.
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ValueError(
            f"{NAME}: ids must lie in [0, {rows}), the rows of the table, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )


def _reference_forward(ids, cores, num_embeddings, embedding_dim):
    _check(ids, cores, num_embeddings, embedding_dim, None)
    _check_bounds(ids, num_embeddings)
    return reference.forward(ids, cores, num_embeddings, embedding_dim)


def _reference_grad(grad, ids, cores, num_embeddings, padding_idx, by_frequency):
    _check_bounds(ids, num_embeddings)
    return reference.grad(grad, ids, cores, num_embeddings, padding_idx, by_frequency)


_forward = Kernel(
    "tensor_train_embedding",
    "(Tensor ids, Tensor[] cores, int num_embeddings, int embedding_dim) -> Tensor",
    reference=_reference_forward,
    fake=lambda ids, cores, rows, dim: cores[0].new_empty(*ids.shape, dim),
    triton="lean_kernels.ops.tensor_train_embedding.triton:forward",
)
_grad = Kernel(
    "tensor_train_embedding_grad",
    "(Tensor grad, Tensor ids, Tensor[] cores, int num_embeddings, int padding_idx, "
    "bool by_frequency) -> Tensor[]",
    reference=_reference_grad,
    fake=lambda grad, ids, cores, rows, p, f: [core.new_empty(core.shape) for core in cores],
)


class _TensorTrainEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, sizes, padding_idx, by_frequency, impl, *cores):
        ctx.save_for_backward(ids, *cores)
        ctx.options = sizes[0], padding_idx, by_frequency
        ctx.impl = None if impl is Impl.TRITON else impl
        return _forward.of(impl, ids.device.type)(ids, list(cores), *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, *cores = ctx.saved_tensors
        grads = _grad.of(ctx.impl, ids.device.type)(grad, ids, cores, *ctx.options)
        needed = ctx.needs_input_grad[5:]
        return *[None] * 5, *(g if need else None for g, need in zip(grads, needed, strict=True))


def _check(ids, cores, num_embeddings, embedding_dim, impl) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if ids.dtype not in (torch.int32, torch.int64):
        fail(f"ids must be int32 or int64 [...], got {ids.dtype} {list(ids.shape)}")
    if len(cores) not in ORDERS:
        fail(f"expected 2 to 4 cores, got {len(cores)}")
    before = 1
    for k, core in enumerate(cores):
        fits = core.dim() == 4 and core.shape[1] == before and min(core.shape) > 0
        if not fits or core.dtype not in DTYPES or core.dtype != cores[0].dtype:
            fail(
                f"core {k} must be [v, {before}, d, r], none of them 0, in one of "
                f"{', '.join(map(str, DTYPES))} for all cores, got {core.dtype} {list(core.shape)}"
            )
        before = core.shape[3]
    if before != 1:
        fail(f"the last core must be [v, r, d, 1], got {list(cores[-1].shape)}")
    rows, width = math.prod([c.shape[0] for c in cores]), math.prod([c.shape[2] for c in cores])
    if not 0 <= num_embeddings <= rows or not 1 <= embedding_dim <= width or rows >= 2**63:
        fail(
            f"the cores have {rows} rows of {width}; num_embeddings and embedding_dim must lie "
            f"within, got {num_embeddings} and {embedding_dim}"
        )
    check_devices(NAME, ids=ids, **{f"core {k}": core for k, core in enumerate(cores)})
    check_impl(NAME, impl, ids.device)


def tensor_train_embedding(
    ids: Tensor,
    cores: Sequence[Tensor],
    *,
    embedding_dim: int,
    num_embeddings: int | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    impl: Impl | str | None = None,
) -> Tensor:
    """Rows of a table [num_embeddings, embedding_dim] that only its tensor-train cores stand for.

    Row i, with i = (i_1 ... i_K) in mixed radix of the v_k, and column j = (j_1 ... j_K) of the
    d_k, i_1 and j_1 the most significant: G_1[i_1, :, j_1] G_2[i_2, :, j_2] ... G_K[i_K, :, j_K].

    Args:
        ids: int32 or int64, any shape.
        cores: 2 to 4 tensors [v_k, r_k-1, d_k, r_k] with r_0 = r_K = 1; float32, bfloat16, float16
            or float64.
        embedding_dim: the columns that are kept, at most the product of the d_k.
        num_embeddings: the rows that there are, at most the product of the v_k; None: all.
        padding_idx: this id adds nothing to the gradients.
        scale_grad_by_freq: divide the gradient of a row by how often its id occurs in the batch.
        impl: "reference", "cpu", "triton" (its gradient is the reference's), or None for the best
            one of the device.

    Returns:
        [..., embedding_dim] in the cores' dtype. Products run in float32 (float64 for float64). On
        CPU a row that occurs often is made once, ids that begin with the same indices share what
        their leading cores give, and no row's result depends on the others, bit for bit.

    Raises:
        ValueError: a shape, dtype, device or impl that does not fit; on CPU also an id out of
            bounds (ValueError or RuntimeError), which elsewhere gives a row of zeros.
        RuntimeError: a named impl is not available here.

    Differentiable once in the cores, deterministically, without a V x D buffer. TT-Rec (arXiv
    2101.11714); tensor trains, Oseledets 2011.
    """
    chosen = resolve(NAME, impl, IMPLS)
    cores = list(cores)
    if num_embeddings is None:
        num_embeddings = math.prod([core.shape[0] for core in cores if core.dim()])
    _check(ids, cores, num_embeddings, embedding_dim, chosen)
    sizes = num_embeddings, embedding_dim
    if torch.is_grad_enabled() and any([core.requires_grad for core in cores]):
        padding_idx = -1 if padding_idx is None else padding_idx % max(num_embeddings, 1)
        return _TensorTrainEmbedding.apply(
            ids, sizes, padding_idx, scale_grad_by_freq, chosen, *cores
        )
    return _forward.of(chosen, ids.device.type)(ids, cores, *sizes)
