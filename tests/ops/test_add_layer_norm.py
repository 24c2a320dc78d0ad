# SPDX-License-Identifier: Apache-2.0
"""add_layer_norm against float64, torch's own layer_norm and its gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lean_kernels import _extension
from lean_kernels.ops import add_layer_norm

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
# Either side of one and four vectors, whatever their length.
FEATURES = [1, 3, 4, 15, 16, 17, 33, 64, 65, 100, 384, 768]
# Of RMS. Every element takes about ten roundings; the sums' own errors average out.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def inputs(rows, features, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, center=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) + center
        return values.to(dtype)

    x = draw(rows, features, center=0.5)
    residual = draw(rows, features)
    indices = torch.randperm(max(rows, 1), generator=generator)[: rows // 2 + rows % 2]
    return x, residual, draw(features, center=1.0), draw(features), indices


def exact(x, residual, weight, bias, indices=None, eps=1e-12):
    """The definition, in float64."""
    z = x.double() if residual is None else x.double() + residual.double()
    z = z if indices is None else z[indices]
    mean = z.mean(-1, keepdim=True)
    variance = (z - mean).square().mean(-1, keepdim=True)
    y = (z - mean) / (variance + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def error(actual, expected):
    """RMS of the difference over RMS of the expected values."""
    if expected.numel() == 0:
        return 0.0
    difference = actual.detach().double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_options(impl, dtype):
    options = list(itertools.product([False, True], repeat=3))
    for features, rows in itertools.product(FEATURES, (0, 1, 5)):
        x, residual, weight, bias, indices = inputs(rows, features, dtype, features)
        for added, shifted, chosen in options:
            arguments = x, residual if added else None, weight, bias if shifted else None
            picked = indices if chosen else None
            y = add_layer_norm(*arguments, indices=picked, impl=impl)
            expected = exact(*arguments, picked)
            assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
            if features == 1:  # all that is left is the bias
                torch.testing.assert_close(y, expected.to(dtype))
            elif dtype in TOLERANCE:
                # Few features may lie close together, and the difference lose what they share.
                assert error(y, expected) <= TOLERANCE[dtype] * (1 if features > 30 else 30)
            else:
                z = x + residual if added else x
                z = z if picked is None else z[picked]
                dense = error(F.layer_norm(z, [features], weight, arguments[3], 1e-12), expected)
                assert error(y, expected) <= 2 * max(dense, torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_rows_and_every_task_of_them(impl):
    x, residual, weight, bias, _ = inputs(1500, 100)
    y = add_layer_norm(x, residual, weight, bias, impl=impl)
    assert error(y, exact(x, residual, weight, bias)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_rows_with_float32_parameters(impl, dtype):
    x, residual, weight, bias, _ = inputs(7, 100, dtype)
    weight, bias = weight.float() + 1e-4, bias.float() + 1e-4
    y = add_layer_norm(x, residual, weight, bias, impl=impl)
    assert y.dtype == dtype
    # Correctly rounded, but where float32 lands on the other side of a tie.
    expected = exact(x, residual, weight, bias).to(dtype)
    assert (y == expected).float().mean() > 0.99


@pytest.mark.parametrize("impl", IMPLS)
def test_large_means_lose_no_more_than_in_torch(impl):
    x, _, weight, bias, _ = inputs(20, 768)
    x = x + 1e4
    expected = exact(x, None, weight, bias)
    dense = error(F.layer_norm(x, [768], weight, bias, 1e-12), expected)
    assert error(add_layer_norm(x, None, weight, bias, impl=impl), expected) <= 2 * dense


@pytest.mark.parametrize("center", [0.9, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_means_about_as_large_as_the_spread(impl, center):
    x, _, weight, bias, _ = inputs(200, 768)
    x = x - 0.5 + center
    x[:, 0] += torch.linspace(0, 100, 200)  # outliers
    y = add_layer_norm(x, None, weight, bias, impl=impl)
    assert error(y, exact(x, None, weight, bias)) <= TOLERANCE[torch.float32]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, residual, weight, bias, indices = inputs(301, 100, dtype)
    y = add_layer_norm(x, residual, weight, bias, impl="cpu")
    chosen = add_layer_norm(x, residual, weight, bias, indices=indices, impl="cpu")
    assert torch.equal(chosen, y[indices])
    for i in (0, 150, 300):
        alone = add_layer_norm(x[i], residual[i], weight, bias, impl="cpu")
        assert torch.equal(alone, y[i])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_not_chosen_are_not_read(impl):
    x, residual, weight, bias, _ = inputs(9, 33)
    for tensor in (x, residual):
        tensor[1::2] = torch.nan
    indices = torch.tensor([8, 0, 4, 4, 2])
    y = add_layer_norm(x, residual, weight, bias, indices=indices, impl=impl)
    assert error(y, exact(x, residual, weight, bias, indices)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_leading_shape(impl):
    x, residual, weight, bias, _ = inputs(24, 66)
    expected = exact(x[:, ::2], residual[:, ::2], weight[::2], bias[::2])
    y = add_layer_norm(x[:, ::2], residual[:, ::2], weight[::2], bias[::2], impl=impl)
    assert error(y, expected) < 1e-6
    wide = torch.full((24, 100), torch.nan)
    wide[:, 7:73] = x
    y = add_layer_norm(wide[:, 7:73], x[:1].expand(24, 66), weight, bias, impl=impl)
    assert error(y, exact(x, x[:1], weight, bias)) < 1e-6
    cube = x.view(2, 3, 4, 66)
    y = add_layer_norm(cube.transpose(0, 2), None, weight, bias, impl=impl)
    assert error(y, exact(cube.transpose(0, 2), None, weight, bias)) < 1e-6
    y = add_layer_norm(x, residual, weight, bias, indices=torch.arange(24)[::3], impl=impl)
    assert error(y, exact(x, residual, weight, bias, torch.arange(0, 24, 3))) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_values_out_of_range(impl):
    x, _, weight, bias, _ = inputs(4, 40)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 7.0
    y = add_layer_norm(x, None, weight, bias, impl=impl)
    assert y[:2].isnan().all()
    torch.testing.assert_close(y[2], bias)  # no variance
    assert y[3].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    x, residual, weight, bias, _ = inputs(4, 5, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    repeated = torch.tensor([3, 1, 3])
    for indices in (None, repeated):
        assert torch.autograd.gradcheck(
            lambda *t, i=indices: add_layer_norm(*t, indices=i, eps=1e-5, impl=impl), leaves
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_are_those_of_torch(impl, dtype):
    x, residual, weight, bias, indices = inputs(40, 96, dtype)
    grad = torch.randn(len(indices), 96).to(dtype)
    for used in (4, 2, 1):  # all need a gradient; x and residual; x
        leaves = [
            t.clone().requires_grad_(i < used) for i, t in enumerate((x, residual, weight, bias))
        ]
        wide = [t.detach().double().requires_grad_(i < used) for i, t in enumerate(leaves)]
        y = add_layer_norm(*leaves, indices=indices, eps=1e-5, impl=impl)
        z = (wide[0] + wide[1])[indices]
        expected = F.layer_norm(z, [96], wide[2], wide[3], 1e-5)
        ours = torch.autograd.grad(y, leaves[:used], grad)
        theirs = torch.autograd.grad(expected, wide[:used], grad.double())
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            assert error(a, b) <= (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("chosen", [False, True])
def test_compile_with_a_dynamic_batch(impl, chosen):
    def function(x, residual, weight, bias, indices):
        return add_layer_norm(x, residual, weight, bias, indices=indices, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        *tensors, indices = inputs(rows, 24)
        results = []
        for run in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = run(*leaves, indices if chosen else None)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight, bias, indices = inputs(6, 24, dtype)
        op = torch.ops.lean_kernels.add_layer_norm.default
        for arguments in (
            (x, residual, weight, bias, indices, 1e-5),
            (x, None, weight, None, None, 1e-5),
            (x.view(2, 3, 24), None, weight.float(), None, None, 1e-5),
        ):
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_keeps_float32(impl):
    x, residual, weight, bias, _ = inputs(6, 24)
    leaves = [t.requires_grad_() for t in (x.detach().bfloat16(), residual, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = add_layer_norm(*leaves, impl=impl)
    assert y.dtype == torch.float32 and error(y, exact(*leaves)) < 1e-6
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, r"x must be \[\.\.\., D\]"),
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., D\]"),
        ({"x": torch.zeros(4, 0)}, "D at least 1"),
        ({"residual": torch.zeros(4, 7)}, r"residual must be torch.float32 \[4, 8\] like x"),
        ({"residual": torch.zeros(4, 8).half()}, "residual must be torch.float32"),
        ({"weight": torch.zeros(7)}, r"weight must be \[8\]"),
        ({"weight": torch.zeros(8).bfloat16()}, r"weight must be \[8\] in torch.float32, got"),
        ({"bias": torch.zeros(8, 1)}, r"bias must be torch.float32 \[8\] like weight"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, r"indices must be int64 \[N\]"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int64)}, r"indices must be int64 \[N\]"),
        ({"x": torch.zeros(2, 2, 8), "residual": None, "indices": torch.zeros(1).long()}, "T, D"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta, x on cpu"),
        ({"impl": "fast"}, "unknown impl 'fast'; expected one of 'reference', 'cpu', 'triton'"),
        ({"impl": "cuda"}, "unknown impl 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "x": torch.zeros(4, 8),
        "residual": torch.zeros(4, 8),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    } | change
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**63)])
def test_indices_out_of_bounds_are_refused(impl, bad):
    x, weight = torch.zeros(4, 8), torch.ones(8)
    with pytest.raises((ValueError, RuntimeError), match=r"indices must lie in \[0, 4\)"):
        add_layer_norm(x, None, weight, None, indices=torch.tensor([0, bad, 3]), impl=impl)


@needs_cpu_kernels
def test_the_op_itself_refuses_what_does_not_fit():
    op = torch.ops.lean_kernels.add_layer_norm.default
    x, weight = torch.zeros(4, 8), torch.ones(8)
    for arguments, message in (
        ((torch.zeros(4, 0), None, torch.ones(0), None, None), "at least one feature"),
        ((x, torch.zeros(3, 8), weight, None, None), "residual must have x's shape"),
        ((x, None, torch.ones(7), None, None), "weight and bias must be"),
        ((x, None, weight, torch.ones(8).double(), None), "weight and bias must be"),
        ((x, None, weight, None, torch.zeros(2)), "indices int64"),
        ((x.int(), None, weight, None, None), "dtype must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1e-5)
