# SPDX-License-Identifier: Apache-2.0
"""select_tokens against a sort in plain Python; gather and scatter against indexing."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lean_kernels import _extension
from lean_kernels.ops import (
    Threshold,
    compact_tokens,
    gather_tokens,
    scatter_tokens,
    select_tokens,
)
from lean_kernels.ops.token_selection import kept_count

_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
NAN, INF = math.nan, math.inf


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def oracle(scores, lengths, keep, protect=None):
    """Indices and cu_seqlens as lists: sort each sequence, take the best, restore the order."""
    values, indices, cu, begin = scores.tolist(), [], [0], 0
    for b, length in enumerate(lengths):
        tokens = range(begin, begin + length)
        guarded = [i for i in tokens if (i == begin if protect is None else bool(protect[i]))]
        if isinstance(keep, Threshold):
            bar = torch.tensor(keep.value, dtype=scores.dtype).item()
            kept = {i for i in tokens if values[i] >= bar} | set(guarded)
        else:
            wanted = kept_count(keep, length) if isinstance(keep, float) else int(keep[b])
            wanted = max(min(max(wanted, 0), length), len(guarded))
            ranked = sorted(
                tokens,
                key=lambda i: (
                    i not in guarded,
                    math.isnan(values[i]),
                    0 if math.isnan(values[i]) else -values[i],
                    i,
                ),
            )
            kept = set(ranked[:wanted])
        indices += sorted(kept)
        cu.append(len(indices))
        begin += length
    return indices, cu


def check(impl, scores, lengths, keep, protect=None):
    expected, cu = oracle(scores, lengths, keep, protect)
    for total in (None, len(expected)):
        indices, cu_kept = select_tokens(
            scores, cumulative(lengths), keep=keep, protect=protect, total=total, impl=impl
        )
        assert indices.dtype == torch.int64 and cu_kept.dtype == torch.int32
        assert indices.tolist() == expected
        assert cu_kept.tolist() == cu


DTYPES = [torch.float32, torch.float64]
VALUES = [0.0, -0.0, 1.0, -1.0, 0.25, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 3.4e38, -3.4e38]


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(0, 40), max_size=6))
    tokens = sum(lengths)
    values = st.sampled_from(VALUES) | st.floats(-2, 2, width=32)
    scores = draw(st.lists(values, min_size=tokens, max_size=tokens))
    protect = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    counts = st.lists(st.integers(-2, 45), min_size=len(lengths), max_size=len(lengths))
    keep = draw(
        st.floats(0.01, 1.0)
        | counts.map(lambda c: torch.tensor(c, dtype=torch.int32))
        | st.sampled_from([-1.0, 0.0, 0.25, NAN, INF]).map(Threshold)
    )
    dtype = draw(st.sampled_from(DTYPES))
    protect = None if protect is None else torch.tensor(protect, dtype=torch.bool)
    return torch.tensor(scores, dtype=dtype), lengths, keep, protect


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
@example(problem=(torch.zeros(0), [], 0.5, None))
@example(problem=(torch.zeros(0), [0, 0], 0.5, None))
@example(problem=(torch.tensor([NAN] * 5), [5], 0.5, torch.zeros(5, dtype=torch.bool)))
def test_selection_of_any_range_is_that_of_a_sort(impl, problem):
    check(impl, *problem)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_selection(impl, dtype):
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 300, 1500]
    scores = torch.rand(sum(lengths), generator=generator, dtype=torch.float64).to(dtype)
    for keep in (0.01, 0.3, 0.5, 0.99, 1.0, Threshold(0.4), Threshold(2.0), Threshold(-1.0)):
        check(impl, scores, lengths, keep)
        check(impl, (scores * 4).round(), lengths, keep)  # ties
    counts = torch.tensor([length * 2 // 3 for length in lengths], dtype=torch.int32)
    check(impl, -scores, lengths, counts, torch.rand(len(scores), generator=generator) < 0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_nan_and_zeros(impl):
    scores = torch.tensor([0.0, -0.0, 0.0, NAN, -0.0, -INF, NAN, 5.0])
    unprotected = torch.zeros(8, dtype=torch.bool)
    for count, expected in (
        (1, [7]),
        (2, [0, 7]),
        (3, [0, 1, 7]),
        (5, [0, 1, 2, 4, 7]),
        (6, [0, 1, 2, 4, 5, 7]),
        (7, [0, 1, 2, 3, 4, 5, 7]),
    ):
        counts = torch.tensor([count], dtype=torch.int32)
        indices, _ = select_tokens(
            scores, cumulative([8]), keep=counts, protect=unprotected, impl=impl
        )
        assert indices.tolist() == expected
    protected = torch.tensor([0, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    indices, _ = select_tokens(
        scores, cumulative([8]), keep=torch.zeros(1, dtype=torch.int32), protect=protected,
        impl=impl,
    )  # fmt: skip
    assert indices.tolist() == [3, 5]
    assert select_tokens(scores, cumulative([8]), keep=0.2, impl=impl)[0].tolist() == [0, 7]


@pytest.mark.parametrize("impl", IMPLS)
def test_ten_thousand_sequences(impl):
    chance = random.Random(3)
    lengths = [chance.choice([0, 0, 1, 2, 5, 9]) for _ in range(10_000)]
    scores = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(2))
    check(impl, scores, lengths, 0.4)


def test_fractions_are_those_meant_and_not_those_of_floating_point():
    for hundredths in range(1, 101):
        for length in (1, 2, 3, 7, 10, 50, 99, 100, 101, 128, 384, 512, 1000, 4096):
            meant = math.ceil(Fraction(hundredths, 100) * length)
            assert kept_count(hundredths / 100, length) == meant
    assert math.ceil(0.07 * 100) == 8  # what the slack is for
    lengths = [100, 10, 1, 0, 200]
    for impl in ("reference", *(["cpu"] if _missing is None else [])):
        _, cu = select_tokens(torch.rand(311), cumulative(lengths), keep=0.07, impl=impl)
        assert cu.diff().tolist() == [7, 1, 1, 0, 14]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_arguments(impl):
    scores = torch.rand(60, generator=torch.Generator().manual_seed(4))
    protect = torch.zeros(60, dtype=torch.bool)
    protect[::7] = True
    cu = cumulative([10, 0, 20])
    spread = torch.stack((cu, cu + 1), 1)[:, 0]
    expected, _ = oracle(scores[::2], [10, 0, 20], 0.3, protect[::2])
    indices, _ = select_tokens(scores[::2], spread, keep=0.3, protect=protect[::2], impl=impl)
    assert indices.tolist() == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_compaction_is_selection_and_gathering(impl):
    generator = torch.Generator().manual_seed(5)
    scores, cu = torch.rand(40, generator=generator), cumulative([13, 0, 27])
    hidden = torch.randn(40, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(40, dtype=torch.int32)
    indices, cu_kept, rows, where = compact_tokens(
        scores.requires_grad_(), cu, hidden, positions, keep=0.5, impl=impl
    )
    alone = select_tokens(scores, cu, keep=0.5, impl=impl)
    assert torch.equal(indices, alone[0]) and torch.equal(cu_kept, alone[1])
    assert torch.equal(rows, hidden[indices]) and torch.equal(where, positions[indices])
    grad = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad(rows, hidden, grad)
    assert torch.equal(ours, torch.zeros_like(ours).index_copy(0, indices, grad))


COMPANIONS = [
    lambda n: torch.randn(n, 768),
    lambda n: torch.randn(n, 3, 17).bfloat16(),
    lambda n: torch.arange(n),
    lambda n: torch.arange(n, dtype=torch.int32),
    lambda n: torch.randint(0, 2, (n, 5), dtype=torch.bool),
    lambda n: torch.randint(0, 255, (n, 3), dtype=torch.uint8),
    lambda n: torch.randn(n, 0),
    lambda n: torch.randn(n, 2, 4, dtype=torch.complex64),
    lambda n: torch.full((n, 40), NAN)[:, 3:19].copy_(torch.randn(n, 16)),
    lambda n: torch.randn(1, 6).expand(n, 6),
    lambda n: torch.randn(7, n).T,
    lambda n: torch.randn(n, 4, 6).transpose(1, 2),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_gather_and_scatter_of_any_dtype_and_stride(impl, tokens):
    torch.manual_seed(tokens)
    tensors = [make(tokens) for make in COMPANIONS]
    for count in (0, 1, tokens):
        indices = torch.randperm(tokens)[:count]
        rows = gather_tokens(tensors[0], indices, *tensors[1:], impl=impl)
        for row, t in zip(rows, tensors, strict=True):
            assert torch.equal(row, t[indices]) and row.is_contiguous() and row.dtype == t.dtype
        assert torch.equal(gather_tokens(tensors[1], indices, impl=impl), tensors[1][indices])
        for t in rows:
            spread = torch.zeros(tokens, *t.shape[1:], dtype=t.dtype).index_copy(0, indices, t)
            assert torch.equal(scatter_tokens(t, indices, tokens, impl=impl), spread)
            base = torch.ones(tokens, *t.shape[1:], dtype=t.dtype)
            expected = base.index_copy(0, indices, t)
            assert scatter_tokens(t, indices, tokens, out=base, impl=impl) is base
            assert torch.equal(base, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_in_between_are_left_alone(impl):
    guard = torch.full((9, 10), 7.0)
    out, packed = guard[:, 2:8], torch.randn(9, 12)[:, ::2]
    scatter_tokens(packed[:3], torch.tensor([8, 0, 4]), 9, out=out, impl=impl)
    assert torch.equal(out[[8, 0, 4]], packed[:3])
    assert (guard[:, :2] == 7).all() and (guard[:, 8:] == 7).all()
    assert (out[[1, 2, 3, 5, 6, 7]] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gathering_may_repeat_and_empty_tensors_are_fine(impl):
    hidden = torch.randn(4, 3)
    assert torch.equal(gather_tokens(hidden, torch.tensor([3, 3, 0]), impl=impl), hidden[[3, 3, 0]])
    none = torch.zeros(0, dtype=torch.int64)
    assert gather_tokens(hidden[:0], none, impl=impl).shape == (0, 3)
    assert torch.equal(scatter_tokens(hidden[:0], none, 2, impl=impl), torch.zeros(2, 3))
    assert scatter_tokens(hidden[:0], none, 0, impl=impl).shape == (0, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    torch.manual_seed(0)
    indices = torch.tensor([4, 0, 3])
    hidden, other = (torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in "ab")

    def gather(a, b):
        return gather_tokens(a, indices, b, impl=impl)

    def scatter(a):
        return scatter_tokens(a[:3], indices, 5, impl=impl)

    def scatter_into(a, b):
        return scatter_tokens(a[:3], indices, 5, out=b.clone(), impl=impl)

    for function, leaves in (
        (gather, (hidden, other)),
        (scatter, (hidden,)),
        (scatter_into, (hidden, other)),
    ):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_reach_what_needs_them_and_no_more(impl):
    hidden, residual = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    indices = torch.tensor([5, 1])
    rows, added, where = gather_tokens(hidden, indices, residual, torch.arange(6), impl=impl)
    assert rows.requires_grad and not where.requires_grad
    (rows * 2 + added).sum().backward()
    expected = torch.zeros(6, 4)
    expected[indices] = 2
    assert torch.equal(hidden.grad, expected)
    base = torch.randn(6, 4)
    scattered = scatter_tokens(rows, indices, 6, out=base, impl=impl)
    assert scattered is base and base.requires_grad
    with pytest.raises(RuntimeError, match=r"repeat|unique"):
        twice = gather_tokens(hidden, torch.tensor([2, 2]), impl=impl)
        try:
            torch.autograd.grad(twice.sum(), hidden)
        except ValueError as error:  # of the reference
            raise RuntimeError(str(error)) from error


@pytest.mark.parametrize("impl", IMPLS)
def test_scattering_marks_what_it_overwrites(impl):
    base = torch.randn(4, 3)
    weight = torch.randn(4, 3, requires_grad=True)
    y = base * weight  # keeps base for the backward pass
    scatter_tokens(torch.zeros(1, 3), torch.tensor([2]), 4, out=base, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compile_with_a_known_total(impl):
    def function(scores, cu, hidden, packed_at, total):
        indices, cu_kept, rows = compact_tokens(
            scores, cu, hidden, keep=0.5, total=total, impl=impl
        )
        again, _ = select_tokens(scores, cu, keep=Threshold(-1.0), total=len(scores), impl=impl)
        spread = scatter_tokens(rows * 2, indices, len(scores), impl=impl)
        return gather_tokens(spread, again, impl=impl) + packed_at, cu_kept

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([6, 3, 8], [5, 0, 11]):
        cu, tokens = cumulative(lengths), sum(lengths)
        scores = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
        total = sum(kept_count(0.5, n) for n in lengths)
        results = []
        for run in (function, compiled):
            hidden = torch.ones(tokens, 4, requires_grad=True)
            y, cu_kept = run(scores, cu, hidden, torch.ones(tokens, 4), total)
            results.append((y, cu_kept, *torch.autograd.grad(y.square().sum(), hidden)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compile_without_a_total():
    def function(scores, cu):
        indices, cu_kept = select_tokens(scores, cu, keep=0.5)
        return indices + 1, cu_kept

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        scores, cu = torch.rand(9), cumulative([4, 5])
        for ours, eager in zip(compiled(scores, cu), function(scores, cu), strict=True):
            assert torch.equal(ours, eager)


def test_opcheck():
    ops = torch.ops.lean_kernels
    scores, cu, hidden = torch.rand(9), cumulative([4, 5]), torch.randn(9, 3)
    protect, counts = torch.zeros(9, dtype=torch.bool), torch.ones(2, dtype=torch.int32)
    opcheck = torch.library.opcheck
    for arguments in (
        (scores, cu, None, None, 0.5, 0, 5, [hidden]),
        (scores.double(), cu, protect, counts, 0.0, 1, None, []),
        (scores, cu, protect, None, 0.5, 2, None, [hidden, torch.arange(9)]),
    ):
        opcheck(ops.select_tokens.default, arguments)
    indices = torch.tensor([3, 0, 8])
    opcheck(ops.gather_tokens.default, ([hidden, torch.arange(9)], indices))
    opcheck(ops.scatter_tokens.default, (hidden[:3], indices, 9))
    opcheck(ops.scatter_tokens_into.default, (torch.randn(9, 3), hidden[:3], indices))


SCORES, CU = torch.zeros(4), cumulative([3, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": SCORES.half()}, r"scores must be float32 or float64 \[T\]"),
        ({"scores": SCORES[:, None]}, r"scores must be float32 or float64 \[T\]"),
        ({"cu_seqlens": CU.long()}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens": CU[:0]}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens": cumulative([3])}, "must rise from 0 to the number of tokens, 4"),
        ({"cu_seqlens": CU + 1}, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 4], dtype=torch.int32)}, "must rise from 0"),
        ({"protect": torch.zeros(4)}, r"protect must be bool \[4\] like scores"),
        ({"protect": torch.zeros(3, dtype=torch.bool)}, r"protect must be bool \[4\]"),
        ({"protect": torch.zeros(4, dtype=torch.bool, device="meta")}, "protect is on meta"),
        ({"keep": 0}, r"keep must be a fraction in \(0, 1\]"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": NAN}, "got nan"),
        ({"keep": True}, "got True"),
        ({"keep": "half"}, "got 'half'"),
        ({"keep": torch.ones(2)}, r"keep must be int32 \[2\], one count per sequence"),
        ({"keep": torch.ones(3, dtype=torch.int32)}, r"keep must be int32 \[2\]"),
        ({"total": 1}, "total is 1, but 3 tokens are kept"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_selection_refuses_what_does_not_fit(impl, change, message):
    arguments = {"scores": SCORES, "cu_seqlens": CU, "keep": 0.5, "impl": impl} | change
    with pytest.raises((ValueError, RuntimeError), match=message):
        select_tokens(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_moving_refuses_what_does_not_fit(impl):
    hidden, indices = torch.zeros(4, 3), torch.tensor([0, 3])
    errors = (ValueError, RuntimeError)
    for wrong, message in (
        (torch.tensor([0, 4]), r"indices must lie in \[0, 4\)"),
        (torch.tensor([-1, 2]), r"indices must lie in \[0, 4\)"),
        (torch.tensor([-(2**63), 2**62]), r"indices must lie in \[0, 4\)"),
        (indices.int(), r"indices must be int64 \[N\]"),
        (indices[:, None], r"indices must be int64 \[N\]"),
        (indices.to("meta"), "is on"),
    ):
        with pytest.raises(errors, match=message):
            gather_tokens(hidden, wrong, impl=impl)
        with pytest.raises(errors, match=message):
            scatter_tokens(hidden[:2], wrong, 4, impl=impl)
        with pytest.raises(errors, match=message):
            scatter_tokens(hidden[:2], wrong, 4, out=hidden.clone(), impl=impl)
    for call, message in (
        (lambda: gather_tokens(hidden, indices, hidden[:3], impl=impl), "with T = 4"),
        (lambda: gather_tokens(torch.zeros(()), indices, impl=impl), r"\[T, \.\.\.\]"),
        (lambda: scatter_tokens(hidden, indices, 4, impl=impl), "with T = 2"),
        (lambda: scatter_tokens(hidden[:2], indices, -1, impl=impl), "must not be negative"),
        (lambda: scatter_tokens(hidden[:2], indices * 0, 4, impl=impl), "must not repeat"),
        (
            lambda: scatter_tokens(hidden[:2], indices, 4, out=torch.zeros(4, 2), impl=impl),
            r"out must be torch.float32 \[4, 3\]",
        ),
        (
            lambda: scatter_tokens(hidden[:2], indices, 4, out=torch.zeros(3, 4).T, impl=impl),
            "each row of out must be contiguous",
        ),
    ):
        with pytest.raises(errors, match=message):
            call()
