# SPDX-License-Identifier: Apache-2.0
"""The morphemes of a vocabulary, as MorphTE (NeurIPS 2022, arXiv 2210.15379) takes them, and how
often its tokens occur."""

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lean_kernels._progress import Progress, reporting

__all__ = ["build_morphemes", "count_tokens", "index_morphemes", "read_morphemes"]

_PREFIXES = (
    "##",
    "Ġ",
    "▁",
)  # WordPiece: the word goes on; byte-level, SentencePiece: begins
_SUFFIXES = ("@@", "</w>")  # the word goes on, or ends: BPE
_LEAST_MARKED = 0.01  # of the tokens; fewer are odd tokens, not a mark
_NO_TOKEN = "[no token]"
_TEXTS = 1000  # tokenised at a time


def build_morphemes(
    tokenizer,
    *,
    order: int = 3,
    num_embeddings: int | None = None,
    epochs: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, list[str]]:
    """Split every token into morphemes with Morfessor, which learns them from the tokens.

    Marks of subwords (WordPiece's ##, BPE's @@ and </w>, the byte-level Ġ, SentencePiece's ▁) are
    morphemes of their own, so that a token and its marked twin share the rest. Special tokens stay
    whole. Different tokens get different rows.

    Args:
        tokenizer: of Hugging Face, or anything with `get_vocab()` and `all_special_tokens`.
        order: morphemes per token, see `index_morphemes`.
        num_embeddings: rows of the table, None for the largest id plus 1. Rows that no token has
            share a morpheme.
        epochs: of Morfessor's recursive training, 1 or more; more of them find fewer and shorter
            morphemes. One takes some 5 s for 30,000 tokens.
        seed: of the order in which Morfessor takes the tokens.
        progress: called as progress(done, total, name) before each step; None shows a bar.

    Returns:
        As `index_morphemes`.

    Raises:
        ImportError: the package morfessor is not installed.
        ValueError: an argument out of range, or an id beyond the table.
    """
    try:
        import morfessor
    except ImportError:
        raise ImportError(
            'build_morphemes needs Morfessor: pip install "lean_kernels[morphemes]"'
        ) from None
    if epochs < 1:
        raise ValueError(f"build_morphemes: epochs must be 1 or more, got {epochs}")
    tokens = _tokens(tokenizer, num_embeddings)
    whole = {*tokenizer.all_special_tokens, _NO_TOKEN}
    split = _splitter(tokens)
    parts = [("", token, "") if token in whole else split(token) for token in tokens]
    model = morfessor.BaselineModel()
    pairs = zip(tokens, parts, strict=True)
    model.load_data([(1, body) for body in sorted({p[1] for t, p in pairs if t not in whole})])
    with _seeded(seed), _without_dots(morfessor), reporting(progress) as report:
        for epoch in range(epochs):
            report(epoch, epochs, f"find morphemes, epoch {epoch + 1} of {epochs}")
            model.train_batch("recursive", max_epochs=1)
        report(epochs, epochs, "")
    found = []
    for token, (prefix, body, suffix) in zip(tokens, parts, strict=True):
        middle = [body] if token in whole else model.segment(body)
        found.append([part for part in (prefix, *middle, suffix) if part])
    return index_morphemes(found, order=order)


