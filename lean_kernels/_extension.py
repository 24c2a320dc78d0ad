# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled kernels, and remembers why it could not."""

import ctypes
import json
from functools import cache
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def _build_reason(kernels: str, tools: str) -> str:
    """What the build left as its reason for not compiling, or a guess that names the fix."""
    try:
        reason = json.loads((_PACKAGE / "_build_info.json").read_text()).get(kernels)
    except (OSError, ValueError):
        reason = None
    return reason or (
        f"not built; reinstall with {tools} and torch present: "
        "pip install --no-build-isolation lean_kernels"
    )


@cache
def load_cpu() -> str | None:
    """Load the CPU kernels once. Returns None when they are loaded, else the reason why not."""
    path = _PACKAGE / "_C.abi3.so"
    if not path.exists():
        return _build_reason("cpu", "a C++ compiler")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {error}"
    return None


@cache
def load_cuda() -> str | None:
    """Load the CUDA kernels once. Returns None when they are loaded, else the reason why not."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    path = _PACKAGE / "_C_cuda.abi3.so"
    if not path.exists():
        return _build_reason("cuda", "nvcc")
    try:
        # A build against torch for CPU does not name the library that has the current stream.
        library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def cpu_isa() -> str | None:
    """Instruction set the CPU kernels use; None when they are not loaded or it is not available."""
    if load_cpu() is not None:
        return None
    function = ctypes.CDLL(str(_PACKAGE / "_C.abi3.so")).lean_kernels_cpu_isa
    function.restype = ctypes.c_char_p
    name = function()
    return name.decode() if name else None
