# SPDX-License-Identifier: Apache-2.0
"""STS Benchmark: Spearman of MiniLM against speed, as tokens are dropped.

python -m bench.experiments.sts profile --data DATA
python -m bench.experiments.sts fit plain --data DATA       # stops after --seconds: run again
python -m bench.experiments.sts fit dropping --data DATA
python -m bench.experiments.sts score untrained --data DATA # and plain, and dropping
python -m bench.experiments.sts time --data DATA            # on an otherwise idle machine
python -m bench.experiments.sts table
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import lean_kernels as lk
from bench.experiments import data, results, training
from lean_kernels import evaluation
from lean_kernels.compress import tokens
from lean_kernels.recipe import TokenRule

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PROFILE_PAIRS = 500  # of the train split
FIT_PAIRS, BATCH, LEARNING_RATE = 3072, 32, 3e-5
FIT_SPEED = 1.0  # while training with tokens dropped
SPEEDS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
SETTINGS = {"packed": None} | {f"{speed:g}": speed for speed in SPEEDS}
MODELS = ("untrained", "plain", "dropping")
EVALUATION_BATCH = 64

Data = Annotated[Path, typer.Option("--data", help="Directory of stsb-train.csv, stsb-dev.csv.")]


def _sentences(pairs: list[data.Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.first, pair.second)]


def _batches(pairs: list[data.Pair]) -> list:
    return evaluation.make_batches(
        data.tokenizer(), _sentences(pairs), EVALUATION_BATCH, 512, "cpu"
    )


def _rule(speed: float | None) -> TokenRule:
    """The measured profile at a speed; None drops nothing."""
    if speed is None:
        return TokenRule()
    return TokenRule(profile=tuple(results.load("sts-profile")["profile"]), speed=speed)


def _lean(speed: float | None) -> tuple[nn.Module, nn.Module]:
    """MiniLM packed, and its encoder."""
    model = lk.convert(data.minilm(), {"tokens": _rule(speed).to_dict()})
    return model, model.encoder


@app.command()
def profile(data_: Data) -> None:
    """Measure the profile of the published model on the train split."""
    pairs = data.read_pairs(data_ / "stsb-train.csv")[:PROFILE_PAIRS]
    batches = [inputs for _, inputs in _batches(pairs)]
    measured = tokens.measure_scores(data.minilm(), batches)
    found = tokens.derive_profile(measured)
    content = {
        "profile": [round(value, 4) for value in found],
        "tokens": int(measured.lengths.sum()),
    }
    results.store("sts-profile", content)
    print(content)


def _loss(tokenizer):
    """Squared error of the cosine to the score, on a scale from 0 to 1."""

    def loss(model: nn.Module, pairs: list[data.Pair]) -> Tensor:
        inputs = tokenizer(_sentences(pairs), padding=True, truncation=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        rows = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        cosine = (rows[0::2] * rows[1::2]).sum(dim=1)
        return F.mse_loss(cosine, torch.tensor([pair.score / 5 for pair in pairs]))

    return loss


@app.command()
def fit(
    how: Annotated[str, typer.Argument(help="plain, or dropping: with tokens dropped.")],
    data_: Data,
    seconds: Annotated[float, typer.Option(help="Stop after these.")] = 300,
) -> None:
    """Fine-tune on the train split."""
    model, _ = _lean({"plain": None, "dropping": FIT_SPEED}[how])
    training.train(
        model,
        data.read_pairs(data_ / "stsb-train.csv")[-FIT_PAIRS:],
        _loss(data.tokenizer()),
        results.WORK / f"sts-{how}.pt",
        epochs=1,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        seconds=seconds,
    )


@app.command()
def measure(
    which: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")], data_: Data
) -> None:
    """Spearman and time over the dev split, padded, packed and at every speed in turn."""
    pairs = data.read_pairs(data_ / "stsb-dev.csv")
    batches = _batches(pairs)
    padded, (model, encoder) = data.minilm(), _lean(None)
    if which != "untrained":
        state = torch.load(results.WORK / f"sts-{which}.pt", weights_only=True)["model"]
        model.load_state_dict(state)
        padded.load_state_dict(state)
    model.eval(), padded.eval()

    def at(speed: float | None):
        rule = _rule(speed)

        def call() -> Tensor:
            encoder.token_rule = rule
            return evaluation.embed(model, batches)

        return call

    calls = {"padded": lambda: evaluation.embed(padded, batches)}
    calls |= {name: at(speed) for name, speed in SETTINGS.items()}
    evaluation.embed(padded, batches[:2]), evaluation.embed(model, batches[:2])
    milliseconds, found = results.one_round(calls)
    spearman = {name: data.pair_spearman(rows, pairs) for name, rows in found.items()}
    content = {"spearman": spearman, "ms": milliseconds, "pairs": len(pairs)}
    results.store(f"sts-{which}", content | {"environment": results.describe_machine()})
    for name in calls:
        print(f"{which} {name}: {spearman[name]:.2f}, {milliseconds[name]:.0f} ms")


def _predicted(data_lengths, padded) -> dict[str, tuple[float, float]]:
    """Mean kept and predicted speed-up of each setting."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(evaluation.minilm_path())
    found = {"padded": (1.0, 1.0)}
    for name, speed in SETTINGS.items():
        rule = _rule(speed)
        kept = None if rule.profile is None else tokens.rescale(rule.profile, rule.speed)
        mean = 1.0 if kept is None else sum(kept) / len(kept)
        speedup = tokens.predict_speedup(kept, data_lengths, config, padded=padded)
        found[name] = (mean, speedup)
    return found


