# SPDX-License-Identifier: Apache-2.0
"""Bad input to block_sparse_linear is a clear error, in the public function and in the raw ops."""

import pytest
import torch
from problems import IMPLS, needs_cpu_kernels, problem

from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr

ops = torch.ops.lean_kernels
INT_MAX = 2**31 - 1
GRADIENTS = [(True, False, False), (False, True, False), (False, False, True)]  # which are needed


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments():
    """Of a [60, 40] matrix in 16x8 blocks: 4 x 5 of them, the last row and the last half row."""
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]])
    p = problem((2, 3), 60, 40, (16, 8), mask=mask.bool())
    return {
        "x": p.x,
        **dict(zip(("weight", "crow_indices", "col_indices"), p.matrix, strict=True)),
        "bias": p.bias,
        "out_features": 60,
        "activation": "gelu",
        "residual": p.residual,
    }


def edited(**edits):
    given = arguments()
    return given | {name: edit(given[name]) for name, edit in edits.items()}


def test_the_arguments_are_right_unedited():
    assert block_sparse_linear(**arguments()).shape == (2, 3, 60)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"activation": lambda a: "tanh"}, "unknown activation 'tanh'; expected one of .*'gelu'"),
        ({"weight": lambda w: w[0]}, r"weight must be \[nnz, block_out, block_in\], got"),
        ({"weight": lambda w: w.double()}, r"must share one of torch.float32, .* torch.float64"),
        ({"weight": lambda w: w.bfloat16()}, "got torch.float32 and torch.bfloat16"),
        ({"weight": lambda w: w[:-1]}, r"col_indices must be int32 \[9\], got .* \[10\]"),
        ({"weight": lambda w: w[:, :0]}, r"block sizes positive, got .*weight \[10, 0, 8\]"),
        ({"weight": lambda w: w[:, :, :0]}, r"block sizes positive, got .*weight \[10, 16, 0\]"),
        ({"weight": lambda w: w.to("meta")}, "weight is on meta, x on cpu; move them"),
        ({"x": lambda x: x.int(), "weight": lambda w: w.int()}, "got torch.int32 and torch.int32"),
        ({"x": lambda x: x.cfloat()}, "got torch.complex64 and torch.float32"),
        ({"x": lambda x: x.sum()}, r"x must be \[..., in_features\]"),
        ({"x": lambda x: x[..., :0]}, "in_features, out_features and block sizes positive"),
        ({"crow_indices": lambda i: i.long()}, r"crow_indices must be int32 \[5\], got torch.int6"),
        ({"col_indices": lambda i: i.long()}, r"col_indices must be int32 \[10\], got torch.int6"),
        ({"col_indices": lambda i: i.float()}, "col_indices must be int32"),
        ({"crow_indices": lambda i: i[:-1]}, r"crow_indices must be int32 \[5\], got .*\[4\]"),
        ({"crow_indices": lambda i: i[None]}, r"crow_indices must be int32 \[5\], got .*\[1, 5\]"),
        ({"crow_indices": lambda i: i.to("meta")}, "crow_indices is on meta, x on cpu"),
        ({"col_indices": lambda i: i.to("meta")}, "col_indices is on meta, x on cpu"),
        ({"out_features": lambda n: 0}, "out_features and block sizes positive"),
        ({"out_features": lambda n: -3}, "out_features and block sizes positive"),
        ({"out_features": lambda n: 65}, r"crow_indices must be int32 \[6\]"),
        ({"out_features": lambda n: 2**62}, "crow_indices must be int32"),
        ({"bias": lambda b: b[:-1]}, r"bias must be torch.float32 \[60\], got .*\[59\]"),
        ({"bias": lambda b: b[None]}, r"bias must be torch.float32 \[60\], got .*\[1, 60\]"),
        ({"bias": lambda b: b.double()}, r"bias must be torch.float32 .*, got torch.float64"),
        ({"bias": lambda b: b.to("meta")}, "bias is on meta"),
        ({"residual": lambda r: r[:1]}, r"residual must be torch.float32 \[2, 3, 60\], got"),
        ({"residual": lambda r: r[0]}, "residual must be torch.float32"),
        ({"residual": lambda r: r.half()}, "residual must be torch.float32 .*, got torch.float16"),
        ({"residual": lambda r: r.to("meta")}, "residual is on meta"),
    ],
)
def test_the_public_function_says_what_is_wrong(edits, message):
    for requires_grad in (False, True):
        given = edited(**edits)
        if given["weight"].is_floating_point():
            given["weight"].requires_grad_(requires_grad)
        with pytest.raises(ValueError, match=f"^block_sparse_linear: .*{message}"):
            block_sparse_linear(**given)


