# SPDX-License-Identifier: Apache-2.0
"""The command line: `lean-kernels` or `python -m lean_kernels`.

torch, transformers and rich are imported by the commands that need them, so that --help is quick.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

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


def _console():
    """Stdout; wide where it is a file or a pipe, so that no table is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@command
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, and which kernels run here (or why they do not)."""
    from lean_kernels.info import collect

    report = collect()
    if as_json:
        import json

        typer.echo(json.dumps(report, indent=2))
        return

    from rich.markup import escape
    from rich.table import Table

    cpu, gpu = report["cpu"], report["gpu"]
    facts = {name: report[name] for name in ("lean_kernels", "python", "torch", "platform")}
    facts["CPU"] = f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']}"
    facts["instruction sets"] = cpu["instruction_sets"]
    facts["CPU kernels use"] = cpu["kernels_use"] or "no kernels loaded: see the table"
    facts["LEAN_KERNELS_CPU_ISA"] = cpu["LEAN_KERNELS_CPU_ISA"] or "not set"
    facts["GPU"] = gpu["devices"] or "none seen by torch"
    facts["torch built for"] = " ".join(
        f"{name.upper()} {gpu[name]}" for name in ("cuda", "rocm") if gpu[name]
    )
    facts |= {name: version or "not installed" for name, version in report["packages"].items()}
    listing = Table(box=None, show_header=False)
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        listing.add_row(name, escape(text or "CPU only"))
    console = _console()
    console.print(listing)

    if isinstance(report["ops"], str):
        console.print(f"ops: {escape(report['ops'])}")
        return
    table = Table("op", "backend", "runs here")
    for op, backends in report["ops"].items():
        for backend, status in backends.items():
            table.add_row(op, backend, escape(status))
    console.print(table)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; yields the function to call with (done, total, what comes next)."""
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


