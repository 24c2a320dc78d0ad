# SPDX-License-Identifier: Apache-2.0
"""Drop-in PyTorch layers that turn pruning, compressed vocabularies and dropped tokens into speed.

Importing this package costs little: Triton, transformers and compiled kernels load on first use.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from lean_kernels.integrations import _on_import

__version__ = "0.1.0"

_MODULES = {"compress", "nn", "ops", "optim"}
_NAMES = {
    "Recipe": "lean_kernels.recipe",
    "convert": "lean_kernels.convert",
    "load": "lean_kernels.integrations.transformers",
}
__all__ = ["Recipe", "__version__", "compress", "convert", "load", "nn", "ops", "optim"]

if TYPE_CHECKING:
    from lean_kernels import compress, nn, ops, optim
    from lean_kernels.convert import convert
    from lean_kernels.integrations.transformers import load
    from lean_kernels.recipe import Recipe


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"lean_kernels.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lean_kernels' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


class _Package(ModuleType):
    """`lean_kernels.convert` is a function and a submodule: importing that binds the function."""

    def __setattr__(self, name: str, value) -> None:
        if name in _NAMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_on_import.install()
