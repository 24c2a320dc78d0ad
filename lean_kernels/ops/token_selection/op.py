# SPDX-License-Identifier: Apache-2.0
"""select_tokens and compact_tokens: which tokens of packed sequences go on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_kernels._dispatch import Impl, Kernel, check_devices, check_impl, resolve
from lean_kernels.ops.token_selection import reference
from lean_kernels.ops.token_selection.rows import (
    IMPLS,
    check_rows,
    gathered,
    needs_grad,
    scatter_each,
)

NAME = "token_selection"
MODES = ("fraction", "counts", "threshold")  # the index is the code in the schema


@dataclass(frozen=True)
class Threshold:
    """Keep the tokens that score at least `value`, rounded to the scores' dtype (LTP)."""

    value: float


def kept_count(fraction: float, length: int) -> int:
    """How many of `length` tokens select_tokens keeps: ceil(fraction * length - 1e-6), at least 1.

    The 1e-6 takes back what floating point adds: 0.07 * 100 is above 7, and 7 is meant.
    """
    if length == 0:
        return 0
    return min(max(math.ceil(fraction * length - reference.SLACK), 1), length)


def _check_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    # Reading the values would stall an accelerator: the kernels there clamp what they read.
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"select_tokens: cu_seqlens must rise from 0 to the number of tokens, {tokens}; "
            f"got first {int(cu_seqlens[0])}, last {int(cu_seqlens[-1])}"
        )


def _reference_select(scores, cu_seqlens, protect, counts, value, mode, total, tensors):
    _check_select(scores, cu_seqlens, protect, counts, tensors)
    _check_seqlens(cu_seqlens, scores.shape[0])
    threshold = MODES[mode] == "threshold"
    indices, cu_kept = reference.select(scores, cu_seqlens, protect, counts, value, threshold)
    if total is not None and not torch.compiler.is_compiling() and len(indices) != total:
        raise ValueError(
            f"select_tokens: total is {total}, but {len(indices)} tokens are kept; leave it out "
            "where the number is not known"
        )
    return indices, cu_kept, reference.gather(tensors, indices)


def _fake_select(scores, cu_seqlens, protect, counts, value, mode, total, tensors):
    if total is None:
        total = torch.library.get_ctx().new_dynamic_size()
    return (
        scores.new_empty(total, dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape),
        [t.new_empty((total, *t.shape[1:])) for t in tensors],
    )


_select = Kernel(
    "select_tokens",
    "(Tensor scores, Tensor cu_seqlens, Tensor? protect, Tensor? counts, float value, int mode, "
    "SymInt? total, Tensor[] tensors) -> (Tensor, Tensor, Tensor[])",
    reference=_reference_select,
    fake=_fake_select,
    triton="lean_kernels.ops.token_selection.triton:select",
    cuda=True,
)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments, impl, scores, *tensors):
        indices, cu_kept, rows = _compacted(scores, arguments, tensors, impl)
        ctx.save_for_backward(indices)
        ctx.total, ctx.impl = scores.shape[0], impl
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, cu_kept)
        return indices, cu_kept, *rows

    @staticmethod
    def backward(ctx, _, __, *grads):
        return None, None, None, *scatter_each(ctx, grads)


def _compacted(scores: Tensor, arguments: tuple, tensors: tuple, impl: Impl | None) -> tuple:
    select = _select.of(impl, scores.device.type)
    *selection, total = arguments
    compiled = _select.compiled_for_cuda and scores.device.type == "cuda"
    if total is None and compiled and impl in (None, Impl.CUDA):
        # The CUDA kernel must be told a total: room for all tokens, then the number is read back.
        indices, cu_kept, _ = select(scores, *selection, scores.shape[0], [])
        indices = indices[: int(cu_kept[-1])]
        return indices, cu_kept, gathered(tensors, indices, impl) if tensors else ()
    return select(scores, *arguments, list(tensors))


