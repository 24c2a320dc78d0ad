# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the app, how errors are shown, progress, and finding models.

torch, transformers and rich are imported by the commands that need them, so that --help is quick.
"""

import functools
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lean_kernels._progress import progress_bar

__all__ = [
    "Debug",
    "Force",
    "app",
    "check_device",
    "command",
    "console",
    "load_model",
    "model_path",
    "progress_bar",
    "require_transformers",
]

app = typer.Typer(
    name="lean-kernels",
    help="Make pruned Transformers faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output in --out.")]


def command(function: Callable) -> Callable:
    """Register a command whose errors are one line on stderr and exit code 1, unless --debug."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if kwargs["debug"]:
                raise
            message = " ".join(str(error).split())
            expected = (ValueError, TypeError, OSError, ImportError, RuntimeError)
            if not (message and isinstance(error, expected)):
                message = f"{type(error).__name__}: {message} (--debug shows where)"
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from None

    return app.command()(guarded)


def console():
    """Stdout; wide where it is a file or a pipe, so that no table is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def model_path(model: str) -> str:
    """Resolve MODEL: the word minilm, a local directory, or else what may be a hub id."""
    if model == "minilm":
        from lean_kernels.evaluation import minilm_path

        return str(minilm_path())
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise FileNotFoundError(f"model {model!r} is neither a directory nor a hub id")
    return model


def load_model(path: str):
    """The model of `model_path`, as the class it was saved from, and its tokenizer or None."""
    from safetensors import SafetensorError

    import lean_kernels as lk
    from lean_kernels.evaluation import load_tokenizer

    try:
        return lk.load(path), load_tokenizer(path)
    except (OSError, SafetensorError) as error:  # not all of them say what they are about
        raise OSError(f"model {path}: {error}") from error


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute on it here."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"unknown --device {device!r}; expected cpu, cuda or cuda:<number>")
    if device != "cpu" and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here "
            "(lean-kernels info says why); use cpu"
        )


def require_transformers() -> None:
    if find_spec("transformers") is None:
        raise ImportError("this command needs transformers: pip install 'lean_kernels[hf]'")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
