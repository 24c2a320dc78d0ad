# SPDX-License-Identifier: Apache-2.0
"""Readers of the two data sets, and MiniLM."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from lean_kernels import evaluation

# Dropout of attention probabilities would make training pay for eager attention.
_DROPOUT = {"attention_probs_dropout_prob": 0.0}


class Pair(NamedTuple):
    """Two sentences and how alike people found them, 0 to 5."""

    first: str
    second: str
    score: float


class Labelled(NamedTuple):
    """A sentence and its class."""

    text: str
    label: int


def read_pairs(path: Path) -> list[Pair]:
    """STS Benchmark: CSV without a header, sentence, sentence, score."""
    with open(path, encoding="utf-8", newline="") as file:
        return [Pair(first, second, float(score)) for first, second, score in csv.reader(file)]


def read_labelled(path: Path) -> list[Labelled]:
    """SST-2: a sentence, a tab and 0 or 1 per line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines if line.strip()]
    return [Labelled(text, int(label)) for text, label in rows]


def tokenizer():
    return evaluation.load_tokenizer(evaluation.minilm_path())


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 as published: BERT with 6 layers of 384."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(evaluation.minilm_path(), **_DROPOUT).eval()


def minilm_classifier(classes: int) -> nn.Module:
    """The same encoder with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        evaluation.minilm_path(), num_labels=classes, **_DROPOUT
    )


def pair_spearman(embeddings, pairs: list[Pair]) -> float:
    """Spearman of the cosine of row 2i and row 2i + 1 with the score of pair i, times 100."""
    cosine = (embeddings[0::2].double() * embeddings[1::2].double()).sum(dim=1).numpy()
    return 100 * evaluation.spearman(cosine, np.array([pair.score for pair in pairs]))
