# SPDX-License-Identifier: Apache-2.0
"""tensor_train_embedding against a table in float64, and its gradients."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trains import DTYPES, ORDERS, TOLERANCE, error, table_of, train

from lean_kernels import _extension
from lean_kernels.ops import tensor_train_embedding

_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]


def ids_of(cores, count=200, seed=0):
    """Some often, in no order."""
    rows = math.prod(core.shape[0] for core in cores)
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator) ** 2 * rows).long()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ORDERS, ids=str)
def test_orders_and_sizes(impl, dtype, shape):
    cores = train(*shape, dtype)
    table, ids = table_of(cores), ids_of(cores)
    width = table.shape[1]
    for features in {width, max(1, width - 3), 1}:
        y = tensor_train_embedding(ids, cores, embedding_dim=features, impl=impl)
        expected = table[ids][:, :features]
        assert y.dtype == dtype and y.is_contiguous()
        # Float32 products rounded once.
        limit = TOLERANCE.get(dtype) or torch.finfo(dtype).eps / 2
        assert error(y, expected) <= limit


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_of_any_shape_and_strides(impl):
    cores = train((3, 4, 5), (2, 4, 8), (6, 7))
    strided = [torch.stack([core, core], -1)[..., 0] for core in cores]
    table = table_of(cores)
    for ids in (
        torch.tensor(7),
        torch.zeros(0, 3).long(),
        torch.arange(24).view(2, 3, 4).transpose(0, 2),
        torch.arange(10, dtype=torch.int32)[::3],
        torch.tensor([5, 5, 5]),
    ):
        y = tensor_train_embedding(ids, strided, embedding_dim=50, impl=impl)
        assert y.shape == (*ids.shape, 50)
        assert error(y, table[ids.long()][..., :50]) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ORDERS[::2], ids=str)
def test_gradcheck(impl, shape):
    cores = [core.requires_grad_() for core in train(*shape, torch.float64)]
    width = math.prod(core.shape[2] for core in cores)
    ids = torch.tensor([[0, 3], [3, 1], [2, 0]])
    for options in ({}, {"padding_idx": 3}, {"scale_grad_by_freq": True}):
        if options == {}:
            assert torch.autograd.gradcheck(
                lambda *c: tensor_train_embedding(
                    ids, c, embedding_dim=max(1, width - 1), impl=impl
                ),
                cores,
                fast_mode=True,
            )
            continue
        # What nn.Embedding gives the table, in the cores.
        rows = math.prod(core.shape[0] for core in cores)
        table = torch.zeros(rows, width, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(3, 2, width, dtype=torch.float64)
        looked = torch.nn.functional.embedding(ids, table, **options)
        (dtable,) = torch.autograd.grad(looked, table, grad)
        expected = torch.autograd.grad(table_of(cores), cores, dtable)
        y = tensor_train_embedding(ids, cores, embedding_dim=width, impl=impl, **options)
        for a, b in zip(torch.autograd.grad(y, cores, grad), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ORDERS, ids=str)
def test_gradients_of_many_rows(impl, dtype, shape):
    cores = [core.requires_grad_() for core in train(*shape, dtype)]
    exact = [core.detach().double().requires_grad_() for core in cores]
    ids = ids_of(cores, 1500)
    table = table_of(exact)
    features = max(1, table.shape[1] - 2)
    grad = torch.randn(1500, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = tensor_train_embedding(ids, cores, embedding_dim=features, impl=impl)
    ours = torch.autograd.grad(y, cores, grad)
    theirs = torch.autograd.grad(table[ids][:, :features], exact, grad.double())
    for core, a, b in zip(cores, ours, theirs, strict=True):
        assert a.dtype == dtype and a.shape == core.shape
        assert error(a, b) <= (TOLERANCE.get(dtype) or torch.finfo(dtype).eps / 2)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    cores = train((6, 7, 8), (3, 4, 5), (9, 10), dtype)
    ids = ids_of(cores, 500)
    y = tensor_train_embedding(ids, cores, embedding_dim=60, impl="cpu")
    for i in (0, 100, 499):
        alone = tensor_train_embedding(ids[i : i + 1], cores, embedding_dim=60, impl="cpu")
        assert torch.equal(alone[0], y[i])


_THREADS = """
import sys, torch
sys.path.insert(0, {folder!r})
from trains import train
from lean_kernels.ops import tensor_train_embedding
cores = [core.requires_grad_() for core in train((15, 14, 13), (4, 4, 8), (16, 11))]
ids = torch.randint(15 * 14 * 13, (4000,), generator=torch.Generator().manual_seed(0))
results = []
for threads in (1, 2, 3, 7):
    torch.set_num_threads(threads)
    y = tensor_train_embedding(ids, cores, embedding_dim=128, impl="cpu")
    results.append((y, *torch.autograd.grad(y.square().sum(), cores)))