@app.command()
def table(data_: Data) -> None:
    """Put everything measured into bench/results."""
    profile = results.load("sts-profile")
    runs = {which: results.load(f"sts-{which}") for which in MODELS}
    environment = runs["untrained"]["environment"]
    timed = results.medians([run["ms"] for run in runs.values()], "padded")
    batches = _batches(data.read_pairs(data_ / "stsb-dev.csv"))
    lengths = [n for _, i in batches for n in i["attention_mask"].sum(1).tolist()]
    widths = [i["input_ids"].shape[1] for _, i in batches for _ in i["input_ids"]]
    predicted = _predicted(lengths, widths)
    rows = [["speed", "mean kept", "predicted", "measured", "ms", *MODELS]]
    for name, row in timed.items():
        kept, speedup = predicted[name]
        rows.append(
            [
                name,
                f"{kept:.2f}",
                f"{speedup:.2f}x",
                f"{row['speedup']:.2f}x",
                f"{row['ms']:.0f}",
                *(f"{runs[which]['spearman'][name]:.2f}" for which in MODELS),
            ]
        )
    layers = ", ".join(f"{value:.2f}" for value in profile["profile"])
    notes = [
        "Spearman x 100 of all-MiniLM-L6-v2 (mean pooling, cosine) on the dev split, 1500 "
        "pairs, as `speed` rescales one measured profile. A dropped token keeps its last state "
        "in the mean.",
        f"Profile at speed 1 (median of the relative key scores, {profile['tokens']} tokens of "
        f"the train split): {layers}.",
        f"`untrained`: as published. `plain`: fine-tuned on {FIT_PAIRS} pairs of the train split "
        f"with nothing dropped. `dropping`: the same with tokens dropped at speed {FIT_SPEED:g}, "
        "and `speed` changed afterwards without training.",
        f"Times: the {len(lengths)} sentences ({sum(lengths)} tokens) once, batches of "
        f"{EVALUATION_BATCH} of similar length, {environment['cpu']}, "
        f"{environment['threads']} threads; medians of {len(runs)} rounds of all rows in turn. "
        "Speed-ups are over transformers' padded SDPA; predictions count the encoder's products.",
    ]
    content = {"environment": environment, **profile, "timed": timed, "runs": runs}
    results.publish("sts", "STS Benchmark: Spearman against speed", notes, {"Dev": rows}, content)


if __name__ == "__main__":
    app()