def _mode(keep) -> tuple[Tensor | None, float, int]:
    """`keep` as (counts, value, mode) of the schema."""
    if isinstance(keep, Tensor):
        return keep, 0.0, MODES.index("counts")
    if isinstance(keep, Threshold):
        return None, float(keep.value), MODES.index("threshold")
    if isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1:
        return None, float(keep), MODES.index("fraction")
    raise ValueError(
        "select_tokens: keep must be a fraction in (0, 1], an int32 tensor [B] of counts, or a "
        f"Threshold, got {keep!r}"
    )


def _check_select(scores, cu_seqlens, protect, counts, tensors) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"select_tokens: {problem}")

    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1:
        fail(f"scores must be float32 or float64 [T], got {scores.dtype} {list(scores.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail(f"cu_seqlens must be int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if protect is not None and (protect.dtype != torch.bool or protect.shape != scores.shape):
        fail(
            f"protect must be bool {list(scores.shape)} like scores, got {protect.dtype} "
            f"{list(protect.shape)}"
        )
    sequences = cu_seqlens.shape[0] - 1
    if counts is not None and (counts.dtype != torch.int32 or counts.shape != (sequences,)):
        fail(
            f"keep must be int32 [{sequences}], one count per sequence, got {counts.dtype} "
            f"{list(counts.shape)}"
        )
    check_devices(
        "select_tokens", scores=scores, cu_seqlens=cu_seqlens, protect=protect, keep=counts
    )
    check_rows("compact_tokens", tensors, scores.shape[0], scores.device)


def compact_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    *tensors: Tensor,
    keep: float | Tensor | Threshold,
    protect: Tensor | None = None,
    total: int | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, ...]:
    """select_tokens and gather_tokens in one call: on CUDA two launches for all of it.

    Args: as of `select_tokens`; `tensors` [T, ...], of any dtype, lose the tokens not kept.

    Returns:
        (indices, cu_seqlens, *tensors); see there. Differentiable in `tensors`.
    """
    chosen = resolve("select_tokens", impl, IMPLS)
    counts, value, mode = _mode(keep)
    _check_select(scores, cu_seqlens, protect, counts, tensors)
    check_impl("select_tokens", chosen, scores.device)
    arguments = cu_seqlens, protect, counts, value, mode, total
    if needs_grad(*tensors):
        return _Select.apply(arguments, chosen, scores, *tensors)
    indices, cu_kept, rows = _compacted(scores.detach(), arguments, tensors, chosen)
    return indices, cu_kept, *rows


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    keep: float | Tensor | Threshold,
    protect: Tensor | None = None,
    total: int | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of each of B packed sequences that go on, best scores first, order preserved.

    Args:
        scores: [T]; float32 or float64. Higher is better; NaN is worst. Of equal scores the lower
            index wins.
        cu_seqlens: int32 [B + 1], rising from 0 to T. Empty sequences stay empty.
        keep: how many. A fraction in (0, 1]: ceil(keep * length - 1e-6) of a sequence (the 1e-6
            takes back what floating point adds to a product), at least 1; see `kept_count`. An
            int32 tensor [B]: that many, at most all (PoWER-BERT). A `Threshold`: those that score
            at least that (LTP).
        protect: bool [T], tokens kept whatever their score and before all others; a count below
            theirs rises to it. None: the first token of each sequence.
        total: the number of kept tokens where it is known. On a GPU nothing then waits for the
            device, and torch.compile sees a shape; should more be kept there, the last are left
            out, and should fewer be, -1 follows. On CPU a wrong total is an error.
        impl: "reference", "cpu", "triton", "cuda" (its gradient is Triton's), or None for the best
            one of the device.

    Returns:
        indices int64 [T'], ascending, of the kept tokens, and int32 [B + 1], their cu_seqlens.

    Raises:
        ValueError: a shape, dtype, device, option or impl that does not fit.
        ValueError, RuntimeError: on CPU, values of cu_seqlens that do not rise from 0 to T, or a
            `total` that is not the number kept.
        RuntimeError: a named impl is not available here.

    Linear time, the same result on every device. Rules of this kind: PoWER-BERT, arXiv 2001.08950;
    LTP, arXiv 2107.00910; ACC, arXiv 2201.03327.
    """
    return compact_tokens(
        scores, cu_seqlens, keep=keep, protect=protect, total=total, impl=impl
    )  # fmt: skip
