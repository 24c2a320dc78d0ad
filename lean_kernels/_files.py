# SPDX-License-Identifier: Apache-2.0
"""Outputs that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Marker(NamedTuple):
    """What an output of ours is known by: a file in it, and a text in that file."""

    file: str
    text: str

    def marks(self, directory: Path) -> bool:
        try:
            return self.text in (directory / self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False


def check_replaceable(path: Path, marker: Marker, overwrite: bool) -> None:
    """Raise FileExistsError unless `path` is free, empty, or an earlier output we may replace.

    Args:
        path: the directory to be written.
        marker: of outputs of this kind. A directory without it is something else, and is never
            replaced.
        overwrite: whether an earlier output may be replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not marker.marks(path):
        raise FileExistsError(
            f"{path} exists and is not an earlier output (it holds no {marker.file} with "
            f"{marker.text!r}); choose another directory"
        )
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another directory, or --force to replace it")


def check_new_file(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `path` is free or a file that we may replace."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another file, or --force to replace it")


def write_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file whole or not at all, and never over another one unless told to.

    Raises FileExistsError as `check_new_file` does.
    """
    check_new_file(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.write_bytes(content)
        check_new_file(path, overwrite)
        os.replace(fresh, path)


@contextmanager
def atomic_directory(path: Path, marker: Marker, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `path` that becomes `path` if the block ends without an error.

    Raises FileExistsError as `check_replaceable` does, before and after the block.
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, marker, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    fresh, replaced = scratch / "new", scratch / "old"
    fresh.mkdir()
    try:
        yield fresh
        check_replaceable(path, marker, overwrite)
        if path.exists():
            path.rename(replaced)
        fresh.rename(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)
