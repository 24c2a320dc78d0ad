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
from setuptools.modified import newer_group

TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11; later ones load it too
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
CUDA = [f"csrc/cuda/{op}.cu" for op in ("tensor_product_embedding", "token_compaction")]
CUDA += ["csrc/register_cuda.cpp"]
CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"),
    *("-gencode", "arch=compute_80,code=[sm_80,compute_80]"),
    *("-gencode", "arch=compute_90a,code=sm_90a", "--threads", "2"),
    *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"),
]
# -O0: optimising what they add to the unrolled tiles would take many minutes.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O0"]


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set; records why it could not."""

    def run(self) -> None:
        given, extensions, built, reasons = vars(self).copy(), self.extensions, [], {}
        mode = os.environ.get("LEAN_KERNELS_BUILD")
        skipped = "LEAN_KERNELS_BUILD=none when the package was built" if mode == "none" else None
        for name, extension in zip(("cpu", "cuda"), extensions, strict=True):
            extension.py_limited_api = True
            reason = skipped
            if not reason and name == "cuda" and not (NVCC and built):
                reason = "no C++ compiler, or no nvcc under CUDA_HOME or on PATH"
            vars(self).update(given, extensions=[extension])  # run() changes compiler and inplace
            try:
                if reason is None:
                    self.use_torch(extension)
                    super().run()
                    built.append(extension)
            except Exception as error:
                if mode == "required":
                    raise
                reason = f"the build failed: {type(error).__name__}: {error}"
            reasons[name] = reason
        self.extensions = built
        print("lean_kernels: built, or why not:", reasons)
        info = Path("." if given["inplace"] else self.build_lib, "lean_kernels/_build_info.json")
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(reasons) + "\n")

    def use_torch(self, extension: Extension) -> None:
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            raise RuntimeError(
                f"torch is not importable where the package is built ({error}); install torch, "
                "then: pip install --no-build-isolation ."
            ) from None
        extension.include_dirs = include_paths()
        extension.library_dirs = [str(Path(torch.__file__).parent / "lib")]
        extension.libraries = ["torch_cpu"]

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            path = self.get_ext_fullpath(ext.name)
            if self.force or newer_group([*ext.sources, *ext.depends], path):
                self.mkpath(str(Path(path).parent))
                torch = [*(f"-I{d}" for d in ext.include_dirs), f"-L{ext.library_dirs[0]}"]
                self.spawn([NVCC, *NVCC_FLAGS, *ext.sources, *torch, "-ltorch_cpu", "-o", path])
            return
        compile_one = self.compiler.compile
        sanitize = SANITIZE if os.environ.get("LEAN_KERNELS_SANITIZE") == "1" else []

        def compile_each(sources, output_dir=None, macros=None, extra_postargs=None, **kwargs):
            def one(source, isa=None):
                defined = [*macros, ("LEAN_KERNELS_ISA", isa)] if isa else macros
                isa_flags = ISAS.get(isa, []) + EXTRA.get((Path(source).stem, isa), [])
                flags = [*(extra_postargs or []), *isa_flags, *sanitize]
                place = f"{output_dir}/{isa}" if isa else output_dir
                return compile_one([source], place, defined, extra_postargs=flags, **kwargs)

            jobs = [(k, isa) for k in KERNELS for isa in ISAS if "amx" not in k or isa == "avx512"]
            jobs += [(source,) for source in sources if source not in KERNELS]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [path for paths in pool.map(lambda job: one(*job), jobs) for path in paths]

        self.compiler.compile = compile_each
        ext.extra_link_args = [*ext.extra_link_args, *sanitize]
        super().build_extension(ext)


FLAGS = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DPy_LIMITED_API=0x030a0000"]
FLAGS += ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
CPU, GPU = ([str(p) for p in Path("csrc").rglob(kind)] for kind in ("*.h", "*.cuh"))  # headers
setup(
    ext_modules=[
        Extension("lean_kernels._C", HOST + KERNELS, extra_compile_args=FLAGS, depends=CPU),
        Extension("lean_kernels._C_cuda", CUDA, depends=GPU),
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
