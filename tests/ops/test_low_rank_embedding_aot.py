# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of low_rank_embedding launch; see ahead_of_time.py."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, Recorder, stack_bytes

from lean_kernels.ops.low_rank_embedding import triton as kernels

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))
PLACES, ROWS = 4096, 30522
NOTHING = (None, None, None, None, 0, None, None, 0.0)


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def launches(monkeypatch):
    """Run a launcher's function and return its launches."""

    def run(function, *arguments):
        names = [name for name in dir(kernels) if name.endswith("_kernel")]
        recorders = [Recorder(getattr(kernels, name)) for name in names]
        with monkeypatch.context() as patch:
            for name, recorder in zip(names, recorders, strict=True):
                patch.setattr(kernels, name, recorder)
            getattr(kernels, function)(*arguments)
        return [launch for recorder in recorders for launch in recorder.launches]

    return run


def check(launches, count, target, tmp_path):
    assert len(launches) == count
    for launch in launches:
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_KIB[target] * 1024
        assert stack_bytes(compiled, tmp_path) == 0


def table(rank, features, dtype, int8=False):
    ids = meta(PLACES, dtype=torch.int64)
    codes = meta(ROWS, rank, dtype=torch.int8 if int8 else dtype)
    return ids, codes, meta(ROWS) if int8 else None, meta(features, rank, dtype=dtype)


@TARGETS
@pytest.mark.parametrize(
    ("rank", "features", "dtype"),
    [(75, 768, FP32), (75, 768, BF16), (256, 4096, BF16), (64, 1024, FP16), (5, 33, FP32)],
    ids=str,
)
def test_rows(launches, tmp_path, target, rank, features, dtype):
    row = meta(features, dtype=dtype)
    for int8, activation in ((False, 0), (True, 3)):
        arguments = (*table(rank, features, dtype, int8), row, activation, *NOTHING)
        check(launches("forward", *arguments), 1, target, tmp_path)


@TARGETS
@pytest.mark.parametrize(
    ("features", "dtype", "count"),
    [(384, BF16, 1), (768, BF16, 2), (768, FP32, 2), (384, FP32, 1)],
    ids=str,
)
def test_the_end_of_a_row(launches, tmp_path, target, features, dtype, count):
    row, ids = meta(features, dtype=dtype), meta(PLACES, dtype=torch.int64)
    added = (ids, meta(512, features, dtype=dtype), ids, meta(2, features, dtype=dtype))
    arguments = (*table(75, features, dtype), None, 0, *added, 1, row, row, 1e-12)
    check(launches("forward", *arguments), count, target, tmp_path)


@TARGETS
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradients(launches, tmp_path, target, dtype):
    grad, row = meta(PLACES, 768, dtype=dtype), meta(768, dtype=dtype)
    # Not sparse: how many rows such a gradient has is not known without data.
    arguments = (grad, *table(75, 768, dtype), row, 3, 0, True, False, True, True, True)
    check(launches("grad", *arguments), 2, target, tmp_path)


@TARGETS
def test_float64(launches, tmp_path, target):
    arguments = (*table(75, 768, FP64), None, 0, *NOTHING)
    check(launches("forward", *arguments), 1, target, tmp_path)
