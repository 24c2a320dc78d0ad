# SPDX-License-Identifier: Apache-2.0
"""ngram_embedding_bag against float64, and its gradients."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bags import DTYPES, HALVES, assert_close, bags, error

from lean_kernels import _extension
from lean_kernels.ops import ngram_embedding_bag

_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
# Fewer columns than lanes, and either side of one vector, one pass and several.
FEATURES = [1, 3, 4, 7, 8, 15, 16, 17, 33, 64, 100, 128, 129, 256, 257, 1000]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_sizes_and_options(impl, dtype, mode):
    for features in FEATURES:
        for weighted, padding_idx, index in (
            (False, None, torch.int64),
            (True, 1, torch.int32),
        ):
            problem = bags(
                features=features, dtype=dtype, weighted=weighted, padding_idx=padding_idx,
                index=index, seed=features,
            )  # fmt: skip
            y = problem.run(mode, impl=impl)
            assert y.dtype == (torch.float32 if dtype == torch.int8 else dtype)
            assert_close(y, problem.exact(mode), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bags_longer_than_a_piece(impl, dtype):
    problem = bags((512, 513, 0, 5000, 3), rows=3000, features=40, dtype=dtype, weighted=True)
    for mode in ("sum", "mean"):
        assert_close(problem.run(mode, impl=impl), problem.exact(mode), dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_embedding_bag_of_torch(impl):
    problem = bags(padding_idx=0)
    for mode in ("sum", "mean"):
        theirs = F.embedding_bag(
            problem.ids, problem.table, problem.offsets, mode=mode, include_last_offset=True,
            padding_idx=0,
        )  # fmt: skip
        torch.testing.assert_close(problem.run(mode, impl=impl), theirs)
    negative = replace(problem, padding_idx=-50)
    assert torch.equal(negative.run(impl=impl), problem.run(impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_and_rows_that_do_not_occur_are_not_read(impl):
    problem = bags(padding_idx=5, weighted=True)
    expected = problem.exact()
    table = problem.table.clone()
    used = torch.zeros(50, dtype=torch.bool)
    used[problem.ids[problem.ids != 5]] = True
    table[~used] = torch.nan
    weights = torch.where(problem.ids == 5, torch.nan, problem.weights)
    y = replace(problem, table=table, weights=weights).run(impl=impl)
    assert_close(y, expected, torch.float32)
    only = ngram_embedding_bag(
        torch.tensor([5, 5]), torch.tensor([0, 2]), table, padding_idx=5, impl=impl
    )
    assert not only.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    problem = bags(features=20)
    wide = torch.full((50, 50), torch.nan)
    wide[:, 1:41:2], wide[:, 0] = problem.table, torch.nan
    assert_close(problem.with_table(wide[:, 1:41:2]).run(impl=impl), problem.exact(), torch.float32)
    wide[:, 7:27] = problem.table
    assert_close(problem.with_table(wide[:, 7:27]).run(impl=impl), problem.exact(), torch.float32)
    ids = torch.stack([problem.ids, problem.ids], 1)[:, 0]
    offsets = torch.stack([problem.offsets, problem.offsets], 1)[:, 0]
    y = replace(problem, ids=ids, offsets=offsets).run(impl=impl)
    assert_close(y, problem.exact(), torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    none = torch.zeros(0, dtype=torch.int64)
    table = torch.ones(4, 5, requires_grad=True)
    for offsets, shape in ((torch.zeros(1).int(), (0, 5)), (torch.zeros(4).int(), (3, 5))):
        for sparse in (False, True):
            y = ngram_embedding_bag(none, offsets, table, impl=impl, sparse=sparse)
            assert y.shape == shape and not y.any()
            (grad,) = torch.autograd.grad(y.sum(), table)
            assert grad.shape == (4, 5) and not grad.to_dense().any()
    no_rows = torch.ones(0, 5)
    assert not ngram_embedding_bag(none, torch.zeros(3).int(), no_rows, impl=impl).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    problem = bags((3, 0, 5), rows=4, features=3, dtype=torch.float64, weighted=True, padding_idx=2)
    leaves = [problem.table.requires_grad_(), problem.weights.requires_grad_()]
    for mode in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda table, weights, mode=mode: replace(problem, table=table, weights=weights).run(
                mode, impl=impl
            ),
            leaves,
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_of_common_and_rare_rows(impl, dtype, sparse):
    problem = bags((2000, 0, 7, 300), rows=40, dtype=dtype, weighted=True, padding_idx=3)
    problem = replace(problem, ids=torch.where(problem.ids < 3, 0, problem.ids))  # a hot row
    generator = torch.Generator().manual_seed(1)
    for mode in ("sum", "mean"):
        grad = torch.randn(4, 33, generator=generator).to(dtype)
        results = []
        for used in (problem, replace(problem, table=problem.table.double(),
                                      weights=problem.weights.double())):  # fmt: skip
            leaves = [used.table.clone().requires_grad_(), used.weights.clone().requires_grad_()]
            y = replace(used, table=leaves[0], weights=leaves[1]).run(
                mode, sparse=sparse, impl=impl if used is problem else "reference"
            )
            results.append(torch.autograd.grad(y, leaves, grad.to(y.dtype)))
        (table, weights), (exact_table, exact_weights) = results
        assert table.is_sparse == sparse and table.dtype == dtype
        if sparse:
            assert table.is_coalesced()
            present = problem.ids[problem.ids != 3].unique()
            assert torch.equal(table.indices()[0], present)
        assert_close(table.to_dense(), exact_table.to_dense(), dtype)
        assert weights.dtype == torch.float32 and error(weights, exact_weights) <= 1e-6


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_a_bag_does_not_depend_on_the_others(dtype):
    problem = bags((30, 0, 2000, 5), rows=300, features=70, dtype=dtype, weighted=True)
    y = problem.run(impl="cpu")
    for b in range(4):
        begin, end = problem.offsets[b : b + 2].tolist()
        alone = replace(
            problem, ids=problem.ids[begin:end], weights=problem.weights[begin:end],
            offsets=torch.tensor([0, end - begin]),
        )  # fmt: skip
        assert torch.equal(alone.run(impl="cpu")[0], y[b])


_THREADS = """
import sys, torch
sys.path.insert(0, {folder!r})
from bags import bags
from dataclasses import replace
from pathlib import Path
problem = bags((900, 3, 0, 2500) * 20, rows=500, features=130, weighted=True)
results = []
for threads in (1, 2, 3, 7):
    torch.set_num_threads(threads)
    leaves = [problem.table.clone().requires_grad_(), problem.weights.clone().requires_grad_()]
    used = replace(problem, table=leaves[0], weights=leaves[1])
    for sparse in (False, True):
        y = used.run(impl="cpu", sparse=sparse)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        results.append((y, grads[0].to_dense(), grads[1]))
