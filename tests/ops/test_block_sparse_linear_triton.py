# SPDX-License-Identifier: Apache-2.0
"""Numerics of the Triton kernels, on a GPU or, by test_triton_interpreter.py, on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    guarded_empty,
    mend_bfloat16,
    on_gpu,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

from lean_kernels.ops import block_sparse_linear  # noqa: E402
from lean_kernels.ops.block_sparse_linear import bsr, reference, triton  # noqa: E402
from lean_kernels.ops.block_sparse_linear.op import ACTIVATIONS  # noqa: E402

BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16), (256, 16), (16, 256)]
NARROW_BLOCKS = [(1, 16), (16, 1), (4, 16), (2, 8)]
HALVES = [torch.bfloat16, torch.float16]
# exp(-z) may overflow where 1 / (1 + exp(-z)) is 0; only the interpreter says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    mend_bfloat16(monkeypatch, triton)


def uneven_mask(block_rows: int, block_cols: int) -> torch.Tensor:
    """A random pattern with a full first row, and an empty second one where there are two."""
    mask = torch.rand(block_rows, block_cols) < 0.4
    mask[0] = True
    mask[1:2] = False
    return mask


def problem(tokens, out_features, in_features, block, dtype=torch.float32, mask=None):
    """x, (weight, crow, col), bias, residual, grad."""
    torch.manual_seed(0)
    if mask is None:
        mask = uneven_mask(*bsr.grid(out_features, in_features, block))
    dense = torch.randn(out_features, in_features, dtype=dtype)
    matrix = tuple(t.to(DEVICE) for t in bsr.from_dense(dense, mask, block))
    x, bias, residual, grad = (
        torch.randn(*shape, dtype=dtype).to(DEVICE)
        for shape in (
            (tokens, in_features),
            (out_features,),
            (tokens, out_features),
            (tokens, out_features),
        )
    )
    return x, matrix, bias, residual, grad


def exact_forward(x, matrix, bias=None, residual=None, activation=None, out_features=None):
    weight, *indices = matrix
    bias, residual = (t if t is None else t.double() for t in (bias, residual))
    return reference.forward(
        x.double(), weight.double(), *indices, bias, residual, out_features, activation
    )


def exact_grads(x, matrix, grad):
    weight, *indices = matrix
    x, weight, grad = x.double(), weight.double(), grad.double()
    dx = reference.grad_input(grad, weight, *indices, x.shape[-1])
    return dx, reference.grad_weight(grad, x, *indices, *weight.shape[1:])


def forward(x, matrix, bias=None, residual=None, activation=None, out_features=None):
    code = ACTIVATIONS.index(activation)
    return triton.forward(x, *matrix, bias, residual, out_features, code)


def grads(x, matrix, grad):
    weight, *indices = matrix
    dx = triton.grad_input(grad, weight, *indices, x.shape[-1])
    return dx, triton.grad_weight(grad, x, *indices, *weight.shape[1:])


def error(actual, exact) -> float:
    """RMS of the error over RMS of the exact values."""
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm())


def sizes(block: tuple[int, int]) -> tuple[int, int]:
    """out_features and in_features that end inside a block (where blocks have an inside)."""
    return max(33, 2 * block[0] + 5), max(50, 2 * block[1] + 3)


@pytest.mark.parametrize("block", BLOCKS + NARROW_BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
def test_float32(block):
    n, k = sizes(block)
    x, matrix, bias, _, grad = problem(7, n, k, block)
    assert (
        error(
            forward(x, matrix, bias, out_features=n), exact_forward(x, matrix, bias, None, None, n)
        )
        < 1e-6
    )
    dx, dw = grads(x, matrix, grad)
    exact_dx, exact_dw = exact_grads(x, matrix, grad)
    assert error(dx, exact_dx) < 1e-6
    assert error(dw, exact_dw) < 1e-6
    assert dw.stride() == bsr.blocks_empty(dw.shape[0], block).stride()


@pytest.mark.parametrize(
    "block", [(16, 16), (32, 32), (64, 64), (4, 16)], ids=lambda b: f"{b[0]}x{b[1]}"
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_errs_no_more_than_twice_dense(block, dtype):
    n, k = sizes(block)
    x, matrix, bias, _, grad = problem(37, n, k, block, dtype)
    weight, crow, col = matrix
    dense = bsr.to_dense(weight, crow, col, n, k)
    exact = exact_forward(x, matrix, bias, None, None, n)
    bound = 2 * error(F.linear(x, dense, bias), exact)
    assert error(forward(x, matrix, bias, out_features=n), exact) <= bound
    dx, dw = grads(x, matrix, grad)
    exact_dx, exact_dw = exact_grads(x, matrix, grad)
    assert error(dx, exact_dx) <= 2 * error(grad @ dense, exact_dx)
    dense_dw = bsr.gather_blocks(grad.t() @ x, crow, col, block)
    assert error(dw, exact_dw) <= 2 * error(dense_dw, exact_dw)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_epilogue(activation, residual, dtype):
    x, matrix, bias, addend, _ = problem(19, 45, 40, (16, 16), dtype)
    extra = (bias, addend if residual else None, activation, 45)
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    assert error(forward(x, matrix, *extra), exact_forward(x, matrix, *extra)) < bound


def test_relu_keeps_nan():
    x, matrix, bias, _, _ = problem(3, 32, 32, (16, 16))
    x[1] = torch.nan
    y = forward(x, matrix, bias, None, "relu", 32)
    assert bool(y[1, :16].isnan().all()) and not bool(y[[0, 2]].isnan().any())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_padding_has_no_effect_and_gets_zero_gradient():
    x, (weight, crow, col), bias, _, grad = problem(6, 45, 40, (16, 16))
    exact = exact_forward(x, (weight, crow, col), bias, None, None, 45)
    exact_dx, _ = exact_grads(x, (weight, crow, col), grad)
    rows = bsr.row_indices(crow, col.numel())
    padding = torch.zeros_like(weight, dtype=torch.bool)
    padding[rows == 2, 45 % 16 :] = True
    padding[col == 2, :, 40 % 16 :] = True
    matrix = (weight.masked_fill(padding, torch.nan), crow, col)
    assert error(forward(x, matrix, bias, out_features=45), exact) < 1e-6
    assert error(grads(x, matrix, grad)[0], exact_dx) < 1e-6
    infinite = torch.full_like(x, torch.inf), torch.full_like(grad, torch.inf)
    dw = grads(infinite[0], matrix, infinite[1])[1]
    assert bool((dw[padding] == 0).all()) and bool((dw[~padding] == torch.inf).all())


def test_strides():
    x, matrix, bias, residual, grad = problem(12, 45, 40, (16, 16))
    exact = exact_forward(x, matrix, bias, residual, "gelu", 45)
    exact_dx, exact_dw = exact_grads(x, matrix, grad)

    def inside_nan(t):
        frame = torch.full((t.shape[0] + 4, t.shape[1] + 4), torch.nan, device=DEVICE)
        frame[2:-2, 2:-2] = t
        return frame[2:-2, 2:-2]

    weight, crow, col = matrix
    for w in (weight, weight.contiguous(), weight.repeat_interleave(2, dim=0)[::2]):
        for view in (inside_nan, lambda t: t.t().contiguous().t()):
            packed = (w, crow, col)
            spread = bias.repeat_interleave(2)[::2]
            y = forward(view(x), packed, spread, view(residual), "gelu", 45)
            assert error(y, exact) < 1e-6
            dx, dw = grads(view(x), packed, view(grad))
            assert error(dx, exact_dx) < 1e-6
            assert error(dw, exact_dw) < 1e-6


def test_leading_dimensions_and_expanded_grad():
    x, matrix, _, residual, _ = problem(12, 45, 40, (16, 16))
    y = forward(x.view(3, 4, 40), matrix, None, residual.view(3, 4, 45), None, 45)
    assert y.shape == (3, 4, 45)
    assert error(y.view(12, 45), exact_forward(x, matrix, None, residual, None, 45)) < 1e-6
    grad = torch.ones(1, device=DEVICE).expand(3, 4, 45)
    dx, dw = grads(x.view(3, 4, 40), matrix, grad)
    exact_dx, exact_dw = exact_grads(x, matrix, grad.reshape(12, 45))
    assert error(dx.view(12, 40), exact_dx) < 1e-6
    assert error(dw, exact_dw) < 1e-6


def test_vector_input():
    x, matrix, bias, _, _ = problem(1, 45, 40, (16, 16))
    exact = exact_forward(x, matrix, bias, None, None, 45)
    assert error(forward(x[0], matrix, bias, out_features=45), exact[0]) < 1e-6


def test_no_tokens():
    x, matrix, bias, _, grad = problem(0, 45, 40, (16, 16))
    assert forward(x, matrix, bias, out_features=45).shape == (0, 45)
    dx, dw = grads(x, matrix, grad)
    assert dx.shape == (0, 40)
    assert torch.equal(dw, torch.zeros_like(dw))


def test_no_blocks():
    empty = torch.zeros(3, 3, dtype=torch.bool)
    x, matrix, bias, residual, grad = problem(5, 45, 40, (16, 16), mask=empty)
    y = forward(x, matrix, bias, residual, "silu", 45)
    torch.testing.assert_close(y, F.silu(bias).expand(5, 45) + residual)
    dx, dw = grads(x, matrix, grad)
    assert torch.equal(dx, torch.zeros_like(x))
    assert dw.shape == (0, 16, 16)


def test_skewed_pattern():
    mask = torch.zeros(4, 19, dtype=torch.bool)
    mask[2] = True
    mask[:, 3] = True
    x, matrix, bias, _, grad = problem(20, 64, 300, (16, 16), mask=mask)
    exact = exact_forward(x, matrix, bias, None, None, 64)
    assert error(forward(x, matrix, bias, out_features=64), exact) < 1e-6
    dx, dw = grads(x, matrix, grad)
    exact_dx, exact_dw = exact_grads(x, matrix, grad)
    assert error(dx, exact_dx) < 1e-6
    assert error(dw, exact_dw) < 1e-6


def test_more_token_tiles_than_walk_together():
    tokens = 9 * 64 + 5  # a group is 8 tiles of at most 64 rows in float32
    x, matrix, bias, _, grad = problem(tokens, 45, 40, (16, 16))
    exact = exact_forward(x, matrix, bias, None, None, 45)
    assert error(forward(x, matrix, bias, out_features=45), exact) < 1e-6
    exact_dx, exact_dw = exact_grads(x, matrix, grad)
    dx, dw = grads(x, matrix, grad)
    assert error(dx, exact_dx) < 1e-6
    assert error(dw, exact_dw) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_grad_weight_in_parts(monkeypatch, dtype):
    x, matrix, _, _, grad = problem(101, 45, 40, (16, 16), dtype)
    whole = grads(x, matrix, grad)[1]
    monkeypatch.setattr(triton, "_SPLIT_TOKENS", 25)  # 4 parts, the last one shorter
    launches = []
    kernel = triton._grad_weight_kernel

    class Recorder:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton, "_grad_weight_kernel", Recorder())
    parts = grads(x, matrix, grad)[1]
    assert launches[0][1] == 4
    exact = exact_grads(x, matrix, grad)[1]
    assert error(parts, exact) <= max(2 * error(whole, exact), 1e-15)
    assert parts.stride() == whole.stride()
    assert torch.equal(parts, grads(x, matrix, grad)[1])


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (16, 1)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_columns_outside_count_as_zero_blocks(block):
    n, k = sizes(block)
    x, (weight, crow, col), bias, _, grad = problem(7, n, k, block)
    block_cols = bsr.grid(n, k, block)[1]
    bad = torch.tensor([-1, block_cols, 2**31 - 1, -(2**31)], dtype=torch.int32, device=DEVICE)
    where = torch.arange(0, col.numel(), 2, device=DEVICE)
    col = col.clone()
    col[where] = bad.repeat(where.numel())[: where.numel()]
    kept, known = weight.clone(), col.clone()
    kept[where], known[where] = 0, 0
    exact = exact_forward(x, (kept, crow, known), bias, None, None, n)
    assert error(forward(x, (weight, crow, col), bias, out_features=n), exact) < 1e-6
    dx, dw = grads(x, (weight, crow, col), grad)
    exact_dx, exact_dw = exact_grads(x, (kept, crow, known), grad)
    exact_dw[where] = 0
    assert error(dx, exact_dx) < 1e-6
    assert error(dw, exact_dw) < 1e-6


@pytest.mark.parametrize(
    "crow",
    [[0, 2**31 - 1, 3, 4], [-(2**31), 2, -5, 4], [9, 7, 3, 100], [2**31 - 1] * 4, [-7] * 4],
    ids=str,
)
def test_bad_row_bounds_stay_inside(crow):
    x, (weight, good, col), bias, _, grad = problem(7, 45, 40, (16, 16))
    crow = torch.tensor(crow, dtype=torch.int32, device=DEVICE)
    assert crow.shape == good.shape
    y = forward(x, (weight, crow, col), bias, out_features=45)
    dx, dw = grads(x, (weight, crow, col), grad)
    for tensor in (y, dx, dw):
        assert bool(tensor.isfinite().all())


def test_blocks_must_be_powers_of_two():
    x, matrix, _, _, grad = problem(4, 48, 48, (24, 16))
    for call in (lambda: forward(x, matrix, out_features=48), lambda: grads(x, matrix, grad)):
        with pytest.raises(ValueError, match="powers of two, got "):
            call()


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.undo()
    x, matrix, _, _, _ = problem(4, 32, 32, (16, 16), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"interpreter multiplies torch\.bfloat16 wrongly"):
        forward(x, matrix, out_features=32)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck_through_the_public_function(activation):
    x, (weight, crow, col), bias, residual, _ = problem(2, 7, 9, (4, 4), torch.float64)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]

    def f(x, weight, bias, residual):
        return block_sparse_linear(
            x,
            weight,
            crow,
            col,
            bias,
            out_features=7,
            activation=activation,
            residual=residual,
            impl="triton",
        )

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@on_gpu
def test_cuda_graph_without_host_sync():
    x, matrix, bias, residual, grad = problem(300, 320, 256, (32, 32), torch.bfloat16)

    def step():
        return forward(x, matrix, bias, residual, "gelu", 320), *grads(x, matrix, grad)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@on_gpu
def test_offsets_beyond_two_to_the_31():
    tokens, k = 2**20 + 3, 2048
    mask = torch.ones(1, k // 16, dtype=torch.bool)
    _, matrix, _, _, _ = problem(1, 16, k, (16, 16), torch.float16, mask)
    x = torch.zeros(tokens, k, dtype=torch.float16, device=DEVICE)
    x[-5:] = torch.randn(5, k, dtype=torch.float16, device=DEVICE)
    y = forward(x, matrix, out_features=16)
    assert error(y[-5:], exact_forward(x[-5:], matrix, out_features=16)) < 1e-3
    assert not bool(y[:-5].any())
