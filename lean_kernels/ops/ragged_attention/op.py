# SPDX-License-Identifier: Apache-2.0
"""ragged_attention: attention over packed sequences, with the attention each key received."""

import math

import torch
from torch import Tensor

from lean_kernels._autocast import autocast
from lean_kernels._autograd import once_differentiable
from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.ragged_attention import reference

NAME = "ragged_attention"
IMPLS = (Impl.REFERENCE, Impl.CPU, Impl.TRITON)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEY_SCORES = (None, "sum", "mean")  # the index is the code in the schema


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_values(
    queries: int,
    keys: int,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    positions: Tensor | None,
    key_positions: Tensor | None,
):
    # Reading the values would stall an accelerator: the kernels there clamp what they read.
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for label, cu, total in (("cu_seqlens", cu_seqlens, queries), ("cu_seqlens_k", cu_k, keys)):
        if cu[0] != 0 or cu[-1] != total or bool((cu.long().diff() < 0).any()):
            raise ValueError(
                f"{NAME}: {label} must rise from 0 to the number of tokens, {total}; "
                f"got first {int(cu[0])}, last {int(cu[-1])}, "
                f"smallest step {int(cu.long().diff().min()) if len(cu) > 1 else 0}"
            )
    for label, cu, at in (
        ("positions", cu_seqlens, positions),
        ("key_positions", cu_k, key_positions),
    ):
        if at is None:
            continue
        falls = at[1:] < at[:-1]
        falls[cu[(cu > 0) & (cu < len(at))].long() - 1] = False  # from one sequence to the next
        if falls.any():
            raise ValueError(
                f"{NAME}: {label} must ascend within each sequence; "
                "sort the tokens kept by position"
            )


def _reference_forward(
    query, key, value, cu, cu_k, positions, key_positions,
    max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
):  # fmt: skip
    _check(query, key, value, cu, cu_k, positions, key_positions, None)
    _check_values(len(query), len(key), cu, cu_k, positions, key_positions)
    return reference.forward(
        query, key, value, cu, cu_k, positions, key_positions, scale, left, right,
        key_scores > 0, KEY_SCORES[key_scores] == "mean", per_head, exclude_diagonal,
    )  # fmt: skip


def _reference_grad(
    grad_out, grad_scores, query, key, value, out, lse, cu, cu_k, positions, key_positions,
    max_seqlen, scale, left, right, key_scores, per_head, exclude_diagonal,
):  # fmt: skip
    _check_values(len(query), len(key), cu, cu_k, positions, key_positions)
    return reference.grad(
        grad_out, grad_scores, query, key, value, cu, cu_k, positions, key_positions,
        scale, left, right, KEY_SCORES[key_scores] == "mean", per_head, exclude_diagonal,
    )  # fmt: skip


def _fake_forward(query, key, value, *layout):
    *_, key_scores, per_head, _ = layout
    wide = _wide(query.dtype)
    total, heads, _ = query.shape
    scores = ((key.shape[0], heads) if per_head else (key.shape[0],)) if key_scores else (0,)
    if key_scores == 0 and per_head:
        scores = (0, heads)
    return (
        query.new_empty(query.shape),
        query.new_empty((total, heads), dtype=wide),
        query.new_empty(scores, dtype=wide),
    )


def _fake_grad(grad_out, grad_scores, query, key, value, *rest):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


# left and right: how many positions before and after its own a query sees; -1 sees all.
_LAYOUT = (
    "Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? positions, Tensor? key_positions, "
    "int max_seqlen, float scale, int left, int right, "
    "int key_scores, bool per_head, bool exclude_diagonal"
)
_forward = Kernel(
    "ragged_attention",
    f"(Tensor query, Tensor key, Tensor value, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    triton="lean_kernels.ops.ragged_attention.triton:forward",
)
_grad = Kernel(
    "ragged_attention_grad",
    "(Tensor grad_out, Tensor? grad_scores, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    reference=_reference_grad,
    fake=_fake_grad,
    triton="lean_kernels.ops.ragged_attention.triton:grad",
)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, layout, impl):
        out, lse, scores = _forward.of(impl, query.device.type)(query, key, value, *layout)
        tensors = layout[:4]
        ctx.save_for_backward(query, key, value, out, lse, *tensors)
        ctx.numbers, ctx.impl, ctx.scored = layout[4:], impl, layout[-3] > 0
        if not ctx.scored:
            ctx.mark_non_differentiable(scores)
        return out, scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_scores):
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        grad = _grad.of(ctx.impl, query.device.type)
        dq, dk, dv = grad(
            grad_out, grad_scores if ctx.scored else None, query, key, value, out, lse,
            *tensors, *ctx.numbers,
        )  # fmt: skip
        return dq, dk, dv, None, None


