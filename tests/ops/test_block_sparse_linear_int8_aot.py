# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of int8 weights; see ahead_of_time.py."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, SM90, Recorder, stack_bytes

from lean_kernels.ops.block_sparse_linear import bsr, triton_int8

KERNELS = ("_quantise_kernel", "_matmul_int8_kernel")
TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))


@pytest.fixture
def record(monkeypatch):
    """Return the launches of one forward on meta tensors."""

    def run(target, block, tokens=4096, shape=(3072, 768), dtype=torch.bfloat16):
        monkeypatch.setattr(torch.version, "hip", "6.0" if target.backend == "hip" else None)
        recorders = [Recorder(getattr(triton_int8, name)) for name in KERNELS]

        def meta(*size, dtype=dtype):
            return torch.empty(*size, dtype=dtype, device="meta")

        with monkeypatch.context() as patch:
            for name, recorder in zip(KERNELS, recorders, strict=True):
                patch.setattr(triton_int8, name, recorder)
            block_rows, _ = bsr.grid(*shape, block)
            weight = meta(160, block[1] // 4, block[0], 4, dtype=torch.int8)
            scales = meta(shape[0], dtype=torch.float32)
            crow, col = (meta(size, dtype=torch.int32) for size in (block_rows + 1, 160))
            x, y = meta(tokens, shape[1]), meta(tokens, shape[0])
            triton_int8.forward(x, weight, scales, crow, col, y[0], y, shape[0], 2)
        return [launch for recorder in recorders for launch in recorder.launches]

    return run


@TARGETS
@pytest.mark.parametrize("tokens", [16, 4096])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_nothing_spills(record, tmp_path, target, block, tokens):
    for launch in record(target, block, tokens):
        kernel = launch.compile(target)
        assert kernel.metadata.shared <= SHARED_KIB[target] * 1024
        assert stack_bytes(kernel, tmp_path) == 0


def test_hopper_multiplies_bytes_on_its_tensor_cores(record):
    ptx = record(SM90, (64, 64))[1].compile(SM90).asm["ptx"]
    assert ".s32.s8.s8" in ptx
