# SPDX-License-Identifier: Apache-2.0
"""What this installation can do here. Every probe is guarded: the report never fails."""

import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

OPTIONAL_PACKAGES = ("transformers", "triton", "onnxruntime", "openvino", "matplotlib")
# The x86 features that CPU kernels are, or could be, compiled for, by their /proc/cpuinfo names.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


def _guard(probe: Callable, *args):
    """The probe's result, or one line that says how it failed."""
    try:
        return probe(*args)
    except Exception as error:
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())})"


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    raise LookupError(f"no {field!r} in /proc/cpuinfo")


def _cpu_model() -> str:
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return _cpuinfo("model name")
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _instruction_sets() -> list[str]:
    present = _cpuinfo("flags").split()
    return [name for name in INSTRUCTION_SETS if name in present]


def _kernels_isa() -> str | None:
    extension = import_module("lean_kernels._extension")
    return extension.cpu_isa() if extension.load_cpu() is None else None


def _gpus() -> list[str]:
    import torch

    def describe(index: int) -> str:
        device = torch.cuda.get_device_properties(index)
        arch = getattr(device, "gcnArchName", f"sm_{device.major}{device.minor}")
        return f"{device.name} ({arch}, {device.total_memory / 2**30:.0f} GiB)"

    return [describe(index) for index in range(torch.cuda.device_count())]


def _backend(name: str) -> str:
    """ "yes", or the reason why the backend does not run here."""
    if name == "reference":
        return "yes"
    if name == "cpu":
        return import_module("lean_kernels._extension").load_cpu() or "yes"
    if name == "cuda":
        missing = import_module("lean_kernels._extension").load_cuda()
        return missing or ("yes" if _torch("cuda.is_available") else "torch sees no GPU")
    if name == "triton":
        if find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "yes (interpreter: right, but slow)"
        import torch

        return "yes" if torch.cuda.is_available() else "torch sees no GPU"
    raise LookupError(f"no probe for backend {name!r}")


def _ops() -> dict[str, dict[str, str]]:
    found = {}
    for module in iter_modules(import_module("lean_kernels.ops").__path__):
        if not module.ispkg:
            continue
        op = import_module(f"lean_kernels.ops.{module.name}.op")
        found[op.NAME] = {impl.value: _guard(_backend, impl.value) for impl in op.IMPLS}
    return found


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch(attribute: str):
    value = import_module("torch")
    for name in attribute.split("."):
        value = getattr(value, name)
    return value() if callable(value) else value


def collect() -> dict:
    """The report as plain data, ready for `json.dumps`.

    A value that could not be found is the string "unknown (reason)". What is not there is None: a
    package, an environment variable, the instruction set of kernels that are not loaded.
    """
    return {
        "lean_kernels": _guard(lambda: import_module("lean_kernels").__version__),
        "python": _guard(platform.python_version),
        "torch": _guard(lambda: str(import_module("torch").__version__)),
        "platform": _guard(platform.platform),
        "cpu": {
            "model": _guard(_cpu_model),
            "cores": _guard(_cores),
            "torch_threads": _guard(_torch, "get_num_threads"),
            "instruction_sets": _guard(_instruction_sets),
            "kernels_use": _guard(_kernels_isa),
            "LEAN_KERNELS_CPU_ISA": os.environ.get("LEAN_KERNELS_CPU_ISA"),
        },
        "gpu": {
            "cuda": _guard(_torch, "version.cuda"),
            "rocm": _guard(_torch, "version.hip"),
            "devices": _guard(_gpus),
        },
        "ops": _guard(_ops),
        "packages": {name: _guard(_package, name) for name in OPTIONAL_PACKAGES},
    }