for other in results[1:]:
    assert all(map(torch.equal, results[0], other))
"""


@needs_cpu_kernels
def test_the_number_of_threads_changes_no_bit():
    script = _THREADS.format(folder=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compile_with_dynamic_sizes(impl):
    def function(ids, offsets, table, weights):
        return ngram_embedding_bag(ids, offsets, table, weights=weights, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 0, 5), (4, 4, 9, 2)):
        problem = bags(lengths, weighted=True)
        results = []
        for run in (function, compiled):
            leaves = [problem.table.clone().requires_grad_(), problem.weights.clone()]
            leaves[1].requires_grad_()
            y = run(problem.ids, problem.offsets, *leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_opcheck():
    ops = torch.ops.lean_kernels
    for dtype in (torch.float32, torch.float16, torch.int8):
        p = bags(dtype=dtype, weighted=True)
        arguments = p.ids, p.offsets, p.table, p.weights, p.scales, 2, True
        torch.library.opcheck(ops.ngram_embedding_bag.default, arguments)
        y = ops.ngram_embedding_bag(*arguments)
        torch.library.opcheck(
            ops.ngram_embedding_bag_grad_weights.default,
            (y, p.ids, p.offsets, p.table, p.scales, 2, True),
        )
        for op in (ops.ngram_embedding_bag_grad_table, ops.ngram_embedding_bag_grad_rows):
            torch.library.opcheck(op.default, (y, p.ids, p.offsets, p.weights, 50, 2, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(4, 8, dtype=torch.int32)}, r"table must be \[V, D\]"),
        ({"table": torch.zeros(4)}, r"table must be \[V, D\]"),
        ({"table": torch.zeros(4, 0)}, "D at least 1"),
        ({"ids": torch.zeros(3)}, r"ids must be int32 or int64 \[N\]"),
        ({"ids": torch.zeros(3, 1).long()}, r"ids must be int32 or int64 \[N\]"),
        ({"offsets": torch.zeros(3)}, r"offsets must be int32 or int64 \[B \+ 1\]"),
        ({"offsets": torch.zeros(0).long()}, r"offsets must be \[B \+ 1\]"),
        ({"weights": torch.zeros(2)}, r"weights must be \[3\] in torch.float32, one per id"),
        ({"weights": torch.zeros(3).half()}, "weights must be"),
        ({"scales": torch.ones(4)}, "go with an int8 table, and with no other"),
        ({"table": torch.zeros(4, 8).char()}, "scales, float32"),
        ({"table": torch.zeros(4, 8).char(), "scales": torch.ones(3)}, r"float32 \[4\], one per"),
        ({"table": torch.zeros(4, 8).char(), "scales": torch.ones(4, requires_grad=True)},
         "take no gradient"),
        ({"padding_idx": 4}, r"padding_idx must lie in \[-4, 4\)"),
        ({"mode": "max"}, "unknown mode 'max'; expected one of"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "ids is on meta, table on cpu"),
        ({"impl": "fast"}, "unknown impl 'fast'; expected one of 'reference', 'cpu', 'triton'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "ids": torch.tensor([0, 1, 3]),
        "offsets": torch.tensor([0, 3]),
        "table": torch.zeros(4, 8),
    } | change
    with pytest.raises(ValueError, match=message):
        ngram_embedding_bag(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**63)])
def test_ids_out_of_bounds_are_refused(impl, bad):
    ids, offsets = torch.tensor([0, bad, 3]), torch.tensor([0, 3])
    with pytest.raises((ValueError, RuntimeError), match=r"ids must lie in \[0, 4\)"):
        ngram_embedding_bag(ids, offsets, torch.zeros(4, 8), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 5, 3], [0, -1, 3], [0, 4], [3]])
def test_offsets_that_do_not_rise_to_the_end_are_refused(impl, offsets):
    with pytest.raises((ValueError, RuntimeError), match="offsets must rise from 0"):
        ngram_embedding_bag(
            torch.tensor([0, 1, 3]), torch.tensor(offsets), torch.zeros(4, 8), impl=impl
        )


@needs_cpu_kernels
def test_the_ops_themselves_refuse_what_does_not_fit():
    ops, p = torch.ops.lean_kernels, bags(features=8)
    grad = torch.zeros(6, 8)
    for call, arguments, message in (
        (ops.ngram_embedding_bag, (p.ids, p.offsets, p.table[0], None, None, -1, True), "V, D"),
        (ops.ngram_embedding_bag, (p.ids.float(), p.offsets, p.table, None, None, -1, True), "ids"),
        (ops.ngram_embedding_bag, (p.ids, p.offsets[:0], p.table, None, None, -1, True), "B . 1"),
        (
            ops.ngram_embedding_bag,
            (p.ids, p.offsets, p.table, p.ids[1:], None, -1, True),
            "one per",
        ),
        (ops.ngram_embedding_bag, (p.ids, p.offsets, p.table.char(), None, None, -1, True), "int8"),
        (ops.ngram_embedding_bag, (p.ids, p.offsets, p.table.int(), None, None, -1, True), "dtype"),
        (ops.ngram_embedding_bag_grad_table, (grad[1:], p.ids, p.offsets, None, 50, -1, True), "6"),
        (ops.ngram_embedding_bag_grad_table, (grad, p.ids, p.offsets, None, 9, -1, True), "ids"),
        (ops.ngram_embedding_bag_grad_rows, (grad, p.ids, p.offsets, None, -1, -1, True), "negat"),
        (
            ops.ngram_embedding_bag_grad_weights,
            (grad[:, :7], p.ids, p.offsets, p.table, None, -1, True),
            "grad must be",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
