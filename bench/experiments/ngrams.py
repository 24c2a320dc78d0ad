# SPDX-License-Identifier: Apache-2.0
"""SST-2: accuracy, time and size of an n-gram student beside the MiniLM that taught it.

    python -m bench.experiments.ngrams fit --data DATA       # the teacher; stops after --seconds
    python -m bench.experiments.ngrams measure --data DATA   # the student; on an idle machine

Settings are picked on a tenth of the training split, held out; the dev split is looked at once.
"""

from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bench.bert_encoder import stored_bytes
from bench.experiments import data, results, training
from lean_kernels.compress import ngrams
from lean_kernels.nn import NGramClassifier

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EPOCHS, BATCH, LEARNING_RATE = 2, 32, 1e-4
TEACHER = results.WORK / "ngrams-teacher.pt"
HELD_OUT = 10  # every tenth sentence of the training split
FEATURES = 256
GRID = {"max_n": (1, 2, 3), "distillation": (0.5, 1.0), "epochs": (3, 6, 10)}
STUDENT_LEARNING_RATE, DROPOUT = 1e-3, 0.3

Data = Annotated[Path, typer.Option("--data", help="Directory of sst2-train.tsv, sst2-dev.tsv.")]


@app.command()
def fit(data_: Data, seconds: float = 300) -> None:
    """Fine-tune the teacher with cross entropy."""
    tokenizer = data.tokenizer()

    def loss(model: nn.Module, rows: list[data.Labelled]) -> Tensor:
        inputs = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        return F.cross_entropy(model(**inputs).logits, _labels(rows))

    training.train(
        data.minilm_classifier(2),
        data.read_labelled(data_ / "sst2-train.tsv"),
        loss,
        TEACHER,
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        seconds=seconds,
    )


def _labels(rows: list[data.Labelled]) -> Tensor:
    return torch.tensor([row.label for row in rows])


def _texts(rows: list[data.Labelled]) -> list[str]:
    return [row.text for row in rows]


def _student(rows: list[data.Labelled], soft: Tensor, setting: dict) -> NGramClassifier:
    vocabulary = ngrams.build_vocabulary(_texts(rows), 1 << 20, max_n=setting["max_n"])
    torch.manual_seed(0)
    student = NGramClassifier(
        vocabulary, 2, embedding_dim=FEATURES, hidden_features=FEATURES, dropout=DROPOUT
    )
    ngrams.distill(
        student,
        soft,
        _texts(rows),
        labels=_labels(rows),
        distillation=setting["distillation"],
        epochs=setting["epochs"],
        lr=STUDENT_LEARNING_RATE,
    )
    return student


def _accuracy(logits: Tensor, rows: list[data.Labelled]) -> float:
    return 100 * (logits.argmax(1) == _labels(rows)).double().mean().item()


@torch.inference_mode()
def _logits(student: NGramClassifier, texts: list[str]) -> Tensor:
    return torch.cat([student(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


@app.command()
def measure(
    data_: Data, rounds: Annotated[int, typer.Option(help="Times are medians of these.")] = 5
) -> None:
    """Pick settings, train the student on everything, and put the outcome into bench/results."""
    train, dev = (data.read_labelled(data_ / f"sst2-{split}.tsv") for split in ("train", "dev"))
    teacher, tokenizer = data.minilm_classifier(2), data.tokenizer()
    teacher.load_state_dict(torch.load(TEACHER, weights_only=True)["model"])
    teacher.eval()
    soft = ngrams.teacher_logits(teacher, tokenizer, _texts(train), progress=True)

    held_out = torch.arange(len(train)) % HELD_OUT == 0
    rest, kept_back = (
        [row for row, out in zip(train, held_out.tolist(), strict=True) if out == wanted]
        for wanted in (False, True)
    )
    settings = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    scores = []
    for setting in settings:
        student = _student(rest, soft[~held_out], setting)
        scores.append(_accuracy(_logits(student, _texts(kept_back)), kept_back))
        print(f"{setting}: {scores[-1]:.1f} on what was held out", flush=True)
    best = settings[scores.index(max(scores))]
    student = _student(train, soft, best)
    folded = student.fold()
    students = {
        "student": student,
        "student, folded": folded,
        "student, folded, int8": folded.to_int8(),
    }
    texts = _texts(dev)
    calls = {"teacher": lambda: ngrams.teacher_logits(teacher, tokenizer, texts)}
    calls |= {name: lambda m=model: _logits(m, texts) for name, model in students.items()}
    results.one_round(calls)
    spent = []
    for _ in range(rounds):
        milliseconds, found = results.one_round(calls)
        spent.append(milliseconds)
    timed = results.medians(spent, "teacher")

    accuracy = {name: _accuracy(logits, dev) for name, logits in found.items()}
    sizes = {
        name: stored_bytes([model]) for name, model in {"teacher": teacher, **students}.items()
    }
    table = [["", "accuracy", "MB of parameters", "ms", "faster than the teacher"]]
    for name, row in timed.items():
        table.append(
            [
                name,
                f"{accuracy[name]:.1f}",
                f"{sizes[name] / 1e6:.1f}",
                f"{row['ms']:.1f}",
                f"{row['speedup']:.0f}x",
            ]
        )
    environment = results.describe_machine()
    words = sum(len(text.split()) for text in texts) / len(texts)
    picked = ", ".join(f"{key} {value:g}" for key, value in best.items())
    notes = [
        f"Accuracy on the dev split ({len(dev)} sentences) after training on {len(train)}. The "
        f"teacher is all-MiniLM-L6-v2 with a classification head, {EPOCHS} epochs of cross "
        f"entropy. The student has rows of {FEATURES} and learns from the teacher's logits and the "
        "labels of the same sentences.",
        f"Settings ({picked}) were picked among {len(settings)} by the accuracy on every "
        f"{HELD_OUT}th sentence of the training split, {min(scores):.1f} to {max(scores):.1f}; the "
        "dev split was looked at once.",
        f"Times: all sentences once from raw text, batches of {BATCH}, {environment['cpu']}, "
        f"{environment['threads']} threads; medians of {rounds} rounds of all rows in turn. "
        f"Sentences are short, {words:.0f} words, and so are the teacher's batches.",
    ]
    content = {
        "environment": environment,
        "accuracy": accuracy,
        "bytes": sizes,
        "timed": timed,
        "settings": [
            {**setting, "held out": s} for setting, s in zip(settings, scores, strict=True)
        ],
    }
    results.publish("ngrams", "SST-2: an n-gram student", notes, {"Dev": table}, content)
    print(*(" | ".join(row) for row in table), sep="\n")


if __name__ == "__main__":
    app()
