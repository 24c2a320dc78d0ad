# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launcher of tensor_train_embedding launches; see ahead_of_time.py."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, Recorder, stack_bytes

from lean_kernels.ops.tensor_train_embedding import triton as kernels


@pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_launch(monkeypatch, tmp_path, target, dtype):
    recorder = Recorder(kernels._extend_kernel)
    monkeypatch.setattr(kernels, "_extend_kernel", recorder)
    shapes = [(32, 1, 8, 32), (35, 32, 8, 32), (37, 32, 8, 1)]
    cores = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    index = torch.int32 if dtype == torch.bfloat16 else torch.int64
    for count in (128, 4096):
        kernels.forward(
            torch.empty(count, dtype=index, device="meta"), cores, 41_280, 512
        )  # fmt: skip
    assert len(recorder.launches) == 4
    for launch in recorder.launches:
        compiled = launch.compile(target)
        assert compiled.metadata.shared <= SHARED_KIB[target] * 1024
        assert stack_bytes(compiled, tmp_path) == 0
