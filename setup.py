# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ into lean_kernels/_C.abi3.so. A build that cannot compile installs pure Python.

LEAN_KERNELS_BUILD=none skips the build; =required turns a failed build into an error.
LEAN_KERNELS_SANITIZE=1 adds address and undefined-behaviour sanitizers.
"""

import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11; later ones load it too
COMMON = [
    "csrc/register_cpu.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/add_layer_norm.cpp",
    "csrc/cpu/block_sparse_linear.cpp",
    "csrc/cpu/ragged_attention.cpp",
    "csrc/cpu/isa/generic.cpp",
    "csrc/cpu/token_selection.cpp",
]
X86 = {
    "csrc/cpu/isa/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/isa/avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set; records why it could not."""

    def run(self) -> None:
        reason, inplace = None, self.inplace  # run() clears inplace, and a failure leaves it so
        mode = os.environ.get("LEAN_KERNELS_BUILD", "auto")
        if mode == "none":
            reason = "LEAN_KERNELS_BUILD=none when the package was built"
        else:
            try:
                self.use_torch()
                super().run()
            except Exception as error:
                if mode == "required":
                    raise
                reason = f"the build failed: {type(error).__name__}: {error}"
                print(f"lean_kernels: installing without compiled kernels; {reason}")
                self.extensions = []
        package = Path("." if inplace else self.build_lib) / "lean_kernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps({"cpu": reason}) + "\n")

    def use_torch(self) -> None:
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            raise RuntimeError(
                f"torch is not importable where the package is built ({error}); install torch, "
                "then: pip install --no-build-isolation ."
            ) from None
        extension = self.extensions[0]
        extension.include_dirs = include_paths()
        extension.library_dirs = [str(Path(torch.__file__).parent / "lib")]
        extension.libraries = ["torch_cpu"]

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile
        # Optimising what the sanitizers add to the unrolled tiles would take many minutes.
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O0"]
        sanitize = sanitize if os.environ.get("LEAN_KERNELS_SANITIZE") == "1" else []

        def compile_each(sources, extra_postargs=None, **kwargs):
            def one(source):
                flags = [*(extra_postargs or []), *X86.get(source, []), *sanitize]
                return compile_one([source], extra_postargs=flags, **kwargs)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [name for names in pool.map(one, sources) for name in names]

        self.compiler.compile = compile_each
        ext.extra_link_args = [*ext.extra_link_args, *sanitize]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "lean_kernels._C",
            sources=[*COMMON, *(X86 if IS_X86 else ())],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET),
                ("Py_LIMITED_API", "0x030a0000"),
            ],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-psabi",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