def test_an_unknown_impl_is_refused():
    for impl in ("fast", "cuda", 3):
        with pytest.raises(ValueError, match=r"unknown impl .*; expected one of 'reference', 'cpu"):
            block_sparse_linear(**arguments(), impl=impl)


@needs_cpu_kernels
def test_the_cpu_kernels_refuse_other_devices():
    given = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments().items()}
    with pytest.raises(ValueError, match="impl 'cpu' needs CPU tensors, got meta"):
        block_sparse_linear(**given, impl="cpu")


# Of 10 blocks in 4 block rows and 5 block columns: crow [0, 3, 3, 8, 10].
BAD_PATTERNS = {
    "crow_indices": [
        i32(1, 3, 3, 8, 10),
        i32(0, 3, 3, 8, 9),
        i32(0, 3, 3, 8, 11),
        i32(0, 8, 3, 3, 10),
        i32(0, 3, 3, 11, 10),
        i32(0, 3, -3, 8, 10),
        i32(0, INT_MAX, -2, 8, 10),  # rises if differences wrap around
        i32(0, INT_MAX, INT_MAX, INT_MAX, 10),
        i32(0, -INT_MAX - 1, 3, 8, 10),
        i32(0, 0, 0, 0, 0),
        i32(0, 0, 0, 0, INT_MAX),
    ],
    "col_indices": [
        i32(0, 2, 5, 0, 1, 2, 3, 4, 1, 4),
        i32(0, 2, 4, 0, 1, 2, 3, 4, 1, 5),
        i32(-1, 2, 4, 0, 1, 2, 3, 4, 1, 4),
        i32(0, 2, 4, 0, 1, 2, 3, INT_MAX, 1, 4),
        i32(0, 2, 4, 0, 1, 2, 3, -INT_MAX - 1, 1, 4),
    ],
}
PATTERN_CASES = [(name, index) for name, cases in BAD_PATTERNS.items() for index in cases]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "index"), PATTERN_CASES)
def test_indices_that_lead_outside_are_refused_on_cpu(name, index, impl):
    given = arguments() | {name: index}
    with pytest.raises((ValueError, RuntimeError), match=f"block_sparse_linear: {name} must"):
        block_sparse_linear(**given, impl=impl)


@needs_cpu_kernels
@pytest.mark.parametrize(("name", "index"), PATTERN_CASES)
def test_indices_that_lead_outside_are_refused_by_the_raw_ops(name, index):
    given = arguments() | {name: index}
    weight, crow, col = (given[k] for k in ("weight", "crow_indices", "col_indices"))
    x, grad = given["x"], given["residual"]
    message = f"block_sparse_linear: {name} must"
    with pytest.raises(RuntimeError, match=message):
        ops.block_sparse_linear(x, weight, crow, col, None, None, 60, 0)
    for needed in GRADIENTS:
        with pytest.raises(RuntimeError, match=message):
            ops.block_sparse_linear_grad(grad, x, weight, crow, col, 40, *needed)