def index_morphemes(words: Sequence[Sequence[str]], *, order: int = 3) -> tuple[Tensor, list[str]]:
    """Number the morphemes of each word, `order` of them.

    Where a word has more, those beyond are joined to the last; slots 2, 3, ... that it lacks get
    the padding morphemes [mor-PAD-1], [mor-PAD-2], ...; both as in the paper's code.

    Args:
        words: the morphemes of each row of the table, one or more.
        order: 2 to 4.

    Returns:
        int32 [V, order], and the morphemes by number, the paddings first.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"morphemes: order must be 2, 3 or 4, got {order!r}")
    paddings = [f"[mor-PAD-{slot}]" for slot in range(1, order)]
    numbers = {name: number for number, name in enumerate(paddings)}
    rows = []
    for place, word in enumerate(words):
        if not word or not all(isinstance(part, str) and part for part in word):
            raise ValueError(f"morphemes: row {place} must be a list of strings, got {word!r}")
        parts = [*word[: order - 1], "".join(word[order - 1 :])] if len(word) > order else word
        parts = [*parts, *paddings[len(parts) - 1 :]]
        rows.append([numbers.setdefault(part, len(numbers)) for part in parts])
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, order), list(numbers)


def read_morphemes(
    path: str | os.PathLike,
    *,
    order: int = 3,
    num_embeddings: int | None = None,
    tokenizer=None,
) -> tuple[Tensor, list[str]]:
    """Read the morphemes of a vocabulary from a JSON file.

    Args:
        path: a list with a list of strings per row of the table; or an object that maps tokens to
            lists of strings, which needs a tokenizer: a token it lacks is a morpheme of its own.
        order: see `index_morphemes`.
        num_embeddings: rows of the table, as for `build_morphemes`.
        tokenizer: as for `build_morphemes`.

    Raises:
        ValueError: another content, or a wrong number of rows.
    """
    where = os.fspath(path)
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
    if isinstance(content, Mapping):
        if tokenizer is None:
            raise ValueError(
                f"{where}: maps tokens to morphemes, which takes a tokenizer; pass tokenizer="
            )
        content = [content.get(token, [token]) for token in _tokens(tokenizer, num_embeddings)]
    if not isinstance(content, list) or num_embeddings not in (None, len(content)):
        expected = "rows" if num_embeddings is None else f"{num_embeddings} rows"
        got = f"{len(content)} rows" if isinstance(content, list) else type(content).__name__
        raise ValueError(f"{where}: expected a list of {expected} or an object, got {got}")
    for place, word in enumerate(content):
        if not isinstance(word, list):
            raise ValueError(f"{where}: row {place} must be a list of strings, got {word!r}")
    try:
        return index_morphemes(content, order=order)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def count_tokens(tokenizer, texts: Iterable[str], num_embeddings: int) -> Tensor:
    """How often each row of a table is looked up, float32 [num_embeddings]: `frequencies`.

    Args:
        tokenizer: of Hugging Face; texts go through it in batches, uncut.
        texts: strings, such as the lines of a file.
        num_embeddings: rows of the table.

    Raises:
        ValueError: an id beyond the table.
    """
    counts, texts = torch.zeros(num_embeddings), iter(texts)
    while batch := list(itertools.islice(texts, _TEXTS)):
        ids = tokenizer(batch, truncation=False, verbose=False)["input_ids"]
        found = torch.bincount(torch.tensor([i for row in ids for i in row], dtype=torch.long))
        if len(found) > num_embeddings:
            raise ValueError(
                f"count_tokens: the tokenizer gave id {len(found) - 1}, the table has "
                f"{num_embeddings} rows; is it the tokenizer of this model?"
            )
        counts[: len(found)] += found
    return counts


def _tokens(tokenizer, num_embeddings: int | None) -> list[str]:
    """Tokens by id."""
    vocabulary = tokenizer.get_vocab()
    size = 1 + max(vocabulary.values(), default=-1)
    if num_embeddings is None:
        num_embeddings = size
    if not 0 < size <= num_embeddings:
        raise ValueError(
            f"morphemes: the tokenizer has ids up to {size - 1}, the table {num_embeddings} rows; "
            "is it the tokenizer of this model?"
        )
    tokens = [_NO_TOKEN] * num_embeddings
    for token, place in vocabulary.items():
        tokens[place] = token
    return tokens


def _splitter(tokens: Sequence[str]):
    """A function from a token to (mark before, body, mark after), by the marks the tokens use."""
    least = max(1, _LEAST_MARKED * len(tokens))
    prefixes = [m for m in _PREFIXES if sum(t.startswith(m) for t in tokens) >= least]
    suffixes = [m for m in _SUFFIXES if sum(t.endswith(m) for t in tokens) >= least]

    def split(token: str) -> tuple[str, str, str]:
        before = next((m for m in prefixes if token.startswith(m) and token != m), "")
        body = token[len(before) :]
        after = next((m for m in suffixes if body.endswith(m) and body != m), "")
        return before, body[: len(body) - len(after)], after

    return split


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Morfessor shuffles with Python's global generator."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _without_dots(morfessor) -> Iterator[None]:
    before = morfessor.utils.show_progress_bar
    morfessor.utils.show_progress_bar = False
    try:
        yield
    finally:
        morfessor.utils.show_progress_bar = before
