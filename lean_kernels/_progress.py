# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a callback, and the bar it drives by default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]  # (done, total, what comes next)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr where that is a terminal; yields the function to call."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, text, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's function, or where there is none that of a bar of our own."""
    if progress is None:
        with progress_bar() as own:
            yield own
    else:
        yield progress
