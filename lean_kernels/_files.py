# SPDX-License-Identifier: Apache-2.0
"""Output directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_replaceable(path: Path, marker: str, overwrite: bool) -> None:
    """Raise FileExistsError unless `path` is free, empty, or an earlier output we may replace.

    Args:
        path: the directory to be written.
        marker: a file that every output of this kind holds. Without it the directory is something
            else, and is never replaced.
        overwrite: whether an earlier output may be replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / marker).is_file():
        raise FileExistsError(
            f"{path} exists and is not an earlier output (it holds no {marker}); choose another "
            f"directory"
        )
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another directory, or --force to replace it")


@contextmanager
def atomic_directory(path: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
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
