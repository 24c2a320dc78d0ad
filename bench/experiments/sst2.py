# SPDX-License-Identifier: Apache-2.0
"""SST-2: accuracy of a fine-tuned MiniLM against speed, as tokens are dropped and samples leave.

    python -m bench.experiments.sst2 fit --data DATA       # stops after --seconds: run again
    python -m bench.experiments.sst2 measure --data DATA   # on an otherwise idle machine
    python -m bench.experiments.sst2 table

One training, with exit heads after every layer and tokens dropped; then `speed` and the exit
threshold change without any more. The profile is the one that `sts profile` measured.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor, nn

import lean_kernels as lk
from bench.experiments import data, results, training
from lean_kernels import evaluation
from lean_kernels.compress import exits, tokens
from lean_kernels.recipe import ExitRule, TokenRule

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EPOCHS, BATCH, LEARNING_RATE = 1, 32, 1e-4
FIT_SPEED = 1.0
DISTILLATION, TEMPERATURE = 0.5, 2.0
EVALUATION_BATCH = 64

Data = Annotated[Path, typer.Option("--data", help="Directory of sst2-train.tsv, sst2-dev.tsv.")]


class Point(NamedTuple):
    """How the classifier runs: `speed` of the profile and entropy to leave at, None for neither."""

    speed: float | None = None
    entropy: float | None = None

    @property
    def name(self) -> str:
        return f"speed {_name(self.speed)}, entropy {_name(self.entropy)}"


def _name(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


SPEEDS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ENTROPIES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
BOTH = ((1.0, 0.1), (1.0, 0.3), (2.0, 0.2), (2.0, 0.45), (3.0, 0.3), (4.0, 0.6))
POINTS = (
    Point(),
    *(Point(speed=speed) for speed in SPEEDS),
    *(Point(entropy=entropy) for entropy in ENTROPIES),
    *(Point(*both) for both in BOTH),
)


def _token_rule(speed: float | None) -> TokenRule:
    if speed is None:
        return TokenRule()
    return TokenRule(profile=tuple(results.load("sts-profile")["profile"]), speed=speed)


def _set(encoder: nn.Module, point: Point) -> None:
    encoder.token_rule = _token_rule(point.speed)
    entropy = point.entropy
    encoder.exit_rule = None if entropy is None else ExitRule("entropy", threshold=entropy)


def _lean() -> tuple[nn.Module, nn.Module]:
    """The classifier with exit heads, and its encoder."""
    rules = {
        "tokens": _token_rule(FIT_SPEED).to_dict(),
        "exits": {"criterion": "entropy", "threshold": 0.3},
    }
    model = lk.convert(data.minilm_classifier(2), rules)
    return model, model.bert.encoder


def _fitted() -> tuple[nn.Module, nn.Module]:
    model, encoder = _lean()
    state = torch.load(results.WORK / "sst2.pt", weights_only=True)["model"]
    model.load_state_dict(state)
    return model.eval(), encoder


def _padded() -> nn.Module:
    """The same weights as transformers runs them, without exits."""
    state = torch.load(results.WORK / "sst2.pt", weights_only=True)["model"]
    model = data.minilm_classifier(2)
    model.load_state_dict({k: v for k, v in state.items() if ".exits." not in k})
    return model.eval()


@app.command()
def fit(data_: Data, seconds: float = 300) -> None:
    """Fine-tune all exits together, the last one teaching the others, with tokens dropped."""
    model, encoder = _lean()
    tokenizer = data.tokenizer()

    def loss(model: nn.Module, rows: list[data.Labelled]) -> Tensor:
        inputs = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        last = model(**inputs).logits
        labels = torch.tensor([row.label for row in rows])
        return exits.joint_loss(
            [*encoder.exit_logits, last],
            labels,
            distillation=DISTILLATION,
            temperature=TEMPERATURE,
        )

    training.train(
        model,
        data.read_labelled(data_ / "sst2-train.tsv"),
        loss,
        results.WORK / "sst2.pt",
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        seconds=seconds,
    )


def _batches(rows: list[data.Labelled]) -> list:
    texts = [row.text for row in rows]
    return evaluation.make_batches(data.tokenizer(), texts, EVALUATION_BATCH, 512, "cpu")


@torch.inference_mode()
def _accuracy(model: nn.Module, encoder: nn.Module | None, rows, batches) -> dict[str, float]:
    """Percent right, and the mean number of layers a sample went through."""
    labels = torch.tensor([row.label for row in rows])
    right, layers, depth = 0, 0, model.config.num_hidden_layers
    for chosen, inputs in batches:
        found = model(**inputs).logits.argmax(dim=-1)
        right += int((found == labels[chosen]).sum())
        # Without a rule the encoder still tells of its last pass that had one.
        left = None if encoder is None or encoder.exit_rule is None else encoder.exit_layers
        layers += depth * len(chosen) if left is None else int((left + 1).sum())
    return {"accuracy": 100 * right / len(rows), "layers": layers / len(rows)}


@app.command()
def measure(
    data_: Data, rounds: Annotated[int, typer.Option(help="To add to those there are.")] = 1
) -> None:
    """Accuracy and time over the dev split, padded and at every point in turn."""
    rows = data.read_labelled(data_ / "sst2-dev.tsv")
    batches = _batches(rows)
    padded, (model, encoder) = _padded(), _fitted()

    def at(point: Point):
        def call() -> dict[str, float]:
            _set(encoder, point)
            return _accuracy(model, encoder, rows, batches)

        return call

    calls = {"padded": lambda: _accuracy(padded, None, rows, batches)}
    calls |= {point.name: at(point) for point in POINTS}
    _accuracy(padded, None, rows, batches[:1]), _accuracy(model, encoder, rows, batches[:1])
    content = results.load("sst2") or {"rounds": []}
    for _ in range(rounds):
        milliseconds, content["scores"] = results.one_round(calls)
        content["rounds"].append(milliseconds)
    lengths = [n for _, i in batches for n in i["attention_mask"].sum(1).tolist()]
    widths = [i["input_ids"].shape[1] for _, i in batches for _ in i["input_ids"]]
    content["predicted"] = {"padded": 1.0}
    for point in POINTS:
        if point.entropy is None:
            rule = _token_rule(point.speed)
            kept = None if rule.profile is None else tokens.rescale(rule.profile, rule.speed)
            content["predicted"][point.name] = tokens.predict_speedup(
                kept, lengths, padded.config, padded=widths, first_only=True
            )
    content |= {"tokens": sum(lengths), "environment": results.describe_machine()}
    results.store("sst2", content)
    for name in calls:
        print(f"{name}: {content['scores'][name]}, {milliseconds[name]:.0f} ms")


@app.command()
def table() -> None:
    """Put everything measured into bench/results."""
    content = results.load("sst2")
    environment, scores, predicted = (content[k] for k in ("environment", "scores", "predicted"))
    timed = results.medians(content["rounds"], "padded")
    rows = [["", "accuracy", "layers run", "predicted", "measured", "ms"]]
    for name, row in timed.items():
        rows.append(
            [
                name,
                f"{scores[name]['accuracy']:.1f}",
                f"{scores[name]['layers']:.2f}",
                f"{predicted[name]:.2f}x" if name in predicted else "-",
                f"{row['speedup']:.2f}x",
                f"{row['ms']:.0f}",
            ]
        )
    profile = results.load("sts-profile")["profile"]
    layers = ", ".join(f"{value:.2f}" for value in profile)
    notes = [
        "Accuracy of all-MiniLM-L6-v2 with a classification head on the dev split, fine-tuned "
        f"once, {EPOCHS} epoch(s) of 6920 sentences: all exits together (sum of cross entropies, "
        f"{DISTILLATION:g} of it soft labels of the last exit), tokens dropped at speed "
        f"{FIT_SPEED:g}. Speed and exit entropy (nats) were changed afterwards.",
        f"Profile at speed 1: {layers}.",
        f"Times: the 872 sentences ({content['tokens']} tokens) once, batches of "
        f"{EVALUATION_BATCH} of similar length, {environment['cpu']}, {environment['threads']} "
        f"threads; medians of {len(content['rounds'])} rounds of all rows in turn. Speed-ups are "
        "over transformers' padded SDPA with the same weights. Predictions count the encoder's "
        "products and know nothing of exits.",
        "The exits after layers 1 to 3 are near chance after so short a training of a model made "
        "for mean pooling, so samples leave late; and as the last layer computes first tokens "
        "alone, leaving just before it saves nothing.",
    ]
    published = {**content, "timed": timed, "profile": profile}
    results.publish("sst2", "SST-2: accuracy against speed", notes, {"Dev": rows}, published)


if __name__ == "__main__":
    app()
