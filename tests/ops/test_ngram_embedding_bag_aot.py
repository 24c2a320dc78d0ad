# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of ngram_embedding_bag launch; see ahead_of_time.py."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, Recorder, stack_bytes

from lean_kernels.ops.ngram_embedding_bag import triton as kernels

TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))
BF16, FP32, FP64, INT8 = torch.bfloat16, torch.float32, torch.float64, torch.int8


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


@TARGETS
@pytest.mark.parametrize("dtype", [BF16, FP64, INT8], ids=str)
def test_every_launch(monkeypatch, tmp_path, target, dtype):
    names = [name for name in dir(kernels) if name.endswith("_kernel")]
    recorders = {name: Recorder(getattr(kernels, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    wide = FP64 if dtype == FP64 else FP32
    table = meta(100_000, 1000 if dtype == BF16 else 300, dtype=dtype)
    grad = meta(32, table.shape[1], dtype=FP32 if dtype == INT8 else dtype)
    scales = meta(100_000) if dtype == INT8 else None
    weights = meta(9000, dtype=wide)
    index = torch.int32 if dtype == BF16 else torch.int64
    ids, offsets = meta(9000, dtype=index), meta(33, dtype=index)
    kernels.forward(ids, offsets, table, weights, scales, -1, True)
    kernels.forward(ids, offsets, table, None, scales, 3, False)
    kernels.grad_weights(grad, ids, offsets, table, scales, -1, True)
    kernels.grad_table(grad, ids, offsets, weights, 100_000, -1, True)
    launches = [(name, one) for name, r in recorders.items() for one in r.launches]
    assert len(launches) == 5 and all(r.launches for r in recorders.values())
    for name, launch in launches:
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_KIB[target] * 1024, name
        assert stack_bytes(compiled, tmp_path) == 0, name
