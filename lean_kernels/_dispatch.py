# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs."""

import importlib
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec

import torch
from torch import Tensor

from lean_kernels import _extension

_cpu_missing = _extension.load_cpu()  # here, since torch.compile cannot trace it
_cuda_missing = _extension.load_cuda()


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


class Kernel:
    """The raw op lean_kernels::<name>: schema, fake, reference and Triton launcher.

    Compiled kernels register themselves for CPU, and some for CUDA, when the extensions load.

    Args:
        reference: plain PyTorch, the same arguments; runs where nothing else is registered.
        fake: the outputs' shapes and dtypes.
        triton: "module:function" of the launcher; imported at its first call. None: no kernel.
        cuda: there is a CUDA C++ kernel too, the better one where it is loaded.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable,
        fake: Callable,
        triton: str | None = None,
        cuda: bool = False,
    ) -> None:
        def launch(*args):
            module, _, function = triton.partition(":")
            return getattr(importlib.import_module(module), function)(*args)

        op = f"lean_kernels::{name}"
        torch.library.define(op, schema)
        torch.library.impl(op, "CompositeExplicitAutograd", reference)
        torch.library.register_fake(op, fake)
        self.compiled_for_cuda = cuda and _cuda_missing is None
        if triton and find_spec("triton") is not None and not self.compiled_for_cuda:
            torch.library.impl(op, "CUDA", launch)
        self._reference = reference
        self._triton = launch
        self._best = getattr(torch.ops.lean_kernels, name).default

    def of(self, impl: Impl | None, device: str) -> Callable:
        """What to call for a resolved `impl` on a type of device."""
        if impl is None:
            return self._best
        if impl is Impl.REFERENCE:
            return self._reference
        # torch.compile sees through the registered op alone: on CUDA mostly the Triton kernel.
        registered = device != "cpu" and not self.compiled_for_cuda
        return self._triton if impl is Impl.TRITON and not registered else self._best


def check_impl(op: str, impl: Impl | None, device: torch.device) -> None:
    """Refuse an explicit implementation that cannot run here.

    Raises:
        ValueError: a CPU or CUDA kernel for tensors elsewhere.
        RuntimeError: it is not installed.
    """
    if impl is None:
        return
    if impl is Impl.TRITON and find_spec("triton") is None:
        raise RuntimeError(f"{op}: impl 'triton' needs Triton: pip install lean_kernels[triton]")
    if impl is Impl.CPU:
        if device.type != "cpu":
            raise ValueError(f"{op}: impl 'cpu' needs CPU tensors, got {device}")
        if _cpu_missing is not None:
            raise RuntimeError(f"{op}: impl 'cpu' is not available: {_cpu_missing}")
    if impl is Impl.CUDA:
        if _cuda_missing is not None:
            raise RuntimeError(f"{op}: impl 'cuda' is not available: {_cuda_missing}")
        if device.type != "cuda":
            raise ValueError(f"{op}: impl 'cuda' needs CUDA tensors, got {device}")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not on the device of the first."""
    (first, tensor), *others = tensors.items()
    device = tensor.device
    for label, tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {label} is on {tensor.device}, {first} on {device}; move them to one device"
            )