_X, _W, _CROW, _COL = torch.zeros(3, 40), torch.zeros(2, 16, 8), i32(0, 1, 1, 1, 2), i32(0, 3)
_GRAD = torch.zeros(3, 60)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(())}, "at least one dimension"),
        ({0: torch.zeros(3, 0)}, "in_features and out_features must be positive"),
        ({0: torch.zeros(3, 40).double()}, "the same dtype, got Double and Float"),
        ({0: torch.zeros(3, 100)}, None),
        ({0: _X.int(), 1: _W.int()}, "dtype must be float32, bfloat16, float16 or float64"),
        ({1: torch.zeros(2, 16)}, "weight must be"),
        ({1: torch.zeros(3, 16, 8)}, "weight must be .* nnz as in col_indices"),
        ({1: torch.zeros(2, 0, 8)}, r"block sizes must lie in \[1, 65536\]"),
        ({1: torch.zeros(2, 16, 0)}, r"block sizes must lie in \[1, 65536\]"),
        ({1: torch.zeros(1, 1, 1).expand(2, 16, 2**50)}, "block sizes must lie in"),
        ({1: torch.zeros(1, 1, 1).expand(2, 2**50, 1)}, "block sizes must lie in"),
        ({1: torch.zeros(0, 1, 2**62), 2: i32(*[0] * 61), 3: i32()}, "block sizes must lie"),
        ({2: _CROW.long()}, "must be int32"),
        ({3: _COL.long()}, "must be int32"),
        ({2: _CROW[:-1]}, r"crow_indices must be \[5\]"),
        ({2: _CROW[None]}, r"crow_indices must be \[5\]"),
        ({3: _COL[None]}, "weight must be|col_indices"),
        ({4: torch.zeros(59)}, r"bias must be \[out_features\]"),
        ({4: torch.zeros(60, dtype=torch.float64)}, r"bias must be \[out_features\]"),
        ({5: torch.zeros(60)}, r"residual must be \[..., out_features\]"),
        ({5: torch.zeros(3, 60, dtype=torch.float16)}, r"residual must be \[..., out_features\]"),
        ({6: 0}, "out_features must be positive"),
        ({6: -1}, "out_features must be positive"),
        ({6: 2**63 - 1}, "crow_indices must be"),
        ({7: 5}, "activation a code from 0 to 4"),
        ({7: -1}, "activation a code from 0 to 4"),
    ],
)
def test_the_raw_forward_checks_what_it_reads(changed, message):
    given = [_X, _W, _CROW, _COL, None, None, 60, 0]
    assert ops.block_sparse_linear(*given).shape == (3, 60)
    for at, value in changed.items():
        given[at] = value
    if message is None:
        assert ops.block_sparse_linear(*given).shape == (3, 60)
    else:
        with pytest.raises(RuntimeError, match=message):
            ops.block_sparse_linear(*given)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(3, 70)}, r"crow_indices must be \[6\]"),
        ({0: _GRAD.double()}, "same dtype"),
        ({2: torch.zeros(2, 16)}, "weight must be"),
        ({2: torch.zeros(2, 0, 8)}, "block sizes must lie in"),
        ({2: torch.zeros(1, 1, 1).expand(2, 16, 2**50)}, "block sizes must lie in"),
        ({3: _CROW[:-1]}, r"crow_indices must be \[5\]"),
        ({4: i32(0)}, "nnz as in col_indices"),
        ({4: torch.zeros((), dtype=torch.int32)}, "col_indices"),
        ({5: 0}, "must be positive"),
        ({5: 24}, r"col_indices must lie in \[0, 3\)"),
        ({5: 2**63 - 1}, "in_features must be at most 2147483647 blocks of 8"),
    ],
)
@pytest.mark.parametrize("needed", GRADIENTS, ids=str)
def test_the_raw_gradients_check_what_they_read(needed, changed, message):
    given = [_GRAD, _X, _W, _CROW, _COL, 40]
    assert ops.block_sparse_linear_grad(*given, *needed)[0].shape == (
        (3, 40) if needed[0] else (0,)
    )
    for at, value in changed.items():
        given[at] = value
    with pytest.raises(RuntimeError, match=message):
        ops.block_sparse_linear_grad(*given, *needed)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(4, 60)}, "same leading sizes"),
        ({1: None}, "the gradient of the weight needs x"),
        ({1: torch.zeros(3, 20)}, "same leading sizes"),
        ({1: _X.double()}, "same leading sizes and dtype"),
        ({1: torch.zeros(())}, "at least one dimension"),
    ],
)
def test_the_raw_gradient_of_the_weight_checks_what_it_reads(changed, message):
    given = [_GRAD, _X, _W, _CROW, _COL, 40, False, True, False]
    assert ops.block_sparse_linear_grad(*given)[1].shape == (2, 16, 8)
    for at, value in changed.items():
        given[at] = value
    with pytest.raises(RuntimeError, match=message):
        ops.block_sparse_linear_grad(*given)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"weight": lambda w: w[0]}, r"weight must be \[nnz, block_out, block_in\], got"),
        (
            {"weight": lambda w: w.int()},
            "weight must be a floating point or int8 tensor, got torch.int32",
        ),
        ({"weight": lambda w: w[:, :, :0]}, "sizes must be positive, got .* 16x0 blocks"),
        ({"weight": lambda w: w[:-1]}, r"col_indices must have shape \[9\] .*, got \(10,\)"),
        ({"weight": lambda w: w.to("meta")}, "crow_indices is on cpu, weight on meta; move them"),
        ({"rows": lambda n: 0}, "sizes must be positive"),
        ({"cols": lambda n: -40}, "sizes must be positive"),
        ({"rows": lambda n: 65}, r"crow_indices must have shape \[6\]"),
        ({"cols": lambda n: 32}, r"col_indices must lie in \[0, 4\), got values from 0 to 4"),
        ({"rows": lambda n: 57}, r"padding of the last block row \(rows 57 and up\) must be zero"),
        ({"cols": lambda n: 39}, r"padding of the last block column \(columns 39 and up\) must be"),
        ({"crow_indices": lambda i: i.long()}, r"must be int32, got .*; convert with .to\(torch.i"),
        ({"col_indices": lambda i: i.short()}, "must be int32, got torch.int16; convert with"),
        ({"col_indices": lambda i: i[:, None]}, r"col_indices must have shape \[10\]"),
        ({"col_indices": lambda i: i.flip(0)}, "must ascend without repeats within each block row"),
        ({"col_indices": lambda i: i32(0, 2, 2, 0, 1, 2, 3, 4, 1, 4)}, "must ascend without rep"),
        *(({name: lambda _, i=index: i}, f"{name} must") for name, index in PATTERN_CASES),
    ],
)
def test_validate_says_what_is_wrong(edits, message):
    given = {k: arguments()[k] for k in ("weight", "crow_indices", "col_indices")}
    given |= {"rows": 60, "cols": 40}
    bsr.validate(**given)
    given |= {name: edit(given[name]) for name, edit in edits.items()}
    with pytest.raises(ValueError, match=f"^encoder.0: .*{message}"):
        bsr.validate(**given, name="encoder.0")


