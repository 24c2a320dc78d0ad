# SPDX-License-Identifier: Apache-2.0
"""ngram_embedding_bag: the sum or mean of chosen rows of a table, per bag."""

import torch
from torch import Tensor

from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.ngram_embedding_bag import reference

NAME = "ngram_embedding_bag"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
MODES = ("sum", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_values(ids: Tensor, offsets: Tensor, rows: int) -> None:
    # Reading them would stall an accelerator or a compiler; the kernels there mask what they read.
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{NAME}: offsets must rise from 0 to the number of ids, {len(ids)}; got first "
            f"{int(offsets[0])}, last {int(offsets[-1])}"
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise ValueError(
            f"{NAME}: ids must lie in [0, {rows}), the rows of table, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )


def _reference_forward(ids, offsets, table, weights, scales, padding_idx, mean):
    _check(ids, offsets, table, weights, scales, None)
    _check_values(ids, offsets, table.shape[0])
    return reference.forward(ids, offsets, table, weights, scales, padding_idx, mean)


def _reference_grad_table(grad, ids, offsets, weights, rows, padding_idx, mean):
    _check_values(ids, offsets, rows)
    return reference.grad_table(grad, ids, offsets, weights, rows, padding_idx, mean)


def _reference_grad_rows(grad, ids, offsets, weights, rows, padding_idx, mean):
    _check_values(ids, offsets, rows)
    return reference.grad_rows(grad, ids, offsets, weights, rows, padding_idx, mean)


def _reference_grad_weights(grad, ids, offsets, table, scales, padding_idx, mean):
    _check_values(ids, offsets, table.shape[0])
    return reference.grad_weights(grad, ids, offsets, table, scales, padding_idx, mean)


def _fake_forward(ids, offsets, table, weights, scales, padding_idx, mean):
    dtype = torch.float32 if table.dtype == torch.int8 else table.dtype
    return table.new_empty((offsets.shape[0] - 1, table.shape[1]), dtype=dtype)


def _fake_grad_rows(grad, ids, offsets, weights, rows, padding_idx, mean):
    used = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(used, dtype=torch.int64), grad.new_empty((used, grad.shape[1]))


_TRITON = "lean_kernels.ops.ngram_embedding_bag.triton"
_GRAD = "(Tensor grad, Tensor ids, Tensor offsets, Tensor? weights, SymInt rows, int padding_idx, "
_forward = Kernel(
    "ngram_embedding_bag",
    "(Tensor ids, Tensor offsets, Tensor table, Tensor? weights, Tensor? scales, int padding_idx, "
    "bool mean) -> Tensor",
    reference=_reference_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:forward",
)
_grad_table = Kernel(
    "ngram_embedding_bag_grad_table",
    f"{_GRAD} bool mean) -> Tensor",
    reference=_reference_grad_table,
    fake=lambda grad, ids, offsets, w, rows, p, m: grad.new_empty(rows, grad.shape[1]),
    triton=f"{_TRITON}:grad_table",
)
_grad_rows = Kernel(
    "ngram_embedding_bag_grad_rows",
    f"{_GRAD} bool mean) -> (Tensor, Tensor)",
    reference=_reference_grad_rows,
    fake=_fake_grad_rows,
    triton=f"{_TRITON}:grad_rows",
)
_grad_weights = Kernel(
    "ngram_embedding_bag_grad_weights",
    "(Tensor grad, Tensor ids, Tensor offsets, Tensor table, Tensor? scales, int padding_idx, "
    "bool mean) -> Tensor",
    reference=_reference_grad_weights,
    fake=lambda grad, ids, offsets, table, s, p, m: grad.new_empty(
        ids.shape, dtype=reference.wide(table.dtype)
    ),
    triton=f"{_TRITON}:grad_weights",
)


class _NGramEmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, offsets, table, weights, scales, padding_idx, mean, sparse, impl):
        ctx.save_for_backward(ids, offsets, table, weights, scales)
        ctx.options = padding_idx, mean
        ctx.sparse, ctx.impl = sparse, impl
        kernel = _forward.of(impl, table.device.type)
        return kernel(ids, offsets, table, weights, scales, padding_idx, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, offsets, table, weights, scales = ctx.saved_tensors
        device, shape = grad.device.type, table.shape
        need_table, need_weights = ctx.needs_input_grad[2:4]
        dtable = dweights = None
        arguments = grad, ids, offsets, weights, shape[0], *ctx.options
        if need_table and ctx.sparse:
            rows, values = _grad_rows.of(ctx.impl, device)(*arguments)
            dtable = torch.sparse_coo_tensor(
                rows[None], values, shape, is_coalesced=True, check_invariants=False
            )
        elif need_table:
            dtable = _grad_table.of(ctx.impl, device)(*arguments)
        if need_weights:
            kernel = _grad_weights.of(ctx.impl, device)
            dweights = kernel(grad, ids, offsets, table, scales, *ctx.options).to(weights.dtype)
        return None, None, dtable, dweights, None, None, None, None, None


def _check(ids, offsets, table, weights, scales, impl) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if table.dim() != 2 or table.shape[1] < 1 or table.dtype not in (*DTYPES, torch.int8):
        fail(
            f"table must be [V, D], D at least 1, in one of {', '.join(map(str, DTYPES))} or "
            f"torch.int8, got {table.dtype} {list(table.shape)}"
        )
    for label, tensor, size in (("ids", ids, "[N]"), ("offsets", offsets, "[B + 1]")):
        if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            fail(f"{label} must be int32 or int64 {size}, got {tensor.dtype} {list(tensor.shape)}")
    if offsets.shape[0] < 1:
        fail("offsets must be [B + 1], rising from 0 to the number of ids, got [0]")
    quantised = table.dtype == torch.int8
    if quantised != (scales is not None):
        fail("scales, float32 [V], go with an int8 table, and with no other")
    if quantised and (scales.dtype != torch.float32 or scales.shape != table.shape[:1]):
        fail(
            f"scales must be float32 {list(table.shape[:1])}, one per row of table, got "
            f"{scales.dtype} {list(scales.shape)}"
        )
    if quantised and scales.requires_grad:
        fail("scales take no gradient; train the float table and quantise it afterwards")
    sums = reference.wide(table.dtype)
    valid = {sums} if quantised else {table.dtype, sums}
    if weights is not None and (weights.shape != ids.shape or weights.dtype not in valid):
        fail(
            f"weights must be {list(ids.shape)} in {' or '.join(sorted(map(str, valid)))}, one "
            f"per id, got {weights.dtype} {list(weights.shape)}"
        )
    check_devices(NAME, table=table, ids=ids, offsets=offsets, weights=weights, scales=scales)
    check_impl(NAME, impl, table.device)


def _padding(padding_idx: int | None, rows: int) -> int:
    """The row that is left out, or -1; from the end where negative, as torch has it."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"{NAME}: padding_idx must lie in [{-rows}, {rows}), the rows of table, got "
            f"{padding_idx}"
        )
    return padding_idx % rows


def ngram_embedding_bag(
    ids: Tensor,
    offsets: Tensor,
    table: Tensor,
    *,
    mode: str = "mean",
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    padding_idx: int | None = None,
    sparse: bool = False,
    impl: Impl | str | None = None,
) -> Tensor:
    """The sum or mean of table[ids[i]] over the ids of each bag, without the N x D rows in between.

    y[b] = factor * sum of weights[i] * scales[ids[i]] * table[ids[i]], i from offsets[b] to before
    offsets[b + 1]; factor is 1 for "sum", 1 / the number of ids of the bag for "mean".

    Args:
        ids: int32 or int64 [N], rows of the table; a row may occur often.
        offsets: int32 or int64 [B + 1], rising from 0 to N. Empty bags give zeros.
        table: [V, D]; float32, bfloat16, float16, float64, or int8 with scales.
        mode: "sum" or "mean". The mean divides by a number of ids, not by a sum of weights.
        weights: [N], one factor per id: the table's dtype, or float32 where that has a half
            precision or is int8.
        scales: float32 [V], what the rows of an int8 table are multiplied by.
        padding_idx: a row that is left out, of counts too, as in torch.nn.EmbeddingBag.
        sparse: give the table's gradient as a coalesced sparse COO tensor of the rows that occur,
            for lk.optim.LazyAdam and the like, instead of a dense [V, D].
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        [B, D] in the table's dtype, float32 for int8. Sums run in float32 (float64 for float64). On
        CPU a bag's result does not depend on the other bags or the number of threads, bit for bit.

    Raises:
        ValueError: a shape, dtype, device, mode or impl that does not fit; on CPU also ids or
            offsets out of bounds (ValueError or RuntimeError), which elsewhere are left out.
        RuntimeError: a named impl is not available here.

    Differentiable once in table (not int8) and weights. Gradients are deterministic, and their
    time depends little on how often a row occurs. For Sparse Distillation, arXiv 2110.08536.
    """
    chosen = resolve(NAME, impl, IMPLS)
    if mode not in MODES:
        raise ValueError(f"{NAME}: unknown mode {mode!r}; expected one of {MODES}")
    _check(ids, offsets, table, weights, scales, chosen)
    padding_idx, mean = _padding(padding_idx, table.shape[0]), mode == "mean"
    if torch.is_grad_enabled() and (
        table.requires_grad or (weights is not None and weights.requires_grad)
    ):
        return _NGramEmbeddingBag.apply(
            ids, offsets, table, weights, scales, padding_idx, mean, sparse, chosen
        )
    kernel = _forward.of(chosen, table.device.type)
    return kernel(ids, offsets, table, weights, scales, padding_idx, mean)
