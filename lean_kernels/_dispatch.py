# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs."""

from enum import Enum


class Impl(str, Enum):
    """An implementation of an op. An explicit choice never falls back to another."""

    REFERENCE = "reference"  # plain PyTorch; defines what is right; any device
    CPU = "cpu"  # C++ kernels, compiled per instruction set
    TRITON = "triton"  # Triton kernels (CUDA, ROCm, or the interpreter)
    CUDA = "cuda"  # CUDA C++ kernels


def resolve(op: str, impl: "Impl | str | None", choices: tuple[Impl, ...]) -> "Impl | None":
    """Return `impl` as an `Impl` the op offers, or None for the best one of the device."""
    if impl is None:
        return None
    valid = ", ".join(repr(choice.value) for choice in choices)
    try:
        chosen = Impl(impl)
    except ValueError:
        chosen = None
    if chosen not in choices:
        raise ValueError(f"{op}: unknown impl {impl!r}; expected one of {valid}") from None
    return chosen
