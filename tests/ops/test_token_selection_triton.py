# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of token selection, add_layer_norm and lazy_adam, on a GPU or, by
test_triton_interpreter.py, on the CPU."""

import math
import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip(
        "no GPU; test_triton_interpreter.py runs this file on the CPU", allow_module_level=True
    )

from lean_kernels.ops import (  # noqa: E402
    Threshold,
    add_layer_norm,
    compact_tokens,
    gather_tokens,
    lazy_adam_,
    scatter_tokens,
    select_tokens,
)
from lean_kernels.ops.token_selection import reference  # noqa: E402
from lean_kernels.ops.token_selection import triton as kernels  # noqa: E402

NAN, INF = math.nan, math.inf
LENGTHS = [3, 0, 70, 1, 17, 0]  # the third takes three tiles


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def same(scores, cu, **options):
    plain = select_tokens(scores, cu, **options, impl="reference")
    ours = select_tokens(scores, cu, **options, impl="triton")
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selection(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    cu = cumulative(LENGTHS)
    scores = draw(sum(LENGTHS)).to(dtype)
    odd = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e-45, -1.0])
    odd = odd[torch.arange(sum(LENGTHS)) % 7].to(dtype).to(DEVICE)
    counts = torch.tensor([2, 3, 64, -1, 99, 0], dtype=torch.int32, device=DEVICE)
    protect = draw(len(scores), seed=1) > 1
    same(scores, cu, keep=0.3)
    same(scores.round(), cu, keep=0.5, protect=protect)
    same(odd, cu, keep=counts)
    same(odd, cu, keep=0.97, protect=protect)
    for keep in (0.1, INF, -0.0):
        same(scores, cu, keep=Threshold(keep), protect=protect)
        same(odd, cu, keep=Threshold(keep))


def test_no_sequences_and_no_tokens():
    none = torch.zeros(0, device=DEVICE)
    same(none, cumulative([]), keep=0.5)
    same(none, cumulative([0, 0]), keep=0.5)


def test_a_wrong_total_stays_within_it():
    scores, cu = draw(20), cumulative([12, 8])
    right, cu_right = select_tokens(scores, cu, keep=0.5, impl="reference")
    indices, kept = select_tokens(scores, cu, keep=0.5, total=7, impl="triton")
    assert torch.equal(indices, right[:7]) and kept.tolist() == [0, 6, 7]
    indices, kept = select_tokens(scores, cu, keep=0.5, total=12, impl="triton")
    assert indices.tolist() == [*right.tolist(), -1, -1] and torch.equal(kept, cu_right)


@pytest.mark.parametrize("bad", [[3, 8, 12, 20], [0, 30, 4, 20], [0, -5, 12, 400]])
def test_bad_bounds_stay_within_the_tensors(bad):
    cu = torch.tensor(bad, dtype=torch.int32, device=DEVICE)
    indices, _ = select_tokens(draw(20), cu, keep=0.5, impl="triton")
    assert ((indices >= -1) & (indices < 20)).all()


def companions(tokens):
    yield draw(tokens, 768)
    yield draw(tokens, 3, 5).bfloat16()
    yield torch.arange(tokens, device=DEVICE)
    yield draw(tokens, 7) > 0
    yield draw(tokens, 3).to(torch.uint8)
    yield draw(tokens, 0)
    yield draw(tokens, 40)[:, 1:20:2]
    yield draw(tokens, 41)[:, 1:20]
    yield draw(1, 6).expand(tokens, 6)
    yield torch.complex(draw(tokens, 3), draw(tokens, 3, seed=1))


@pytest.mark.parametrize("tokens", [1, 50])
def test_gather_and_scatter(tokens):
    tensors = list(companions(tokens))
    for count in (0, 1, tokens):
        indices = torch.randperm(tokens).to(DEVICE)[:count]
        rows = gather_tokens(tensors[0], indices, *tensors[1:], impl="triton")
        for row, t in zip(rows, tensors, strict=True):
            assert torch.equal(row, t[indices]) and row.is_contiguous()
            spread = scatter_tokens(row, indices, tokens, impl="triton")
            assert torch.equal(spread, reference.scatter(row, indices, tokens))
            base = torch.ones_like(spread)
            expected = base.index_copy(0, indices, row)
            assert torch.equal(
                scatter_tokens(row, indices, tokens, out=base, impl="triton"), expected
            )
    assert gather_tokens(draw(0, 3), indices[:0], impl="triton").shape == (0, 3)
    assert (scatter_tokens(draw(0, 3), indices[:0], 4, impl="triton") == 0).all()


def test_rows_out_of_bounds_are_zero_or_left_out():
    hidden, indices = draw(5, 6), torch.tensor([4, -1, 5, 0, 2**40], device=DEVICE)
    (rows,) = kernels.gather([hidden], indices)
    assert torch.equal(rows[[0, 3]], hidden[[4, 0]]) and (rows[[1, 2, 4]] == 0).all()
    spread = kernels.scatter(hidden, indices, 5)
    assert torch.equal(spread[[4, 0]], hidden[[0, 3]]) and (spread[1:4] == 0).all()
    guard = torch.full((7, 8), 7.0, device=DEVICE)
    kernels.scatter_into(guard[1:6, 1:7], hidden, indices)
    assert torch.equal(guard[[5, 1], 1:7], hidden[[0, 3]])
    guard[[5, 1], 1:7] = 7
    assert (guard == 7).all()


def test_compaction_and_its_gradient():
    scores, cu = draw(40), cumulative([13, 0, 27])
    hidden = draw(40, 5, seed=2).requires_grad_()
    indices, _, rows, where = compact_tokens(
        scores, cu, hidden, torch.arange(40, device=DEVICE), keep=0.5, total=21, impl="triton"
    )
    assert torch.equal(rows, hidden[indices]) and torch.equal(where, indices)
    (grad,) = torch.autograd.grad(rows.square().sum(), hidden)
    assert torch.equal(grad, reference.scatter(2 * rows.detach(), indices, 40))


@pytest.mark.parametrize("features", [1, 5, 64, 100, 768, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_add_layer_norm(features, dtype):
    tensors = [
        draw(*size, seed=i) for i, size in enumerate([(9, features)] * 2 + [(features,)] * 2)
    ]
    x, residual, weight, bias = (t.to(dtype) for t in tensors)
    indices = torch.tensor([8, 0, 3, 3], device=DEVICE)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3}[dtype]
    for arguments in (
        (x, residual, weight, bias, None),
        (x, None, weight, None, indices),
        (x[::2], residual[1:6], weight, bias, None),
        (x.T.contiguous().T, residual, weight, bias, indices),
    ):
        options = {"indices": arguments[4], "eps": 1e-5}
        ours = add_layer_norm(*arguments[:4], **options, impl="triton")
        wide = [None if t is None else t.double() for t in arguments[:4]]
        expected = add_layer_norm(*wide, **options, impl="reference")
        scale = expected.square().mean().sqrt()
        assert ours.dtype == dtype and (ours - expected).square().mean().sqrt() <= tolerance * scale


def test_add_layer_norm_of_no_rows_and_of_rows_out_of_bounds():
    x, weight = draw(4, 8), draw(8)
    assert add_layer_norm(x[:0], None, weight, None, impl="triton").shape == (0, 8)
    from lean_kernels.ops.add_layer_norm import triton

    indices = torch.tensor([0, -1, 4, 3], device=DEVICE)
    y = triton.forward(x, None, weight, None, indices, 1e-5)
    assert y[[1, 2]].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 1), (9, 5), (9, 2, 50), (9, 1500)], ids=str)
def test_lazy_adam(shape, dtype):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.float16: 2**-11}[dtype]
    rows, step = torch.tensor([8, 0, 3], device=DEVICE), torch.tensor(3.0, device=DEVICE)
    values = draw(3, *shape[1:], seed=5).to(dtype)
    grad = torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)
    before = [draw(*shape, seed=i).to(dtype).abs() for i in range(3)]
    for betas in ((0.9, 0.999), (0.0, 0.5)):
        ours, wide = [t.clone() for t in before], [t.double() for t in before]
        options = {"lr": 0.1, "betas": betas, "eps": 1e-4}
        lazy_adam_(ours[0], grad, *ours[1:], step, **options, impl="triton")
        lazy_adam_(wide[0], grad.double(), *wide[1:], step, **options, impl="reference")
        for a, b in zip(ours, wide, strict=True):
            assert ((a.double() - b).abs() <= tolerance * (1 + b.abs())).all()


def test_lazy_adam_leaves_out_rows_out_of_bounds():
    from lean_kernels.ops.lazy_adam import triton

    table, rows = draw(4, 8), torch.tensor([-1, 4, 2], device=DEVICE)
    moved = table.clone()
    moments = torch.zeros_like(table), torch.zeros_like(table)
    one = torch.ones((), device=DEVICE)
    triton.step_(moved, *moments, one, rows, draw(3, 8, seed=1), 0.1, 0.9, 0.999, 1e-8)
    assert (moved != table).any(1).tolist() == [False, False, True, False]
