# SPDX-License-Identifier: Apache-2.0
"""Makes transformers know lean models and "lean_ragged", whichever of us is imported first.

transformers finds no plug-ins by itself, so we register with it: at once when its registries are
loaded already, else right after they load. Importing this module imports nothing heavy.
"""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder

_INTEGRATIONS = {
    "transformers.quantizers.auto": ("transformers", "lean models cannot be saved or loaded"),
    "transformers.modeling_utils": ("attention", "there is no attention called lean_ragged"),
}


def _register(registry: str) -> None:
    integration, otherwise = _INTEGRATIONS[registry]
    try:
        importlib.import_module(f"lean_kernels.integrations.{integration}")
    except ImportError as error:
        warnings.warn(f"{otherwise}: {error}", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Finds a registry as the other finders do, and registers once it has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _INTEGRATIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register(fullname)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register now, or when transformers' registries are imported."""
    later = [registry for registry in _INTEGRATIONS if registry not in sys.modules]
    for registry in _INTEGRATIONS:
        if registry not in later:
            _register(registry)
    if later and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
