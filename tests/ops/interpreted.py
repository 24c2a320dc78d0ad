# SPDX-License-Identifier: Apache-2.0
"""What tests of Triton kernels share: where they run, and fixtures that guard and mend."""

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
GUARD = 64
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def skip_where_nothing_runs() -> None:
    """For the head of a test module, before it imports kernels."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed", allow_module_level=True)
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip(
            "no GPU; test_triton_interpreter.py runs this file on the CPU", allow_module_level=True
        )


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch):
    """Make torch.empty return NaN between NaN guards, and check that no guard was written."""
    plain, guarded = torch.empty, []

    def empty(*size, dtype=None, **kwargs):
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            return plain(*size, dtype=dtype, **kwargs)
        size = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        flat = plain(size.numel() + 2 * GUARD, dtype=dtype, **kwargs).fill_(torch.nan)
        guarded.append(flat)
        return flat[GUARD : GUARD + size.numel()].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for flat in guarded:
        assert bool(flat[:GUARD].isnan().all()) and bool(flat[-GUARD:].isnan().all())


_ready_modules = set()


@pytest.fixture(autouse=True)
def quick_device_functions(monkeypatch):
    """The interpreter readies triton.language at every launch, and again for every function that a
    kernel calls, which takes half the time; only functions of Triton's own modules need it, once.
    """
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        plain = InterpretedFunction.__call__

        def call(self, *args, **kwargs):
            module = self.fn.__module__
            if module.startswith("triton.") and module not in _ready_modules:
                _ready_modules.add(module)
                return plain(self, *args, **kwargs)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__call__", call)


def mend_bfloat16(monkeypatch, kernels) -> None:
    """Give the interpreter what it lacks, products of bfloat16 and rounding to nearest, and let
    the launchers of the module `kernels` take it."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(src.data).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (plain_cast(self, operand, tl.float32) for operand in (a, b))
        return plain_dot(self, a, b, *rest)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    every = (*kernels._INTERPRETER_DTYPES, torch.bfloat16)
    monkeypatch.setattr(kernels, "_INTERPRETER_DTYPES", every)
