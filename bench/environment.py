# SPDX-License-Identifier: Apache-2.0
"""Where a measurement was taken: enough to judge it, nothing that names a person or a host."""

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lean_kernels import _extension

_ROOT = Path(__file__).parent.parent
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")
_PACKAGES = ("numpy", "transformers", "triton", "onnxruntime", "openvino")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1) if match else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def can_compile() -> bool:
    """Whether torch.compile finds the C++ compiler it needs for CPU code."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return any(shutil.which(name) for name in names)


def collect(device: str, threads: int) -> dict:
    """CPU, instruction sets, versions, commit, load and threads; JSON-ready."""
    flags = set(_cpuinfo("flags").split())
    affinity = getattr(os, "sched_getaffinity", None)
    found = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in _FLAGS if flag in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "forced_isa": os.environ.get("LEAN_KERNELS_CPU_ISA"),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": threads,
        "cpu_kernels": _extension.load_cpu() or "loaded",
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": _versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def is_busy(environment: dict) -> bool:
    """Whether others used a quarter of the cores or more when the run began."""
    load = environment["load_average"]
    return load is not None and load[0] >= environment["cores"] / 4


def device_slug(environment: dict) -> str:
    """A folder name for the results of this device, e.g. `amd-epyc-avx2-2-threads`."""
    if "gpu" in environment:
        name = environment["gpu"]
    else:
        found = {"amx_bf16": "amx", "avx512f": "avx512"}
        names = [name for flag, name in found.items() if flag in environment["isa"]]
        isa = names[0] if names else environment["torch_isa"]
        name = f"{environment['cpu']} {isa} {environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|@", " ", name.lower())).strip("-")


def describe(environment: dict) -> str:
    """One line for a reader."""
    place = environment.get("gpu") or environment["cpu"]
    commit = (environment["commit"] or "unknown")[:10] + (
        " (dirty)" if environment["dirty"] else ""
    )
    load = environment["load_average"]
    return (
        f"{place}, {environment['torch_isa']}, {environment['threads']} of "
        f"{environment['cores']} cores, torch {environment['versions']['torch']}, commit {commit}"
        + (f", load {load[0]:.1f} at start" if load else "")
    )
