# SPDX-License-Identifier: Apache-2.0
"""Makes `from_pretrained` know lean models, whichever of us and transformers is imported first.

transformers finds no plug-ins by itself, so we register with it: at once when its registry is
loaded already, else right after it loads. Importing this module imports nothing heavy.
"""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    try:
        importlib.import_module("lean_kernels.integrations.transformers")
    except ImportError as error:
        warnings.warn(f"lean models cannot be saved or loaded: {error}", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Finds the registry as the other finders do, and registers once it has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register now, or when transformers' registry is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