def _model_path(model: str) -> str:
    """Resolve MODEL: the word minilm, a local directory, or else what may be a hub id."""
    if model == "minilm":
        from lean_kernels.demo import minilm_path

        return str(minilm_path())
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise FileNotFoundError(f"model {model!r} is neither a directory nor a hub id")
    return model


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise ImportError("this command needs transformers: pip install 'lean_kernels[hf]'")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@command
def convert(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the word minilm.")],
    recipe: Annotated[Path, typer.Option(help="TOML: which modules become what.")],
    out: Annotated[Path, typer.Option(help="Directory for the lean model and its tokenizer.")],
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a model lean by a recipe, and save it for AutoModel.from_pretrained."""
    from lean_kernels._files import check_replaceable

    check_replaceable(out, "config.json", force)
    if not recipe.exists():
        raise FileNotFoundError(f"recipe {recipe} does not exist")
    path = _model_path(model)
    _require_transformers()

    import lean_kernels as lk
    from lean_kernels.demo import load_tokenizer
    from lean_kernels.integrations.transformers import save

    rules = lk.Recipe.from_toml(recipe)
    dense, tokenizer = lk.load(path), load_tokenizer(path)
    with _progress() as progress:
        lean = lk.convert(dense, rules, progress=progress)
        save(lean, out, tokenizer=tokenizer, overwrite=force)
    _print_report(lean.lean_report())
    typer.echo(f"saved {out}" + ("" if tokenizer else " (the model has no tokenizer)"))
    typer.echo(f"load it: import lean_kernels; model = lean_kernels.load({str(out)!r})")


def _print_report(report) -> None:
    from rich.markup import escape
    from rich.table import Table

    header, *rows = report.rows()
    table = Table(*header)
    for column in table.columns[1:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    console = _console()
    console.print(table)
    console.print(report.summary())


def _densities(text: str) -> tuple[float, ...]:
    try:
        densities = tuple(float(part) for part in text.split(","))
    except ValueError:
        densities = ()
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"--densities: expected numbers in (0, 1] with commas, got {text!r}")
    return tuple(dict.fromkeys(densities))


@command
def demo(
    model: Annotated[str, typer.Option(help="A directory, a hub id, or minilm.")] = "minilm",
    texts: Annotated[
        Path | None, typer.Option(help="One text per line; without it, 250 shipped sentences.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for models, table and plot.")] = Path(
        "out/demo"
    ),
    densities: Annotated[str, typer.Option(help="Fractions kept.")] = "0.9,0.75,0.5,0.35,0.2,0.1",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes, if time allows.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Compare a dense encoder with lean ones: speed, size, and how faithful the embeddings stay."""
    from lean_kernels import _extension
    from lean_kernels import demo as comparison
    from lean_kernels._files import check_replaceable

    check_replaceable(out, comparison.RESULTS, force)
    chosen = _densities(densities)
    path = _model_path(model)
    lines = comparison.read_texts(texts)
    _require_transformers()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _progress() as progress:
        result = comparison.run(
            path,
            lines,
            out,
            densities=chosen,
            batch_size=batch_size,
            rounds=rounds,
            device=device,
            overwrite=force,
            title="all-MiniLM-L6-v2" if model == "minilm" else model,
            progress=progress,
        )
    _print_comparison(result)
    if device == "cpu" and (reason := _extension.load_cpu()) is not None:
        typer.echo(f"warning: without CPU kernels lean layers run on slow plain PyTorch: {reason}")
    if find_spec("matplotlib") is None:
        typer.echo("plot     skipped: pip install matplotlib")
    else:
        typer.echo(f"plot     {out / comparison.PLOT}")
    typer.echo(f"results  {out / comparison.RESULTS}")
    for row in result.rows[1:]:
        typer.echo(f"model    {row.path}")


def _print_comparison(result) -> None:
    from rich.table import Table

    table = Table(
        *("density", "ms", "speed-up", "sparse layers", "parameters"),
        *("MB on disk", "cosine", "Spearman"),
    )
    for column in table.columns:
        column.justify = "right"
    for row in result.rows:
        table.add_row(
            "dense" if row.density is None else f"{row.density:g}",
            f"{row.milliseconds:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.sparse_layers} of {result.layers}",
            f"{row.parameters / 1e6:.1f} M",
            f"{row.bytes_on_disk / 1e6:.1f}",
            f"{row.cosine:.4f}",
            f"{row.spearman:.4f}",
        )
    typer.echo(
        f"{result.model}: {result.texts} texts, {result.tokens} tokens in "
        f"batches of {result.batch_size}, {result.threads} threads on {result.device}; "
        f"median of {result.rounds} passes, dense and lean in turn"
    )
    _console().print(table)
    typer.echo(
        "cosine: mean over texts of lean against dense embedding; Spearman: of all pairwise "
        "similarities, lean against dense."
    )
    typer.echo(
        "Every lean model was saved and reloaded by stock AutoModel.from_pretrained; the weights "
        "came back bit for bit; largest difference of an embedding: "
        f"{result.largest_reload_difference:g}."
    )
    typer.echo(
        "These models were pruned by magnitude and not trained: accuracy at low density needs "
        "training with the blocks dropped, which is what the pruning papers do."
    )


@command
def bench(
    case: Annotated[str, typer.Argument(help="block_sparse_linear or bert_encoder.")],
    suite: Annotated[str | None, typer.Option(help="quick, full, numbers, ...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --suite quick.")] = False,
    impl: Annotated[str | None, typer.Option(help="Time this implementation of the op.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads; default as torch has.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Filter, field=value[,value].")] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Write under bench/results.")] = False,
    debug: Debug = False,
) -> None:
    """Check kernels and their competitors against float64, then time them side by side."""
    import lean_kernels

    checkout = Path(lean_kernels.__file__).parents[1]
    for root in (checkout, Path.cwd()):
        if (root / "bench" / "run.py").is_file():
            sys.path.insert(0, str(root))
            break
    else:
        raise FileNotFoundError(
            f"no folder bench/ in {checkout} or here: benchmarks come with the source, not with "
            "the installed package; clone the repository and run this command inside it"
        )
    from bench import run

    code = run.main(
        case,
        suite=suite,
        quick=quick,
        impl=impl,
        device=device,
        threads=threads,
        only=only or (),
        json_out=json,
        markdown_out=markdown,
        plot_out=plot,
        save=save,
    )
    raise typer.Exit(code)


def main() -> None:
    app(prog_name="lean-kernels")
