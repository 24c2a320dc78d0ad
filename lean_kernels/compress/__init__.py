# SPDX-License-Identifier: Apache-2.0
"""How a dense model becomes lean: token profiles, exits, smaller vocabularies, n-gram students."""

import importlib

__all__ = ["embedding", "exits", "morphemes", "ngrams", "tokens"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"lean_kernels.compress.{name}")
    raise AttributeError(f"module 'lean_kernels.compress' has no attribute {name!r}")
