# SPDX-License-Identifier: Apache-2.0
"""STS Benchmark: Spearman of MiniLM as its vocabulary is compressed.

python -m bench.experiments.embeddings curve --data DATA            # stops after --seconds: again
python -m bench.experiments.embeddings distil autoencoder 10 --data DATA
python -m bench.experiments.embeddings distil morphte 10 --data DATA
python -m bench.experiments.embeddings table
"""

import csv
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import lean_kernels as lk
from bench import environment
from bench.experiments import data, results
from lean_kernels import evaluation
from lean_kernels.compress import embedding as fits
from lean_kernels.compress.morphemes import build_morphemes
from lean_kernels.demo_vocabulary import rank_for

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COMPRESSIONS = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
METHODS = ("SVD", "autoencoder", "autoencoder, weighted")
EPOCHS, MORPHTE_EPOCHS = 5, 5
STEPS, BATCH, LEARNING_RATE = 300, 32, {"autoencoder": 5e-4, "morphte": 2e-3}
SHORTEST, LONGEST = 20, 100  # characters of a text to distil on
EVALUATION_BATCH = 64

Data = Annotated[Path, typer.Option("--data", help="Directory of the data sets.")]
Every = Annotated[int, typer.Option(min=1, help="Score every n-th pair of the dev split.")]


