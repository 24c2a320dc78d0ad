# SPDX-License-Identifier: Apache-2.0
"""Tables of tile sizes for Triton kernels, per GPU.

A table is JSON: nested objects, whose keys and lists are the op's own business. Its entries come
from these files, later ones over earlier:

    ops/<op>/configs/<architecture>.json   sm_80, sm_90 or gfx942: reasoned, not measured
    ops/<op>/configs/<device>.json         measured on such a device and shipped
    <folder>/<op>/<device>.json            written by `lean-kernels tune`

where <folder> is $LEAN_KERNELS_CONFIGS, or lean_kernels in the user's cache folder.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from lean_kernels._files import write_file

Table = dict
_OPS = Path(__file__).parent / "ops"
_overrides: dict[str, Table] = {}
_log = logging.getLogger("lean_kernels")


@cache
def architecture(device: torch.device) -> str:
    """Whose shipped table a device takes; other CUDA devices take that of sm_80."""
    if torch.version.hip:
        return "gfx942"
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "sm_90" if hopper else "sm_80"


def device_name(device: torch.device) -> str:
    """The file name of a device's own table, e.g. nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def user_file(op: str, device: torch.device) -> Path:
    """Where `lean-kernels tune` leaves the table of an op."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LEAN_KERNELS_CONFIGS") or cache_folder / "lean_kernels")
    return folder / op / f"{device_name(device)}.json"


def merge(base: Table, over: Table) -> Table:
    """`base` with the entries of `over`, which win."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def entry(table: Table, path: tuple[str, ...]):
    """The value at a path of keys, or None."""
    for key in path:
        if not isinstance(table, dict) or key not in table:
            return None
        table = table[key]
    return table


def nested(path: tuple[str, ...], value) -> Table:
    """The table that holds only `value`, at `path`."""
    for key in reversed(path):
        value = {key: value}
    return value


@cache
def _of_files(op: str, architecture: str, device: torch.device | None) -> Table:
    configs = _OPS / op / "configs"
    files = [configs / f"{architecture}.json"]
    if device is not None:
        files += [configs / f"{device_name(device)}.json", user_file(op, device)]
        if not any(file.is_file() for file in files[1:]):
            _log.info(
                "%s: no measured tile sizes for %s; `lean-kernels tune %s` makes them",
                op, device_name(device), op,
            )  # fmt: skip
    table: Table = {}
    for file in files:
        if file.is_file():
            table = merge(table, json.loads(file.read_text()))
    return table


def table(op: str, device: torch.device) -> Table:
    """The table of an op for a device; not to be changed."""
    real = device if device.type == "cuda" else None
    found = _of_files(op, architecture(device), real)
    return merge(found, _overrides[op]) if op in _overrides else found


@contextmanager
def override(op: str, over: Table) -> Iterator[None]:
    """Within the block, entries of `over` win over every file."""
    before = _overrides.get(op)
    _overrides[op] = merge(before or {}, over)
    try:
        yield
    finally:
        _overrides.pop(op)
        if before is not None:
            _overrides[op] = before


def save(op: str, device: torch.device, over: Table) -> Path:
    """Write entries into the user's table of a device, beside those it has; return the file."""
    file = user_file(op, device)
    known = json.loads(file.read_text()) if file.is_file() else {}
    write(file, merge(known, over))
    _of_files.cache_clear()
    return file


def write(file: Path, table: Table) -> None:
    """Write a table, whole or not at all, over an earlier one."""
    write_file(file, (json.dumps(table, indent=1) + "\n").encode(), overwrite=True)
