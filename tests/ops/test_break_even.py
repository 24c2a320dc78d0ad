# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from lean_kernels.ops.block_sparse_linear import break_even as module

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setenv("LEAN_KERNELS_CPU_ISA", "avx2")

    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "cpu-avx2.json").write_text(text)
        module._load.cache_clear()

    yield write
    module._load.cache_clear()


def test_exact_nearest_and_absent(measured):
    measured({"float32": {"32x32": 0.9, "64x16": 0.8, "1x16": 0.3}})
    look_up = module.break_even
    assert look_up((32, 32), torch.float32, CPU) == 0.9
    assert look_up((64, 16), torch.float32, CPU) == 0.8
    assert look_up((64, 64), torch.float32, CPU) == 0.9  # nearest area, square like the 32x32
    assert look_up((128, 8), torch.float32, CPU) == 0.8  # same area, nearest aspect
    assert look_up((1, 8), torch.float32, CPU) == 0.3
    assert look_up((32, 32), torch.bfloat16, CPU) == 1.0


def test_a_device_that_was_not_measured_leaves_nothing_dense(measured, monkeypatch):
    monkeypatch.setenv("LEAN_KERNELS_CPU_ISA", "generic")
    assert module.break_even((32, 32), torch.float32, CPU) == 1.0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        [1],
        {"float32": 0.5},
        {"float32": {"32": 0.5}},
        {"float32": {"0x32": 0.5}},
        {"float32": {"32x32": 1.5}},
        {"float32": {"32x32": "0.5"}},
    ],
)
def test_malformed_files_are_named(measured, content):
    measured(content)
    with pytest.raises(ValueError, match=r"cpu-avx2.json: expected"):
        module.break_even((32, 32), torch.float32, CPU)


def test_shipped_files_load():
    for path in module.CONFIGS.glob("*.json"):
        assert module._load(path.stem, module.CONFIGS), path


def test_device_kind(monkeypatch):
    monkeypatch.delenv("LEAN_KERNELS_CPU_ISA", raising=False)
    monkeypatch.setattr(module, "cpu_isa", lambda: "amx")
    assert module.device_kind(CPU) == "cpu-amx"
    monkeypatch.setattr(module, "cpu_isa", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert module.device_kind(CPU) == "cpu-avx512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert module.device_kind(CPU) == "cpu-generic"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert module.device_kind(torch.device("cuda:0")) == "cuda-sm90"
