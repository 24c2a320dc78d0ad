# SPDX-License-Identifier: Apache-2.0
"""low_rank_embedding: forward, gradients, determinism and errors."""

from itertools import product

import pytest
import torch
from embeddings import ACTIVATIONS, SIZES, problem
from problems import DTYPES, HALVES, IMPLS, assert_accurate, error, needs_cpu_kernels, same_bits

from lean_kernels.ops import low_rank_embedding
from lean_kernels.ops._row_norm import RowNorm
from lean_kernels.ops.low_rank_embedding import op, reference

ops = torch.ops.lean_kernels


def check(p, impl):
    assert_accurate(p.run(impl), p.exact(), p.like_torch())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [s for s in SIZES if s != (7, 1, 1)], ids=str)
def test_forward(size, dtype, impl):
    for int8, bias in product((False, True), (False, True)):
        check(problem(size, dtype=dtype, int8=int8, bias=bias), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, impl):
    check(problem((20, 33, 129), dtype=dtype, activation=activation), impl)


def test_elu_is_exact_near_zero():
    ids, codes = torch.arange(1000), torch.linspace(-1e-4, 0, 1000)[:, None]
    rows = low_rank_embedding(ids, codes, torch.ones(4, 1), activation="elu")
    exact = torch.expm1(codes.double()).expand(-1, 4)
    torch.testing.assert_close(rows.double(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("added", [0, 1, 2])
def test_the_end_of_a_row(added, norm, dtype, impl):
    check(problem((20, 33, 129), dtype=dtype, added=added, norm=norm), impl)
    check(problem((20, 16, 64), dtype=dtype, added=added, norm=norm, activation="elu"), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_of_rows_far_from_zero(impl):
    p = problem((20, 33, 129), added=1, norm="layer")
    p.options["added"][0][1].add_(1000)
    assert error(p.run(impl), p.exact()) <= 2 * error(p.like_torch(), p.exact())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (13,), (2, 3, 7), (300,)], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_of_any_shape(lead, ids_dtype, impl):
    p = problem((50, 8, 48), lead, added=2, norm="layer", ids_dtype=ids_dtype)
    assert p.run(impl).shape == (*lead, 48)
    assert_accurate(p.run(impl), p.exact(), p.like_torch())


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    p = problem((50, 33, 160))
    p.ids = p.ids.t()
    p.codes = torch.randn(50, 40)[:, 3:36]
    p.decoder = torch.randn(33, 320).t()[::2]
    p.bias = torch.randn(320)[::2]
    check(p, impl)
    p.codes = torch.randn(33, 50).t()
    p.ids = torch.tensor(7).expand(4, 70)
    check(p, impl)


@needs_cpu_kernels
def test_large_outputs_past_the_caches():
    p = problem((50, 8, 512), (5000,), added=1, norm="layer")
    check(p, "cpu")
    check(problem((50, 8, 1024), (5000,), dtype=torch.bfloat16), "cpu")


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("places", [300, 5000])
@pytest.mark.parametrize("size", [(50, 8, 528), (3000, 75, 512), (40, 600, 528)], ids=str)
def test_rows_are_copied_to_all_their_places(size, places, dtype):
    p = problem(size, (places,), dtype, activation="relu")
    p.ids[places // 2 :] = 7
    check(p, "cpu")
    rows = p.run()
    assert same_bits(rows[p.ids == 7], rows[-1].expand(int((p.ids == 7).sum()), -1).contiguous())


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_its_ids_alone(dtype):
    p = problem((300, 33, 160), (700,), dtype=dtype, activation="elu", norm="layer")
    whole = p.run()
    for rows in (slice(0, 1), slice(3, 8), slice(100, 163), slice(699, 700)):
        p.ids, ids = p.ids[rows], p.ids
        assert same_bits(p.run(), whole[rows])
        p.ids = ids
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same_bits(p.run(), whole)
    finally:
        torch.set_num_threads(before)


@needs_cpu_kernels
def test_one_row_may_take_as_long_as_several_tasks():
    p = problem((50, 8, 528), (130,), norm="layer")
    p.ids[5:] = 7
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        check(p, "cpu")
    finally:
        torch.set_num_threads(before)


def grad_arguments(p, grad, padding_idx=-1, by_frequency=False, sparse=False):
    code = op.ACTIVATIONS.index(p.options["activation"])
    scales = p.options.get("scales")
    need = (scales is None, True, p.bias is not None)
    table = (p.codes, scales, p.decoder, p.bias, code)
    return (grad, p.ids, *table, padding_idx, by_frequency, sparse, *need)


def exact_grads(arguments):
    doubled = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]
    doubled[6] = op.ACTIVATIONS[doubled[6]]
    return reference.grad(*doubled)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(50, 75, 160), (20, 33, 129), (33, 16, 64), (300, 5, 40)], ids=str
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, size, dtype):
    p = problem(size, (700,), dtype, activation=activation)
    grad = torch.randn(700, size[2]).to(dtype)
    padded = {"padding_idx": 2, "by_frequency": True}
    for options in ({}, padded, {"sparse": True}, {"sparse": True, **padded}):
        arguments = grad_arguments(p, grad, **options)
        ours, exact = op._grad.of(None, "cpu")(*arguments), exact_grads(arguments)
        assert torch.equal(ours[0], exact[0])
        for got, wanted in zip(ours[1:], exact[1:], strict=True):
            limit = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 4e-3)
            assert error(got, wanted) <= limit


