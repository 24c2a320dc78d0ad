# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernel of tensor_product_embedding: compiled by nvcc, run on the CPU, on a GPU."""

import re
import subprocess
from dataclasses import replace

import pytest
import torch
from problems import DTYPES
from test_tensor_product_embedding import SHAPES, Problem, problem, upstream
from test_token_compaction_cuda import CXX, NVCC, ROOT, _missing, on_gpu

HEADER = ROOT / "csrc" / "cuda" / "tensor_product_embedding.cuh"
TYPES = ("float", "double", "__nv_bfloat16", "__half")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_spills(arch, tmp_path):
    source = tmp_path / "kernels.cu"
    kernel = "template __global__ void lean_kernels::product_rows_kernel<{}>"
    lines = [f'#include "{HEADER}"']
    lines += [kernel.format(name) + "(lean_kernels::ProductRows);" for name in TYPES]
    source.write_text("\n".join(lines) + "\n")
    command = [NVCC, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert used == [("0", "0", "0")] * len(TYPES)
    # Four blocks of 128 threads or more share 65,536 registers.
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == len(TYPES) and max(registers) <= 128
    assert not re.search(r"warning", done.stderr)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_on_the_cpu_against_the_definition(tmp_path):
    binary = tmp_path / "tensor_product_check"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    build = [CXX, *flags, "-o", str(binary), str(ROOT / "tests" / "tensor_product_check.cpp")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d+ cases, 0 failures$", done.stdout, re.M)


def test_where_it_cannot_run_it_says_so():
    if _missing is None:
        pytest.skip("it can run here")
    with pytest.raises(RuntimeError, match="embedding: impl 'cuda' is not available: "):
        problem((3, 2, 8, 1), 3).run("cuda")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu_against_the_reference(shape, dtype):
    def moved(value):
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.cuda()

    for ids, added, norm in ((1, 0, None), (300, 1, "layer"), (60, 2, "rms")):
        p = problem(shape, ids, dtype, added, norm, padding_idx=3)
        fields = ("ids", "morphemes", "factors", "tables", "table_ids", "weight", "bias")
        p = replace(p, **{name: moved(getattr(p, name)) for name in fields})
        grad = upstream(p).cuda()
        ours = p.grads(lambda q: q.run("cuda"), grad)
        right = p.to(torch.float64).grads(Problem.dense, grad)
        tolerance = max(1e-5, 8 * torch.finfo(dtype).eps)
        for a, b in zip(ours, right, strict=True):
            assert (a.double() - b).norm() <= tolerance * max(float(b.norm()), 1e-3)
