# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of token selection, add_layer_norm and lazy_adam launch; see
ahead_of_time.py."""

import os
import re
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, SM80, Recorder, stack_bytes

from lean_kernels.ops.add_layer_norm import triton as layer_norm
from lean_kernels.ops.lazy_adam import triton as adam
from lean_kernels.ops.token_selection import triton as selection

TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def record(monkeypatch):
    """Run a launcher's function and return its launches, by kernel."""

    def run(module, function, *arguments):
        names = [name for name in dir(module) if name.endswith("_kernel")]
        recorders = {name: Recorder(getattr(module, name)) for name in names}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                patch.setattr(module, name, recorder)
            getattr(module, function)(*arguments)
        return {name: r.launches for name, r in recorders.items() if r.launches}

    return run


def check(launches, target, tmp_path):
    for name, launch in ((name, one) for name, many in launches.items() for one in many):
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_KIB[target] * 1024, name
        assert stack_bytes(compiled, tmp_path) == 0, name


@TARGETS
@pytest.mark.parametrize("mode, dtype", [(0, FP32), (1, FP64), (2, FP32)], ids=str)
def test_selection(record, tmp_path, target, dtype, mode):
    counts = meta(64, dtype=torch.int32) if mode == 1 else None
    protect = meta(8192, dtype=torch.bool) if mode else None
    launches = record(
        *(selection, "select", meta(8192, dtype=dtype), meta(65, dtype=torch.int32)),
        *(protect, counts, 0.3, mode, 4000, []),
    )
    assert set(launches) == {"_count_kernel", "_select_kernel"}
    check(launches, target, tmp_path)


@TARGETS
def test_moving_rows(record, tmp_path, target):
    indices = meta(4000, dtype=torch.int64)
    tensors = [meta(8192, 768), meta(8192, 768, dtype=BF16), meta(8192, dtype=torch.int32)]
    odd = [meta(8192, 33, dtype=BF16), meta(8192, 3, dtype=torch.uint8)]
    for moved, launched in ((tensors, 1), (tensors + odd, 2)):
        launches = record(selection, "gather", moved, indices)
        assert len(launches["_gather_kernel"]) == launched
        check(launches, target, tmp_path)
    launches = record(selection, "scatter", tensors[1][:4000], indices, 8192)
    assert set(launches) == {"_inverse_kernel", "_gather_kernel"}
    check(launches, target, tmp_path)
    check(
        record(selection, "scatter_into", *tensors[:1], tensors[0][:4000], indices),
        target,
        tmp_path,
    )


def test_rows_move_sixteen_bytes_at_a_time(record):
    launches = record(
        selection, "gather", [meta(8192, 768, dtype=BF16)], meta(4000, dtype=torch.int64)
    )
    ptx = launches["_gather_kernel"][0].compile(SM80).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v2\.b64", ptx) and re.search(r"st\.global\S*\.v2\.b64", ptx)


@TARGETS
@pytest.mark.parametrize("features, dtype", [(768, BF16), (4096, FP32), (100, FP64)], ids=str)
def test_add_layer_norm(record, tmp_path, target, dtype, features):
    x, weight = meta(1024, features, dtype=dtype), meta(features, dtype=dtype)
    for arguments in (
        (x, x, weight, weight, None, 1e-12),
        (x, None, weight, None, meta(500, dtype=torch.int64), 1e-5),
    ):
        launches = record(layer_norm, "forward", *arguments)
        assert len(launches["_norm_kernel"]) == 1
        check(launches, target, tmp_path)


@TARGETS
@pytest.mark.parametrize("features, dtype", [(768, BF16), (4096, FP32), (100, FP64)], ids=str)
def test_lazy_adam(record, tmp_path, target, dtype, features):
    table, rows = meta(30000, features, dtype=dtype), meta(500, dtype=torch.int64)
    launches = record(
        *(adam, "step_", table, table, table, meta(1), rows, meta(500, features, dtype=dtype)),
        *(1e-3, 0.9, 0.999, 1e-8),
    )
    assert len(launches["_step_kernel"]) == 1
    check(launches, target, tmp_path)