@needs_cpu_kernels
def test_gradients_of_int8_codes_are_of_the_decoder():
    p = problem((50, 33, 129), (70,), int8=True, activation="elu")
    arguments = grad_arguments(p, torch.randn(70, 129))
    ours, exact = op._grad.of(None, "cpu")(*arguments), exact_grads(arguments)
    assert ours[0].numel() == ours[1].numel() == 0
    assert error(ours[2], exact[2]) <= 1e-6
    assert error(ours[3], exact[3]) <= 1e-6


@needs_cpu_kernels
@pytest.mark.parametrize("hot", [False, True])
def test_gradients_do_not_depend_on_threads(hot):
    p = problem((300, 33, 160), (3000,))
    p.ids = p.ids * 0 if hot else p.ids
    arguments = grad_arguments(p, torch.randn(3000, 160), sparse=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(op._grad.of(None, "cpu")(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", [None, "gelu", "elu"])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_gradcheck(norm, activation, impl):
    p = problem((6, 3, 5), (2, 4), torch.float64, activation=activation, added=2, norm=norm)
    (ids0, table0), (ids1, table1) = p.options["added"]
    leaves = [p.codes, p.decoder, p.bias, table0, table1]
    if norm:
        leaves += [p.options["norm"].weight, p.options["norm"].bias]

    def function(codes, decoder, bias, first, second, *scale):
        return low_rank_embedding(
            p.ids, codes, decoder, bias, activation=activation, impl=impl,
            added=((ids0, first), (ids1, second)),
            norm=RowNorm(norm, *scale, 1e-3) if norm else None,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("impl", IMPLS)
def test_arguments_of_embedding_mean_the_same(impl):
    p = problem((20, 8, 24), (3, 30), bias=False)
    grad = torch.randn(3, 30, 24)
    for options in (
        {"padding_idx": 3}, {"padding_idx": -2}, {"scale_grad_by_freq": True}, {"sparse": True},
        {"sparse": True, "padding_idx": 3},
    ):  # fmt: skip
        codes = p.codes.clone().requires_grad_()
        p.codes, plain = codes, p.codes
        p.run(impl, **options).backward(grad)
        p.codes = plain
        expected = plain.clone().requires_grad_()
        (torch.nn.functional.embedding(p.ids, expected, **options) @ p.decoder.t()).backward(grad)
        assert codes.grad.is_sparse == expected.grad.is_sparse
        torch.testing.assert_close(codes.grad.to_dense(), expected.grad.to_dense())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("places", [0, 30])
def test_a_sparse_gradient_is_coalesced_and_adds_up(places, impl):
    p = problem((20, 8, 24), (places,), bias=False)
    p.codes.requires_grad_()

    def run():
        return p.run(impl, sparse=True, padding_idx=3)

    (once,) = torch.autograd.grad(run(), p.codes, torch.ones(places, 24))
    assert once.is_coalesced()
    assert once._indices()[0].tolist() == sorted(set(p.ids.tolist()) - {3})
    for _ in range(2):
        run().backward(torch.ones(places, 24))
    torch.testing.assert_close(p.codes.grad.to_dense(), 2 * once.to_dense())


@needs_cpu_kernels
def test_a_sparse_gradient_compiles():
    p = problem((20, 8, 24), (30,), bias=False)
    p.codes.requires_grad_()

    def step(codes, ids):
        (low_rank_embedding(ids, codes, p.decoder, sparse=True) ** 2).sum().backward()

    step(p.codes, p.ids)
    expected, p.codes.grad = p.codes.grad.to_dense(), None
    torch.compile(step)(p.codes, p.ids)
    torch.testing.assert_close(p.codes.grad.to_dense(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_gradients_are_as_good_as_torch(dtype, impl):
    grad, results = torch.randn(70, 129).to(dtype), []
    for run in (lambda q: q.run(impl), lambda q: q.like_torch(), lambda q: q.exact()):
        q = problem((50, 33, 129), (70,), dtype, norm="layer", added=1)
        norm, (_, table) = q.options["norm"], q.options["added"][0]
        leaves = [q.codes, q.decoder, q.bias, norm.weight, norm.bias, table]
        for leaf in leaves:
            leaf.requires_grad_()
        y = run(q)
        results.append(torch.autograd.grad(y, leaves, grad.to(y.dtype)))
    for ours, theirs, exact in zip(*results, strict=True):
        assert error(ours, exact.double()) <= 2 * error(theirs, exact.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3)}, "ids must be int32 or int64, got torch.float32"),
        ({"codes": torch.zeros(50, 8, 1)}, r"codes must be torch.float32 \[V, 8\]"),
        ({"codes": torch.zeros(50, 7)}, r"codes must be torch.float32 \[V, 8\].*got .*\[50, 7\]"),
        ({"codes": torch.zeros(50, 8, dtype=torch.int8)}, "codes must be torch.float32 .*int8"),
        ({"decoder": torch.zeros(0, 8)}, r"decoder must be \[D, rank\], not empty"),
        ({"decoder": torch.zeros(24, 8, dtype=torch.int32)}, "decoder must be .*got torch.int32"),
        ({"bias": torch.zeros(23)}, r"bias must be torch.float32 \[24\], got torch.float32 \[23\]"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; expected one of"),
        ({"scales": torch.zeros(50)}, r"codes must be torch.int8 \[V, 8\]"),
        ({"impl": "gpu"}, "unknown impl 'gpu'; expected one of 'reference', 'cpu', 'triton'"),
        ({"padding_idx": 50}, r"padding_idx must lie in \[-50, 50\), got 50"),
        ({"norm": "layer"}, "norm must be None or RowNorm"),
        ({"norm": RowNorm("layer", torch.zeros(23))}, r"norm weight must be \[24\]"),
        ({"added": ((torch.zeros(3, dtype=torch.int64), torch.zeros(2, 23)),)}, "an added table"),
        ({"added": ((torch.zeros(4, dtype=torch.int64), torch.zeros(2, 24)),)}, "must broadcast"),
        ({"codes": torch.zeros(50, 8, device="meta")}, "is on cpu, codes on meta"),
    ],
)  # fmt: skip
def test_errors(change, message):
    arguments = {
        "ids": torch.zeros(3, dtype=torch.int64),
        "codes": torch.zeros(50, 8),
        "decoder": torch.zeros(24, 8),
    }
    with pytest.raises(ValueError, match=f"low_rank_embedding: .*{message}"):
        low_rank_embedding(**arguments | change)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_bounds(dtype, bad, impl):
    p = problem((50, 8, 24), (7,), ids_dtype=dtype)
    p.ids[3] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"ids must lie in \[0, 50\)"):
        p.run(impl)
    p = problem((50, 8, 24), (7,), added=1)
    p.options["added"] = ((torch.full((7,), bad, dtype=dtype), torch.zeros(50, 24)),)
    with pytest.raises((IndexError, RuntimeError), match=r"added ids must lie in \[0, 50\)"):
        p.run(impl)


@needs_cpu_kernels
def test_the_op_itself_refuses_what_does_not_fit():
    p = problem((50, 8, 24), (7,))
    end = (None, None, None, None, 0, None, None, 0.0)
    for codes, scales, decoder, bias, code in (
        (p.codes[:, :7], None, p.decoder, p.bias, 0),
        (p.codes.double(), None, p.decoder, p.bias, 0),
        (p.codes, torch.zeros(50), p.decoder, p.bias, 0),
        (p.codes, None, p.decoder, p.bias[:7], 0),
        (p.codes, None, p.decoder, p.bias, 4),
        (p.codes, None, p.decoder, p.bias, -1),
    ):
        with pytest.raises(RuntimeError, match="low_rank_embedding: "):
            ops.low_rank_embedding(p.ids, codes, scales, decoder, bias, code, *end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    for options in ({}, {"added": 2, "norm": "layer", "activation": "elu"}, {"int8": True}):
        p = problem((50, 8, 24), (3, 7), dtype, **options)
        code = op.ACTIVATIONS.index(p.options["activation"])
        end = op._row_norm.spread(p.options.get("added", ()), p.ids.shape)
        end += op._row_norm.flatten(p.options.get("norm"))
        scales = p.options.get("scales")
        table = (p.codes, scales, p.decoder, p.bias, code)
        torch.library.opcheck(ops.low_rank_embedding.default, (p.ids, *table, *end))
        for sparse in (False, True):
            arguments = grad_arguments(p, torch.randn(3, 7, 24).to(dtype), sparse=sparse)
            torch.library.opcheck(ops.low_rank_embedding_grad.default, arguments)
