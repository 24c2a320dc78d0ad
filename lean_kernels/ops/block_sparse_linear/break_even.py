# SPDX-License-Identifier: Apache-2.0
"""The density above which a dense product is faster, as measured and shipped per device kind.

`configs/<device kind>.json` maps dtype to block shape to density (see `configs/README.md`).
"""

import json
import logging
import math
import os
from functools import cache
from pathlib import Path

import torch

from lean_kernels._extension import cpu_isa

CONFIGS = Path(__file__).parent / "configs"
NEVER_DENSE = 1.0  # no density is above it
_LOG = logging.getLogger(__name__)


def device_kind(device: torch.device) -> str:
    """The name under which measurements are shipped: "cpu-avx2", "cuda-sm90", ..."""
    if device.type == "cpu":
        isa = os.environ.get("LEAN_KERNELS_CPU_ISA") or cpu_isa()
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return f"cpu-{isa or {'default': 'generic'}.get(capability, capability)}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    return device.type


def break_even(block_shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Density above which dense is faster than block-sparse, 1.0 where nothing was measured.

    A block shape that was not measured takes the value of the nearest one: by area, then by aspect.

    Raises:
        ValueError: the shipped file is malformed.
    """
    measured = _load(device_kind(device), CONFIGS).get(str(dtype).removeprefix("torch."), {})
    if not measured:
        return NEVER_DENSE
    return measured[min(measured, key=lambda shape: _distance(shape, block_shape))]


def _distance(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    out, inner = (math.log(a / b) for a, b in zip(first, second, strict=True))
    return round(abs(out + inner), 9), round(abs(out - inner), 9)


@cache
def _load(kind: str, configs: Path) -> dict[str, dict[tuple[int, int], float]]:
    path = configs / f"{kind}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        _LOG.info("no break-even densities measured for %s: no layer is left dense for speed", kind)
        return {}
    try:
        return {
            dtype: {_shape(shape): _density(value) for shape, value in shapes.items()}
            for dtype, shapes in json.loads(text).items()
        }
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected {{dtype: {{block shape: density}}}}, "
            f'e.g. {{"float32": {{"32x32": 0.9}}}}: {error}'
        ) from None


def _shape(text: str) -> tuple[int, int]:
    out, inner = (int(size) for size in text.split("x"))
    if out < 1 or inner < 1:
        raise ValueError(f"block shape {text!r}")
    return out, inner


def _density(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"density {value!r}")
    return float(value)
