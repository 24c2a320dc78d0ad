# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of tensor_product_embedding launch; see ahead_of_time.py."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, Recorder, stack_bytes

from lean_kernels.ops.tensor_product_embedding import triton as kernels

TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))
# (order, q, D, rank): MorphTE's, padded digits, two and four factors.
SHAPES = [(3, 8, 512, 10), (3, 10, 1000, 7), (2, 28, 768, 10), (4, 6, 768, 8)]
SCALARS = 16  # bytes
NAMES = [name for name in dir(kernels) if name.endswith("_kernel")]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(monkeypatch, shape, dtype, norm):
    order, size, features, rank = shape
    recorders = {name: Recorder(getattr(kernels, name)) for name in NAMES}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    ids = meta(8, 512, dtype=torch.int64)
    table = meta(41280, order, dtype=torch.int32), meta(10818, rank, size, dtype=dtype)
    added = (ids, meta(512, features, dtype=dtype)) if norm else (None, None)
    weight = meta(features) if norm else None
    options = *added, None, None, norm, weight
    kernels.forward(ids, *table, features, *options, weight, 1e-5)
    kernels.grad(meta(8, 512, features, dtype=dtype), ids, *table, *options, 1e-5, 1)
    return {name: r.launches for name, r in recorders.items()}


@TARGETS
@pytest.mark.parametrize("shape, dtype, norm", [
    (SHAPES[0], torch.float32, 1), (SHAPES[0], torch.bfloat16, 0), (SHAPES[1], torch.float32, 2),
    (SHAPES[2], torch.bfloat16, 1), (SHAPES[3], torch.float32, 0),
], ids=str)  # fmt: skip
def test_everything_compiles_and_no_row_spills(monkeypatch, tmp_path, shape, dtype, norm, target):
    found = launches(monkeypatch, shape, dtype, norm)
    order = shape[0]
    assert len(found["_shares_kernel"]) == len(found["_join_kernel"]) == order + bool(norm)
    assert len(found["_norm_kernel"]) == bool(norm)
    for name, launch in ((name, one) for name, many in found.items() for one in many):
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_KIB[target] * 1024, name
        # ptxas may keep a number or two from before the loop of _shares_kernel there.
        most = SCALARS if name == "_shares_kernel" else 0
        assert stack_bytes(compiled, tmp_path) <= most, name
