# SPDX-License-Identifier: Apache-2.0
"""Compiles what a Triton launcher launches, for GPUs that need not be here.

A launcher runs on meta tensors with a Recorder in place of each kernel, so the arguments, tiles and
options compiled are those of a real call; and a launcher that read a tensor's values (a host sync
on a GPU) would fail.
"""

import re
import subprocess
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM80, SM90 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)
SHARED_KIB = {SM80: 163, SM90: 227, GFX942: 64}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
}


class Launch(NamedTuple):
    kernel: triton.runtime.JITFunction
    arguments: tuple
    options: dict
    grid: tuple[int, ...] = ()

    def compile(self, target: GPUTarget):
        """Compile for `target`, specialised on the arguments as Triton would at run time."""
        signature, constants, attributes = {}, {}, {}
        options = dict(self.options)
        for i, parameter in enumerate(self.kernel.params):
            key = parameter.name
            value = self.arguments[i] if i < len(self.arguments) else options.pop(key)
            special = not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[key] = TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float) and not parameter.is_constexpr:
                signature[key] = "fp32"
            elif parameter.is_constexpr or value is None or (special and value == 1):
                signature[key], constants[key] = "constexpr", value
            else:
                signature[key] = "i32" if value < 2**31 else "i64"
                if special and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options)


class Recorder:
    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(Launch(self.kernel, arguments, options, grid))

        return launch


def stack_bytes(compiled, tmp_path) -> int:
    """Bytes per thread of local memory: where registers are spilled."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"private_segment_fixed_size: (\d+)", compiled.asm["amdgcn"])[1])
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