for other in results[1:]:
    assert all(map(torch.equal, results[0], other))
"""


@needs_cpu_kernels
def test_the_number_of_threads_changes_no_bit():
    script = _THREADS.format(folder=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compile_with_dynamic_sizes(impl):
    def function(ids, *cores):
        return tensor_train_embedding(ids, cores, embedding_dim=30, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    cores = [core.requires_grad_() for core in train((3, 4, 5), (2, 4, 8), (6, 7))]
    for count in (5, 11):
        ids = ids_of(cores, count)
        results = []
        for run in (function, compiled):
            y = run(ids, *cores)
            results.append((y, *torch.autograd.grad(y.square().sum(), cores)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_opcheck():
    cores = train((3, 4, 5), (2, 4, 8), (6, 7))
    ids = torch.arange(12).view(3, 4)
    ops = torch.ops.lean_kernels
    torch.library.opcheck(ops.tensor_train_embedding.default, (ids, cores, 60, 33))
    grad = torch.randn(3, 4, 33)
    arguments = grad, ids, cores, 60, 2, True
    torch.library.opcheck(ops.tensor_train_embedding_grad.default, arguments)


GOOD = train((3, 4), (2, 4), (5,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids must be int32 or int64"),
        ({"cores": GOOD[:1]}, "expected 2 to 4 cores, got 1"),
        ({"cores": [*GOOD, *GOOD, *GOOD]}, "expected 2 to 4 cores, got 6"),
        ({"cores": GOOD[::-1]}, r"core 0 must be \[v, 1, d, r\]"),
        ({"cores": [GOOD[0], GOOD[0]]}, r"core 1 must be \[v, 5, d, r\]"),
        ({"cores": [GOOD[0], GOOD[1].double()]}, "for all cores"),
        ({"cores": [GOOD[0][0], GOOD[1]]}, "core 0 must be"),
        ({"cores": [GOOD[0], torch.zeros(4, 5, 4, 2)]}, r"last core must be \[v, r, d, 1\]"),
        ({"embedding_dim": 9}, "have 12 rows of 8"),
        ({"num_embeddings": 13}, "have 12 rows of 8"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "core 0 is on cpu, ids on met"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"ids": torch.tensor([0, 11]), "cores": GOOD, "embedding_dim": 8} | change
    with pytest.raises(ValueError, match=message):
        tensor_train_embedding(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 11, 2**40, -(2**63)])
def test_ids_out_of_bounds_are_refused(impl, bad):
    with pytest.raises((ValueError, RuntimeError), match=r"ids must lie in \[0, 11\)"):
        tensor_train_embedding(
            torch.tensor([0, bad, 3]), GOOD, embedding_dim=8, num_embeddings=11, impl=impl
        )


@needs_cpu_kernels
def test_the_ops_themselves_refuse_what_does_not_fit():
    ops, ids, grad = torch.ops.lean_kernels, torch.tensor([0, 11]), torch.zeros(2, 8)
    for call, arguments, message in (
        (ops.tensor_train_embedding, (ids.float(), GOOD, 12, 8), "ids must be"),
        (ops.tensor_train_embedding, (ids, GOOD[:1], 12, 8), "2 to 4 cores"),
        (ops.tensor_train_embedding, (ids, GOOD[::-1], 12, 8), "core 0 must be"),
        (ops.tensor_train_embedding, (ids, [GOOD[0], GOOD[1].double()], 12, 8), "core 1 must be"),
        (ops.tensor_train_embedding, (ids, GOOD, 13, 8), "num_embeddings"),
        (ops.tensor_train_embedding, (ids, GOOD, 12, 9), "embedding_dim"),
        (ops.tensor_train_embedding_grad, (grad[:1], ids, GOOD, 12, -1, False), "grad must be"),
        (ops.tensor_train_embedding_grad, (grad, ids, GOOD, 13, -1, False), "num_embeddings"),
        (ops.tensor_train_embedding_grad, (grad, ids, GOOD, 11, -1, False), "ids must lie"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