def _check(query, key, value, cu, cu_k, positions, key_positions, impl) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if query.dim() != 3 or key.dim() != 3 or value.shape != key.shape:
        fail(
            "query must be [T, H, D], key and value [T_k, H_kv, D], got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    heads, dim = query.shape[1:]
    if key.shape[2] != dim or dim < 1 or key.shape[1] < 1 or heads < 1 or heads % key.shape[1]:
        fail(
            f"head dimensions must agree and H be a multiple of H_kv, got query "
            f"{list(query.shape)}, key {list(key.shape)}"
        )
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        fail(
            f"query, key and value must share one of {', '.join(map(str, DTYPES))}, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}"
        )
    if cu_k is None and key.shape[0] != query.shape[0]:
        fail(
            f"{query.shape[0]} queries but {key.shape[0]} keys: pass cu_seqlens_k where a "
            "sequence's keys are not its queries"
        )
    sizes = [("cu_seqlens", cu, None), ("cu_seqlens_k", cu_k, cu.shape)]
    sizes += [("positions", positions, query.shape[:1])]
    sizes += [("key_positions", key_positions, key.shape[:1])]
    for label, index, shape in sizes:
        if index is None:
            continue
        if index.dtype != torch.int32 or index.dim() != 1 or shape not in (None, index.shape):
            expected = "[B + 1]" if shape is None else list(shape)
            fail(f"{label} must be int32 {expected}, got {index.dtype} {list(index.shape)}")
    if cu.shape[0] < 1:
        fail("cu_seqlens must be int32 [B + 1], got no elements")
    if (key_positions is not None) != (positions is not None and cu_k is not None):
        fail("key_positions goes with positions and cu_seqlens_k, and only with both")
    check_devices(
        NAME,
        query=query,
        key=key,
        value=value,
        cu_seqlens=cu,
        cu_seqlens_k=cu_k,
        positions=positions,
        key_positions=key_positions,
    )
    check_impl(NAME, impl, query.device)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    key_scores: str | None = None,
    key_scores_per_head: bool = False,
    exclude_diagonal: bool = False,
    impl: Impl | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q Kᵀ) V for each of B packed sequences, and what each key received.

    Args:
        query: [T, H, D]; float32, bfloat16, float16 or float64. Views of a fused projection are
            read in place as long as a head's D elements are contiguous.
        key, value: [T_k, H_kv, D] in query's dtype, H a multiple of H_kv (grouped heads).
        cu_seqlens: int32 [B + 1], rising from 0 to T; sequence b has rows cu[b] to cu[b + 1] - 1.
            Empty sequences are fine.
        max_seqlen: longest sequence, if known. It picks the kernels on GPU, where short sequences
            need it to be fast, and where those longer than it may come back as NaN.
        cu_seqlens_k: int32 [B + 1], the same for keys; None: keys lie as the queries do.
        causal: a query sees no key after its own position.
        window: (left, right), how many positions before and after its own a query sees; -1: all.
        positions: int32 [T], ascending within a sequence: where causal and window count from once
            tokens were dropped. None: consecutive, and the last query stands at the last key.
        key_positions: int32 [T_k], with `cu_seqlens_k` and `positions` only.
        scale: None is 1 / sqrt(D).
        key_scores: None, "sum" (attention a key received, added over query rows and heads) or
            "mean" (the same divided by H and the sequence's number of query rows).
        key_scores_per_head: keep the heads apart ("mean" then divides by the rows alone).
        exclude_diagonal: leave out what a token gives itself (PoWER-BERT, arXiv 2001.08950).
        impl: "reference", "cpu", "triton", or None for the best one of the device.

    Returns:
        out [T, H, D] in query's dtype, contiguous; with `key_scores` also float32 [T_k], or
        [T_k, H] per head (float64 for float64). A query that sees no key gets zeros. Sums run in
        float32. On CPU a sequence's result does not depend on the rest of the batch, bit for bit.

    Raises:
        ValueError: a shape, dtype, device, option or impl that does not fit.
        RuntimeError: a named impl is not available here; on CPU, values of cu_seqlens that do not
            rise from 0 to the number of tokens or positions that do not ascend (ValueError from
            impl "reference").

    Differentiable once in query, key and value, through the output and through the scores.
    Key scores drive token dropping: PoWER-BERT; LTP, arXiv 2107.00910; ACC, arXiv 2201.03327.
    """
    chosen = resolve(NAME, impl, IMPLS)
    if key_scores not in KEY_SCORES:
        raise ValueError(f"{NAME}: unknown key_scores {key_scores!r}; expected one of {KEY_SCORES}")
    if key_scores is None and (key_scores_per_head or exclude_diagonal):
        raise ValueError(
            f"{NAME}: key_scores_per_head and exclude_diagonal need key_scores='sum' or 'mean'"
        )
    left, right = (-1, -1) if window is None else window
    if min(left, right) < -1:
        raise ValueError(f"{NAME}: window must be (left, right), each -1 or up, got {window}")
    if causal:
        right = 0
    query, key, value = autocast(query.device.type, query, key, value)
    _check(query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions, chosen)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    layout = (
        cu_seqlens, cu_seqlens_k, positions, key_positions,
        -1 if max_seqlen is None else max_seqlen, scale, left, right,
        KEY_SCORES.index(key_scores), key_scores_per_head, exclude_diagonal,
    )  # fmt: skip
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        out, scores = _RaggedAttention.apply(query, key, value, layout, chosen)
    else:
        out, _, scores = _forward.of(chosen, query.device.type)(query, key, value, *layout)
    return out if key_scores is None else (out, scores)
