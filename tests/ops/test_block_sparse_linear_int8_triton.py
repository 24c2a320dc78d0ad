# SPDX-License-Identifier: Apache-2.0
"""int8 weights in Triton, on a GPU or, by test_triton_interpreter.py, on the CPU."""

import pytest
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    guarded_empty,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

from problems import problem  # noqa: E402

from lean_kernels.ops.block_sparse_linear import int8, triton_int8  # noqa: E402


@pytest.mark.parametrize("block", [(32, 32), (16, 16), (64, 64), (128, 128), (16, 64)], ids=str)
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 70, 130), (37, 130, 70)])
def test_against_the_reference(block, rows, out_features, in_features):
    p = problem(rows, out_features, in_features, block)
    weight, crow, col = p.matrix
    packed, scales = int8.quantise(weight, crow, out_features)
    tensors = [t.to(DEVICE) for t in (p.x, packed, scales, crow, col, p.bias, p.residual)]
    y = triton_int8.forward(*tensors, out_features, 2)
    wanted = int8.forward(p.x, packed, scales, crow, col, p.bias, p.residual, out_features, "gelu")
    assert (y.cpu() - wanted).norm() <= 1e-6 * wanted.norm()


def test_rows_that_are_not_finite_or_zero():
    p = problem(5, 32, 40, (32, 32))
    weight, crow, col = p.matrix
    packed, scales = int8.quantise(weight, crow, 32)
    p.x[1, 3], p.x[3] = torch.inf, 0.0
    tensors = [t.to(DEVICE) for t in (p.x, packed, scales, crow, col, p.bias)]
    y = triton_int8.forward(*tensors, None, 32, 0).cpu()
    assert bool(y[1].isnan().all()) and torch.equal(y[3], p.bias)
    assert bool(y[[0, 2, 4]].isfinite().all())
