# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of token selection: compiled by nvcc, run on the CPU, run on a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lean_kernels import _extension
from lean_kernels.ops import Threshold, compact_tokens, gather_tokens, select_tokens

ROOT = Path(__file__).parent.parent.parent
HEADER = ROOT / "csrc" / "cuda" / "token_compaction.cuh"
CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)
CXX = shutil.which(os.environ.get("CXX", "g++"))
KERNELS = 4  # select of two types of scores, compact, gather
_missing = _extension.load_cuda()
on_gpu = pytest.mark.skipif(
    _missing is not None or not torch.cuda.is_available(), reason=_missing or "needs a GPU"
)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_spills(arch, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(
        f'#include "{HEADER}"\n'
        "template __global__ void lean_kernels::select_kernel<float>(lean_kernels::Selection);\n"
        "template __global__ void lean_kernels::select_kernel<double>(lean_kernels::Selection);\n"
    )
    command = [NVCC, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert used == [("0", "0", "0")] * KERNELS
    # Eight blocks of 256 threads share 65,536 registers, and with less each hides less latency.
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == KERNELS and max(registers) <= 64
    assert not re.search(r"warning", done.stderr)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_on_the_cpu_against_a_sort(tmp_path):
    binary = tmp_path / "cuda_check"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    build = [CXX, *flags, "-o", str(binary), str(ROOT / "tests" / "cuda_check.cpp")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d+ cases, 0 failures$", done.stdout, re.M)


def test_where_it_cannot_run_it_says_so():
    if _missing is None:
        pytest.skip("it can run here")
    scores, cu = torch.rand(4), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="select_tokens: impl 'cuda' is not available: "):
        select_tokens(scores, cu, keep=0.5, impl="cuda")
    with pytest.raises(RuntimeError, match="gather_tokens: impl 'cuda' is not available: "):
        gather_tokens(scores, torch.tensor([0]), impl="cuda")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_gpu_against_the_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 600, (300,), generator=generator)
    cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int().cuda()
    tokens = int(lengths.sum())
    scores = (torch.randn(tokens, generator=generator) * 50).round().to(dtype).cuda()
    scores[::97] = torch.nan
    protect = (torch.rand(tokens, generator=generator) < 0.05).cuda()
    counts = torch.randint(-2, 600, (300,), generator=generator).int().cuda()
    tensors = [
        torch.randn(tokens, 768, device="cuda"),
        torch.randn(tokens, 33, device="cuda").bfloat16(),
        torch.randn(tokens, 10, device="cuda")[:, 1:8],
        *(torch.arange(tokens, device="cuda").int() + i for i in range(9)),
    ]
    for keep in (0.3, counts, Threshold(10.0)):
        for guard in (None, protect):
            options = {"keep": keep, "protect": guard}
            expected = compact_tokens(scores, cu, *tensors, **options, impl="reference")
            for total in (None, len(expected[0])):
                ours = compact_tokens(scores, cu, *tensors, **options, total=total, impl="cuda")
                for a, b in zip(ours, expected, strict=True):
                    assert torch.equal(a, b)
    for a, b in zip(
        gather_tokens(tensors[0], ours[0], *tensors[1:], impl="cuda"), tensors, strict=True
    ):
        assert torch.equal(a, b[ours[0]])


@on_gpu
def test_on_a_gpu_two_launches_are_captured_and_nothing_waits():
    cu = torch.tensor([0, 700, 1000], dtype=torch.int32, device="cuda")
    scores, hidden = torch.rand(1000, device="cuda"), torch.randn(1000, 64, device="cuda")
    compact_tokens(scores, cu, hidden, keep=0.5, total=500, impl="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = compact_tokens(scores, cu, hidden, keep=0.5, total=500, impl="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        torch.manual_seed(seed)
        scores.copy_(torch.rand(1000))
        graph.replay()
        expected = compact_tokens(scores, cu, hidden, keep=0.5, impl="reference")
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)
