# SPDX-License-Identifier: Apache-2.0
"""lean-kernels tune"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lean_kernels.cli.common import Debug, console, progress_bar


def tune(
    op: Annotated[str, typer.Argument(help="block_sparse_linear or ragged_attention.")],
    json: Annotated[
        Path | None, typer.Option(help="Also write the table here, to be shipped in configs/.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Only the choices whose description holds this text.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Find the fastest tile sizes of an op's Triton kernels on this GPU, for later calls to use."""
    import torch

    from lean_kernels import _tuning
    from lean_kernels import tune as tuning

    if op not in tuning.OPS:
        raise ValueError(f"unknown op {op!r}; expected one of {', '.join(tuning.OPS)}")
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU, and torch sees none (lean-kernels info says why)")
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    choices = (problem for problem in tuning.problems(op, device) if only in problem.what)
    out = console()

    with progress_bar() as progress:

        def report(done: int, choice: tuning.Choice) -> None:
            progress(done, None, choice.problem.what)
            tried = len(choice.problem.candidates)
            refused = f", {choice.refused} do not fit or are wrong" if choice.refused else ""
            out.print(f"{choice.problem.what}: {choice.speedup:.2f}x of {tried} tried{refused}")

        seconds = partial(do_bench, warmup=10, rep=40, return_mode="median")
        table = tuning.tune(op, seconds, choices, report)
    file = _tuning.save(op, device, table)
    out.print(f"wrote {file}", soft_wrap=True)
    if json is not None:
        _tuning.write(json, table)
        out.print(f"wrote {json}", soft_wrap=True)