def _texts(directory: Path) -> list[str]:
    """Unlabelled: news, encyclopedia, film reviews; none of it from the STS Benchmark."""
    with open(directory / "agnews-6000.csv", encoding="utf-8", newline="") as file:
        texts = [text for _, *row in csv.reader(file) for text in row]
    texts += (directory / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    texts += [row.text for row in data.read_labelled(directory / "sst2-train.tsv")]
    return [text.strip() for text in texts if len(text.strip()) >= SHORTEST]


def _batches(directory: Path, every: int) -> tuple[list, list[data.Pair]]:
    pairs = data.read_pairs(directory / "stsb-dev.csv")[::every]
    sentences = [text for pair in pairs for text in (pair.first, pair.second)]
    return evaluation.make_batches(data.tokenizer(), sentences, EVALUATION_BATCH, 512, "cpu"), pairs


def _frequencies(directory: Path, rows: int) -> Tensor:
    return fits.count_tokens(data.tokenizer(), _texts(directory), rows) + 1


def _quiet(done: int, total: int, name: str) -> None:
    """Progress of fits; the points are printed."""


def _rebuilt(method: str, weight: Tensor, compression: float, frequencies: Tensor) -> Tensor:
    """The table as that method keeps it."""
    if method == "SVD":
        codes, decoder = fits.fit_svd(weight, rank_for("low_rank", *weight.shape, compression))
        return codes @ decoder.t()
    weights = frequencies if method.endswith("weighted") else None
    codes, decoder, bias = fits.fit_autoencoder(
        weight,
        rank_for("autoencoder", *weight.shape, compression),
        frequencies=weights,
        epochs=EPOCHS,
        progress=_quiet,
    )
    return codes @ decoder.t() + bias


@app.command()
def curve(
    data_: Data,
    seconds: Annotated[float, typer.Option(help="Stop after these.")] = 240,
    every: Every = 1,
) -> None:
    """Spearman on the dev split for each method and compression, nothing else trained."""
    began = time.monotonic()
    batches, pairs = _batches(data_, every)
    model = data.minilm()
    table = model.get_input_embeddings().weight
    weight = table.detach().clone()
    frequencies = _frequencies(data_, len(weight))
    points = results.load("embeddings-curve")
    todo = [("dense", 1.0), *((m, c) for c in COMPRESSIONS for m in METHODS)]
    for method, compression in todo:
        name = f"{method} {compression:g}x"
        if name in points:
            continue
        if time.monotonic() - began > seconds:
            print("not finished: run this again")
            return
        found = weight if method == "dense" else _rebuilt(method, weight, compression, frequencies)
        table.data.copy_(found)
        cosine = F.cosine_similarity(found, weight)
        points[name] = {
            "spearman": data.pair_spearman(evaluation.embed(model, batches), pairs),
            "pairs": len(pairs),
            "cosine": cosine.mean().item(),
            "cosine_in_text": float((cosine * frequencies).sum() / frequencies.sum()),
        }
        results.store("embeddings-curve", points)
        print(name, points[name], flush=True)
    print("finished")


def _compressed(kind: str, compression: float, directory: Path) -> nn.Module:
    """MiniLM with a fitted table, everything else frozen."""
    model, tokenizer = data.minilm(), data.tokenizer()
    embedding = model.get_input_embeddings()
    weight, frequencies = embedding.weight.detach(), _frequencies(directory, len(embedding.weight))
    options = {"frequencies": frequencies, "progress": _quiet}
    if kind == "morphte":
        morphemes, names = build_morphemes(tokenizer, num_embeddings=len(weight), progress=_quiet)
        rank = rank_for(kind, *weight.shape, compression, num_morphemes=len(names))
        factors, scale, shift = fits.fit_morphte(
            weight, morphemes, rank, epochs=MORPHTE_EPOCHS, **options
        )
        layer = lk.nn.MorphTEEmbedding(morphemes, weight.shape[1], rank=rank)
        state = {"factors": factors, "morphemes": morphemes}
        layer.load_state_dict(state | {"layer_norm.weight": scale, "layer_norm.bias": shift})
    else:
        rank = rank_for(kind, *weight.shape, compression)
        factors = fits.fit_autoencoder(weight, rank, epochs=EPOCHS, **options)
        layer = lk.nn.AutoencoderEmbedding.from_factors(*factors)
    model.requires_grad_(False)
    model.set_input_embeddings(layer)
    return model


def _pooled(model: nn.Module, inputs) -> Tensor:
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@app.command()
def distil(
    kind: Annotated[str, typer.Argument(help="autoencoder or morphte.")],
    compression: float,
    data_: Data,
    seconds: Annotated[float, typer.Option(help="Stop training after these.")] = 200,
    every: Every = 1,
) -> None:
    """Train the fitted table alone to give the sentence embeddings of the original model."""
    torch.manual_seed(0)
    model, teacher, tokenizer = (
        _compressed(kind, compression, data_),
        data.minilm(),
        data.tokenizer(),
    )
    batches, pairs = _batches(data_, every)

    def spearman() -> float:
        return data.pair_spearman(evaluation.embed(model, batches), pairs)

    before = spearman()
    print(f"{kind} {compression:g}x: {before:.2f} as fitted", flush=True)
    texts = [text[:LONGEST] for text in _texts(data_)]
    layer = model.get_input_embeddings()
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE[kind])
    began, generator, done = time.monotonic(), torch.Generator().manual_seed(0), 0
    for done in range(1, STEPS + 1):
        share = min((time.monotonic() - began) / seconds, 1)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[kind] * (1 - max(share, (done - 1) / STEPS))
        chosen = torch.randint(len(texts), (BATCH,), generator=generator).tolist()
        inputs = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = _pooled(teacher, inputs)
        loss = (1 - (_pooled(model, inputs) * expected).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if done % 10 == 0:
            print(f"step {done}: 1 - cosine {loss.item():.4f}", flush=True)
        if share == 1:
            break
    points = results.load("embeddings-distilled")
    points[f"{kind} {compression:g}x"] = {
        "fitted": before,
        "distilled": spearman(),
        "pairs": len(pairs),
        "steps": done,
        "sentences": done * BATCH,
        "seconds": time.monotonic() - began,
    }
    results.store("embeddings-distilled", points)
    print(points[f"{kind} {compression:g}x"])


@app.command()
def table() -> None:
    """Put everything measured into bench/results."""
    points, distilled = (results.load(f"embeddings-{n}") for n in ("curve", "distilled"))
    dense = points["dense 1x"]["spearman"]
    header = ["table bytes", *METHODS, "cosine: SVD", "autoencoder", "weighted, in text"]
    rows = [header]
    for compression in COMPRESSIONS:
        found = [points[f"{method} {compression:g}x"] for method in METHODS]
        cosines = found[0]["cosine"], found[1]["cosine"], found[2]["cosine_in_text"]
        rows.append(
            [
                f"1/{compression:g}",
                *(f"{point['spearman']:.2f}" for point in found),
                *(f"{cosine:.3f}" for cosine in cosines),
            ]
        )
    trained = [["table", "fitted", "distilled", "steps"]]
    for name, point in distilled.items():
        trained.append(
            [name, f"{point['fitted']:.2f}", f"{point['distilled']:.2f}", str(point["steps"])]
        )
    notes = [
        "Spearman x 100 of all-MiniLM-L6-v2 (mean pooling, cosine) on "
        f"{points['dense 1x']['pairs']} of the 1500 pairs of the dev split; "
        f"{dense:.2f} with the dense table of 30,522 x 384 float32. Nothing but the table is "
        "changed. Bytes are those of all float32 tensors of the compressed table.",
        f"`autoencoder`: linear, direction loss with the paper's constants, {EPOCHS} epochs. "
        "`weighted`: the same with each row counted as often as its token occurs in the unlabelled "
        "text (AG News, WikiText-2, SST-2), plus once. `cosine`: mean of rebuilt against dense "
        "rows; `in text`: weighted by those counts.",
        f"`distilled`: the table, fitted with weights, trained for up to {STEPS} steps of {BATCH} "
        "texts of the same unlabelled text to give the dense model's sentence embeddings, all else "
        f"frozen. MorphTE: Morfessor's morphemes, order 3, {MORPHTE_EPOCHS} epochs of fitting.",
    ]
    content = {"environment": results.describe_machine(), "curve": points, "distilled": distilled}
    tables = {"No retraining": rows, "After a short distillation": trained}
    title = "STS Benchmark: Spearman against the bytes of the vocabulary"
    results.publish("embeddings", title, notes, tables, content)
    folder = results.RESULTS / environment.device_slug(content["environment"])
    _plot(points, distilled, dense, folder / "embeddings.png")


def _plot(points: dict, distilled: dict, dense: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, style in zip(METHODS, ("o--", "s-", "D-"), strict=True):
        spearman = [
            points[f"{method} {compression:g}x"]["spearman"] for compression in COMPRESSIONS
        ]
        axes.plot(COMPRESSIONS, spearman, style, label=method)
    for kind, marker in (("autoencoder", "*"), ("morphte", "P")):
        found = {
            float(name.split()[1][:-1]): point["distilled"]
            for name, point in distilled.items()
            if name.startswith(kind)
        }
        if found:
            label = f"{'MorphTE' if kind == 'morphte' else kind}, distilled"
            axes.plot(found.keys(), found.values(), marker, markersize=10, label=label)
    axes.axhline(dense, color="gray", linestyle=":", label="dense table")
    axes.set(xscale="log", xlabel="times fewer bytes", ylabel="Spearman x 100")
    axes.set(title="all-MiniLM-L6-v2 on STS-B dev, only the vocabulary changed")
    axes.set_xticks(COMPRESSIONS, [f"{c:g}x" for c in COMPRESSIONS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    app()
