# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of low_rank_embedding: on a GPU, or on the CPU under TRITON_INTERPRET=1."""

import pytest
import torch
from embeddings import ACTIVATIONS, problem
from interpreted import (
    DEVICE,
    guarded_empty,  # noqa: F401
    quick_device_functions,  # noqa: F401
    skip_where_nothing_runs,
)
from problems import error

skip_where_nothing_runs()

from lean_kernels.ops.low_rank_embedding import op, reference  # noqa: E402
from lean_kernels.ops.low_rank_embedding import triton as kernels  # noqa: E402

# V, rank, D: whole vectors, and odd; each of several tiles, the last one not full.
SIZES = [(50, 24, 48), (20, 33, 35)]
WHOLE, LONG = (20, 18, 67), (9, 5, 520)  # rows that one program finishes, and that it does not
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 2e-3}
DTYPES = list(LIMITS)


def moved(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return value


def run(p):
    end = op._row_norm.spread(p.options.get("added", ()), p.ids.shape)
    end += op._row_norm.flatten(p.options.get("norm"))
    code = op.ACTIVATIONS.index(p.options["activation"])
    table = (p.ids, p.codes, p.options.get("scales"), p.decoder, p.bias)
    return kernels.forward(*map(moved, table), code, *map(moved, end)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, dtype):
    for options in ({}, {"bias": False}, {"int8": True}):
        p = problem(size, (2, 35), dtype, **options)
        assert error(run(p), p.exact()) <= LIMITS[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(activation):
    p = problem(SIZES[1], (40,), activation=activation, ids_dtype=torch.int32)
    assert error(run(p), p.exact()) <= 2e-6


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize(
    ("size", "added"), [(WHOLE, 0), (WHOLE, 1), (WHOLE, 2), (LONG, 0), (LONG, 2)], ids=str
)
def test_the_end_of_a_row(size, added, norm):
    p = problem(size, (2, 9), added=added, norm=norm, activation="elu")
    assert error(run(p), p.exact()) <= 2e-6


def test_no_places():
    assert run(problem((20, 33, 129), (2, 0))).shape == (2, 0, 129)


def test_ids_out_of_bounds_give_nan():
    p = problem((50, 8, 24), (7,), added=1, norm="layer")
    right = run(p)
    for bad in (-1, 50, 2**31 - 1):
        p.ids[3] = bad
        rows = run(p)
        assert bool(rows[3].isnan().all())
        kept = [0, 1, 2, 4, 5, 6]
        assert torch.equal(rows[kept], right[kept])


def check_gradients(size, dtype, activation, options, int8, places=40):
    p = problem(size, (places,), dtype, activation=activation, int8=int8)
    grad = torch.randn(places, size[2]).to(dtype)
    table = (grad, p.ids, p.codes, p.options.get("scales"), p.decoder, p.bias)
    need = (not int8, True, True)
    code = op.ACTIVATIONS.index(activation)
    ours = kernels.grad(*map(moved, table), code, *options, *need)
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in table
    ]
    exact = reference.grad(*wide, activation, *options, *need)
    assert torch.equal(ours[0].cpu(), exact[0])
    for got, wanted in zip(ours[1:], exact[1:], strict=True):
        assert error(got.cpu(), wanted) <= LIMITS[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_activations(size, activation):
    for int8 in (False, True):
        check_gradients(size, torch.float32, activation, (2, True, False), int8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_of_padding_frequent_and_sparse_rows(dtype):
    for options in ((-1, False, False), (2, True, False), (2, True, True)):
        for int8 in (False, True):
            check_gradients(SIZES[1], dtype, "elu", options, int8)


def test_a_gradient_summed_in_parts():
    places = kernels._SPLIT_PLACES + 70
    check_gradients((20, 5, 16), torch.float32, None, (-1, False, False), False, places)
