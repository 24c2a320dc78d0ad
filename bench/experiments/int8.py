# SPDX-License-Identifier: Apache-2.0
"""STS Benchmark: Spearman of MiniLM with its linear layers in int8, dense and pruned in one shot.

python -m bench.experiments.int8 --data DATA      # on an otherwise idle machine: it times too
"""

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import lean_kernels as lk
from bench.experiments import data, results
from lean_kernels import evaluation

DENSITIES = (1.0, 0.9, 0.8)  # blocks of 32x32 kept, those of largest norm, nothing trained
BATCH = 64
ALLOWED = 0.3  # that int8 may cost at density 1


def _lean(density: float, dtype: str | None) -> nn.Module:
    """MiniLM with every linear layer of the encoder block-sparse."""
    rule = {"density": density, "dense_above": 1.0} | ({"dtype": dtype} if dtype else {})
    return lk.convert(data.minilm(), {"linear": {"encoder.*": rule}})


def main(
    data_: Annotated[Path, typer.Option("--data", help="Directory of stsb-dev.csv.")],
    rounds: Annotated[int, typer.Option(help="Times are medians of these.", min=1)] = 2,
) -> None:
    """Measure, and put the outcome into bench/results."""
    pairs = data.read_pairs(data_ / "stsb-dev.csv")
    sentences = [text for pair in pairs for text in (pair.first, pair.second)]
    batches = evaluation.make_batches(data.tokenizer(), sentences, BATCH, 512, "cpu")
    models = {"dense": data.minilm()}
    for density in DENSITIES:
        models |= {
            f"{dtype or 'float32'} {density:g}": _lean(density, dtype) for dtype in (None, "int8")
        }
    calls = {name: lambda m=model: evaluation.embed(m, batches) for name, model in models.items()}
    for model in models.values():
        evaluation.embed(model, batches[:1])
    spent = []
    for _ in range(rounds):
        milliseconds, found = results.one_round(calls)
        spent.append(milliseconds)
    spearman = {name: data.pair_spearman(rows, pairs) for name, rows in found.items()}
    cosine = {name: float((rows * found["dense"]).sum(1).mean()) for name, rows in found.items()}
    timed = results.medians(spent, "dense")
    lost = spearman["dense"] - spearman["int8 1"]

    table = [["encoder linears", "Spearman", "lost to dense", "cosine to dense", "ms", "speed-up"]]
    for name in models:
        table.append(
            [
                name,
                f"{spearman[name]:.2f}",
                f"{spearman['dense'] - spearman[name]:.2f}",
                f"{cosine[name]:.4f}",
                f"{timed[name]['ms']:.0f}",
                f"{timed[name]['speedup']:.2f}x",
            ]
        )
    environment = results.describe_machine()
    notes = [
        "Spearman x 100 of all-MiniLM-L6-v2 (mean pooling, cosine) on the dev split, "
        f"{len(pairs)} pairs. `dense` is transformers' model in float32; the others have all "
        "linear layers of the encoder as `BlockSparseLinear`, the given fraction of 32x32 blocks "
        "kept by norm, in one shot and without training.",
        f"int8 at density 1 loses {lost:.2f}; at most {ALLOWED} is allowed.",
        f"Times: the {len(sentences)} sentences once, batches of {BATCH} of similar length, "
        f"{environment['cpu']}, {environment['threads']} threads; medians of {rounds} rounds of "
        "all rows in turn.",
    ]
    content = {"environment": environment, "spearman": spearman, "cosine": cosine, "timed": timed}
    title = "STS Benchmark: Spearman in int8"
    results.publish("int8", title, notes, {"Dev": table}, content)
    print(*(" | ".join(row) for row in table), sep="\n")
    if lost > ALLOWED:
        raise typer.Exit(3)


if __name__ == "__main__":
    typer.run(main)