def test_validate_finds_nan_in_the_padding():
    given = arguments()
    weight = given["weight"].clone()
    weight[-1, -1, -1] = torch.nan
    with pytest.raises(ValueError, match="padding of the last block row"):
        bsr.validate(weight, given["crow_indices"], given["col_indices"], 60, 40)


def test_validate_takes_what_is_valid():
    for rows, cols, block in ((1, 1, (16, 16)), (7, 33, (1, 16)), (64, 64, (64, 64))):
        for fill in (False, True):
            mask = torch.full(bsr.grid(rows, cols, block), fill)
            matrix = bsr.from_dense(torch.randn(rows, cols), mask, block)
            bsr.validate(*matrix, rows, cols)
            bsr.validate(*(t.to("meta") for t in matrix), rows, cols)
    wraps = i32(0, INT_MAX, -2, 0)
    with pytest.raises(ValueError, match="crow_indices must rise from 0 to nnz = 0"):
        bsr.validate(torch.empty(0, 32, 32), wraps, i32(), 96, 32)


@needs_cpu_kernels
def test_messages_begin_with_the_op():
    weight, crow = torch.zeros(1, 16, 16), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^block_sparse_linear: col_indices must lie in"):
        block_sparse_linear(
            torch.zeros(2, 32), weight, crow, crow[1:] + 4, out_features=16, impl="cpu"
        )
