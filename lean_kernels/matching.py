# SPDX-License-Identifier: Apache-2.0
"""The modules that the globs of a recipe match, and what else owns their parameters."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Match:
    """A module that a rule matched. It is named, not held: a replaced layer is freed at once."""

    names: list[str]  # all names of the one module object
    rule: Any
    left_dense: str | None  # why a module that is matched stays as it is


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module object."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def replace(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Put `module` at each of the dotted names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def match(
    model: nn.Module,
    rules: Mapping[str, Any],
    why_not: Callable[[list[str], nn.Module], str | None],
    listed: Callable[[nn.Module], bool],
    these_can: str,
) -> list[Match]:
    """The modules each rule takes, in the order of the model.

    Args:
        rules: glob on full module names to rule; the first glob that matches wins.
        why_not: called with a module's names and the module; None where it can be replaced.
        listed: whether a module that cannot be replaced is of the sort that can, so that it counts
            as left dense.
        these_can: ends the error for a glob that matches nothing else.

    Raises:
        ValueError: a glob that matches nothing, or nothing that can be replaced, or nothing that
            an earlier glob leaves it.
    """
    matches, unusable = [], {glob: [] for glob in rules}
    winners: dict[str, list[str]] = {}  # of each glob, whose the modules are that it matches
    candidates = []
    for names in aliases(model).values():
        module = model.get_submodule(names[0])
        matching = [g for g in rules if any(fnmatch.fnmatchcase(n, g) for n in names if n)]
        reason = why_not(names, module)
        if reason is None:
            candidates.append(names[0])
        if not matching:
            continue
        if reason is None:
            for glob in matching:
                winners.setdefault(glob, []).append(matching[0])
        else:
            for glob in matching:
                unusable[glob].append(f"{names[0]} ({reason})")
        if reason is None or listed(module):
            matches.append(Match(names, rules[matching[0]], reason))
    for glob in rules:
        if glob in winners:
            if glob not in winners[glob]:
                earlier = ", ".join(map(repr, dict.fromkeys(winners[glob])))
                raise ValueError(
                    f"convert: {glob!r} is without effect: all that it matches goes to {earlier}, "
                    "which comes first; put the narrower glob first, or remove one"
                )
            continue
        if unusable[glob]:
            some = ", ".join(unusable[glob][:5]) + (", ..." if len(unusable[glob]) > 5 else "")
            raise ValueError(
                f"convert: {glob!r} matches only modules that cannot be converted: {some}; "
                f"{these_can}"
            )
        raise ValueError(f"convert: {glob!r} matches no module{_near_misses(glob, candidates)}")
    return matches


def check_weights(model: nn.Module, matches: list[Match]) -> None:
    """Raise ValueError unless the weights that will be replaced are there and finite."""
    for found in matches:
        if found.left_dense is not None:
            continue
        name = found.names[0]
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"convert: {name} is on the meta device; load its weights first")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"convert: the weight of {name} has NaN or infinite values")


def owners(model: nn.Module) -> Callable[[nn.Module], list[str]]:
    """A function from a module to the names of all parameters in the memory of its own."""
    shared: dict[tuple, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(_memory(parameter), []).append(name)
    return lambda module: [n for p in module.parameters() for n in shared[_memory(p)]]


def _memory(tensor: torch.Tensor) -> tuple:
    plain = type(tensor) is nn.Parameter and not tensor.is_meta
    pointer = tensor.data_ptr() if plain else 0
    return (tensor.device, pointer) if pointer else (id(tensor),)


def _near_misses(glob: str, candidates: list[str]) -> str:
    if not candidates:
        return "; the model has no layer that can be converted"
    patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in candidates)
    close = difflib.get_close_matches(glob, patterns, n=3, cutoff=0.5) or list(patterns)[:3]
    return f"; among those that can be converted are {', '.join(map(repr, close))}"
