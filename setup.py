# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ into lean_kernels/_C.abi3.so and, where there is nvcc, _C_cuda.abi3.so.

What cannot be compiled is left out, and the reason kept.
LEAN_KERNELS_BUILD=none skips the build; =required turns a failed build into an error.
LEAN_KERNELS_SANITIZE=1 adds address and undefined-behaviour sanitizers.
"""

import json
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # LibTorch stable ABI of torch 2.11 and up
# One set of kernels per instruction set, from every file of isa/; the largest first.
KERNELS = sorted(map(str, Path("csrc/cpu/isa").glob("*.cpp")), key=os.path.getsize, reverse=True)
HOST = ["csrc/register_cpu.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
ISAS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    ISAS["avx512"] += ["-mfma", "-mf16c", "-mprefer-vector-width=512"]
# Without exceptions no table of handlers, shared by all sets, goes with the tile registers.
TILES = ("block_sparse_amx", "block_sparse_float16_amx", "ragged_attention")
EXTRA = {(source, "avx512"): ["-fno-exceptions"] for source in TILES}
EXTRA["block_sparse_int8", "avx512"] = ["-mavx512vnni"]  # picked apart
OBJECTS = [  # source, folder, flags of its own
    (source, isa, [f"-DLEAN_KERNELS_ISA={isa}", *flags, *EXTRA.get((Path(source).stem, isa), [])])
    for source in KERNELS
    for isa, flags in ISAS.items()
    if "amx" not in source or isa == "avx512"
] + [(source, "host", []) for source in HOST]
CUDA = [*map(str, sorted(Path("csrc/cuda").glob("*.cu"))), "csrc/register_cuda.cpp"]
CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"),
    *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
    *("-gencode", "arch=compute_90a,code=sm_90a", "--threads", "2", "-DUSE_CUDA", TARGET),
]
FLAGS = [TARGET, "-DPy_LIMITED_API=0x030a0000", "-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-psabi"]
# -O0: optimising what they add to the unrolled tiles would take many minutes.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O0"]
SANITIZE = SANITIZE if os.environ.get("LEAN_KERNELS_SANITIZE") == "1" else []


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set; records why it could not."""

    def run(self) -> None:
        super().run()
        print("lean_kernels: built, or why not:", self.reasons)
        info = Path("." if self.inplace else self.build_lib, "lean_kernels/_build_info.json")
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(self.reasons) + "\n")

    def build_extensions(self) -> None:
        mode, built, self.reasons = os.environ.get("LEAN_KERNELS_BUILD"), [], {}
        reason = "LEAN_KERNELS_BUILD=none when the package was built" if mode == "none" else None
        for name, extension in zip(("cpu", "cuda"), self.extensions, strict=True):
            if name == "cuda" and not NVCC:
                reason = reason or "no nvcc under CUDA_HOME or on PATH"
            try:
                if reason is None:
                    self.build_extension(extension)
                    built.append(extension)
            except Exception as error:
                if mode == "required":
                    raise
                reason = f"the build failed: {type(error).__name__}: {error}"
            self.reasons[name] = reason
        self.extensions = built

    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise RuntimeError(
                f"torch is not importable where the package is built ({error}); install torch, "
                "then: pip install --no-build-isolation ."
            ) from None
        ext.include_dirs, ext.library_dirs = include_paths(), library_paths()
        if ext.name.endswith("_cuda"):
            path = self.get_ext_fullpath(ext.name)  # beside _C, whose folder is there
            torch = [*(f"-I{d}" for d in ext.include_dirs), *(f"-L{d}" for d in ext.library_dirs)]
            command = [NVCC, *NVCC_FLAGS, *ext.sources, *torch, "-ltorch_cpu", "-o", path]
            self.make_file([*ext.sources, *ext.depends], path, self.spawn, [command])
            return
        compile_one = self.compiler.compile

        def compile_each(sources, output_dir, extra_postargs, **kwargs):
            def one(source, folder, flags):
                place = f"{output_dir}/{folder}"
                return compile_one([source], place, extra_postargs=extra_postargs + flags, **kwargs)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [path for (path,) in pool.map(one, *zip(*OBJECTS, strict=True))]

        self.compiler.compile = compile_each
        super().build_extension(ext)


CPU, GPU = ([str(p) for p in Path("csrc").rglob(kind)] for kind in ("*.h", "*.cuh"))  # headers
CPU = {"depends": CPU, "extra_compile_args": FLAGS + SANITIZE, "extra_link_args": SANITIZE}
BOTH = {"libraries": ["torch_cpu"], "py_limited_api": True}
setup(
    ext_modules=[
        Extension("lean_kernels._C", HOST + KERNELS, **CPU, **BOTH),
        Extension("lean_kernels._C_cuda", CUDA, depends=GPU, **BOTH),
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
