# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of tensor_train_embedding, on a GPU or, by test_triton_interpreter.py, on the
CPU."""

import pytest
import torch
from interpreted import DEVICE, guarded_empty, quick_device_functions, skip_where_nothing_runs
from trains import ORDERS, TOLERANCE, error, table_of, train

skip_where_nothing_runs()

from lean_kernels.ops import tensor_train_embedding  # noqa: E402

__all__ = ["guarded_empty", "quick_device_functions"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [ORDERS[0], ((2, 3, 4), (2, 9, 8), (3, 9)), ORDERS[5]], ids=str)
def test_rows(shape, dtype):
    cores = [core.to(DEVICE) for core in train(*shape, dtype)]
    table = table_of(cores)
    for count in (2, 14):  # fewer than combinations of leading indices, and more
        ids = torch.arange(count, device=DEVICE) * 7 % len(table)
        features = table.shape[1] - count % 4
        y = tensor_train_embedding(ids, cores, embedding_dim=features, impl="triton")
        assert y.dtype == dtype
        limit = TOLERANCE.get(dtype) or torch.finfo(dtype).eps / 2
        assert error(y, table[ids][:, :features]) <= limit


def test_gradients_empty_input_and_ids_out_of_bounds():
    cores = [c.to(DEVICE).requires_grad_() for c in train((3, 4, 5), (2, 2, 3), (3, 3))]
    ids = torch.tensor([[7, 7, 0]], dtype=torch.int32, device=DEVICE)
    results = []
    for impl in ("reference", "triton"):
        y = tensor_train_embedding(ids, cores, embedding_dim=11, impl=impl)
        results.append((y, *torch.autograd.grad(y.square().sum(), cores)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    assert tensor_train_embedding(none, cores, embedding_dim=11, impl="triton").shape == (0, 2, 11)
    bad = torch.tensor([-1, 3, 50, 2**40], device=DEVICE)
    y = tensor_train_embedding(
        bad, [c.detach() for c in cores], embedding_dim=11, num_embeddings=50, impl="triton"
    )
    assert y[1].any() and not y[[0, 2, 3]].any()
