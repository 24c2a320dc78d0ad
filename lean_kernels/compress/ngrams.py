# SPDX-License-Identifier: Apache-2.0
"""N-gram students: a vocabulary from a corpus, and distillation from any sequence classifier.

Sparse Distillation (Ye et al., NAACL 2022, arXiv 2110.08536): a table of a million n-grams and two
linear layers learn a Transformer's soft labels. Plain PyTorch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lean_kernels.compress.exits import losses
from lean_kernels.nn.ngram_classifier import NGramClassifier
from lean_kernels.nn.ngram_vocabulary import NGramVocabulary, check_texts, pack
from lean_kernels.ops.ngram_lookup import ngram_lookup

__all__ = ["build_vocabulary", "distill", "teacher_logits"]

_CHUNK_BYTES = 1 << 22  # of text, looked up together
_PENDING = 1 << 22  # hashes not counted yet


def build_vocabulary(
    texts: Iterable[str | bytes],
    size: int,
    *,
    min_n: int = 1,
    max_n: int = 4,
    min_count: int = 1,
    progress: bool = False,
) -> NGramVocabulary:
    """The `size` n-grams that most of the texts contain, the most common first.

    Args:
        texts: a corpus, gone through once. 16 bytes are held per distinct n-gram.
        min_n, max_n: lengths of n-grams, from 1 to 8.
        min_count: leave out n-grams that fewer texts contain.
        progress: show a progress bar.

    Of n-grams in equally many texts the lower hash comes first. ValueError if none is left.
    """
    if size < 1 or min_count < 1:
        raise ValueError(
            f"build_vocabulary: size and min_count must be positive, got {size} and {min_count}"
        )
    check_texts(texts)
    keys = counts = torch.empty(0, dtype=torch.int64)
    pending, waiting = [], 0
    with _bar("n-grams", texts, progress) as counted:
        for chunk in _chunks(counted):
            hashes, _ = ngram_lookup(*pack(chunk), min_n=min_n, max_n=max_n, distinct=True)
            pending.append(hashes)
            waiting += len(hashes)
            if waiting >= max(_PENDING, len(keys)):  # so that merging costs a log of it all
                keys, counts = _merge(keys, counts, pending)
                pending, waiting = [], 0
    keys, counts = _merge(keys, counts, pending)
    common = counts >= min_count
    keys, counts = keys[common], counts[common]
    if not len(keys):
        raise ValueError(
            f"build_vocabulary: the texts have no n-gram of {min_n} to {max_n} words that "
            f"{min_count} of them contain"
        )
    order = counts.sort(descending=True, stable=True).indices[:size]
    return NGramVocabulary(keys[order], min_n=min_n, max_n=max_n)


def _chunks(texts: Iterable[str | bytes]) -> Iterator[list[str | bytes]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _merge(keys: Tensor, counts: Tensor, more: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Counts of distinct keys, in rising order of the keys, with one for each of `more`."""
    ones = torch.ones(sum(map(len, more)), dtype=torch.int64)
    merged, place = torch.cat([keys, *more]).unique(return_inverse=True)
    total = torch.zeros(len(merged), dtype=torch.int64)
    return merged, total.index_add_(0, place, torch.cat([counts, ones]))


@torch.no_grad()
def teacher_logits(
    teacher: nn.Module,
    tokenizer: Callable,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Logits [texts, C], float32, of a Hugging Face sequence classifier in evaluation mode.

    Texts of like length share a batch. `max_length` cuts texts, in tokens; None leaves that to the
    tokenizer's own limit.
    """
    device, training = next(teacher.parameters()).device, teacher.training
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: list[Tensor | None] = [None] * len(texts)
    teacher.eval()
    try:
        with _bar("teacher", batches, progress) as counted:
            for batch in counted:
                inputs = tokenizer(
                    [texts[i] for i in batch],
                    padding=True,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                )
                logits = teacher(**{k: v.to(device) for k, v in inputs.items()}).logits
                for place, row in zip(batch, logits.float().cpu(), strict=True):
                    found[place] = row
    finally:
        teacher.train(training)
    return torch.stack(found)


def distill(
    student: NGramClassifier,
    teacher: nn.Module | Tensor,
    texts: Sequence[str],
    *,
    tokenizer: Callable | None = None,
    labels: Tensor | None = None,
    distillation: float = 1.0,
    temperature: float = 1.0,
    epochs: int = 5,
    batch_size: int = 32,
    lr: float = 1e-3,
    table_lr: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train `student` on a teacher's soft labels; returns the mean loss of each epoch.

    The loss is that of `compress.exits.losses`: (1 - distillation) * cross entropy with `labels`
    + distillation * temperature^2 * KL(teacher || student). The optimizer is `optim.LazyAdam`.

    Args:
        student: trained in place, and left in evaluation mode.
        teacher: a Hugging Face sequence classifier, which then needs its `tokenizer`; or its
            logits [texts, C], from `teacher_logits` or elsewhere.
        labels: int64 [texts], needed where distillation < 1.
        lr, table_lr: learning rates; table_lr None: the same.
        seed: of the order of the texts.
        progress: show progress bars.

    Raises:
        ValueError: arguments that do not fit.
    """
    from lean_kernels.optim import LazyAdam  # imports torch._dynamo, which takes a second

    if isinstance(teacher, nn.Module):
        if tokenizer is None:
            raise ValueError("distill: a teacher that is a model needs its tokenizer")
        teacher = teacher_logits(
            teacher, tokenizer, texts, batch_size=batch_size, progress=progress
        )
    shape = len(texts), student.num_labels
    if teacher.shape != shape:
        raise ValueError(
            f"distill: the teacher's logits must be {list(shape)}, a row per text and a column "
            f"per label of the student, got {list(teacher.shape)}"
        )
    if labels is None and distillation < 1:
        raise ValueError(f"distill: distillation={distillation} needs labels; pass them, or 1")
    if labels is not None and labels.shape != shape[:1]:
        raise ValueError(f"distill: labels must be [{shape[0]}], got {list(labels.shape)}")
    if student.folded or student.bag.scales is not None:
        raise ValueError("distill: a folded or int8 student does not train; fold it afterwards")
    table, device = student.bag.weight, student.bag.weight.device
    labels = teacher.argmax(1) if labels is None else labels
    rest = [p for p in student.parameters() if p is not table]
    of_table = {"params": [table], "lr": lr if table_lr is None else table_lr}
    optimizer = LazyAdam([of_table, {"params": rest}], lr=lr)
    ids, offsets = student.vocabulary(texts)
    generator = torch.Generator().manual_seed(seed)
    history = []
    student.train()
    steps = [range(0, len(texts), batch_size)] * epochs
    with _bar("student", list(chain(*steps)), progress) as counted:
        for _ in range(epochs):
            order, total = torch.randperm(len(texts), generator=generator), 0.0
            for start in steps[0]:
                next(counted)
                chosen = order[start : start + batch_size]
                inputs = (t.to(device) for t in _bags(ids, offsets, chosen))
                loss = losses(
                    [student(*inputs)],
                    labels[chosen].to(device),
                    distillation=distillation,
                    temperature=temperature,
                    teacher=teacher[chosen].to(device),
                ).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
            history.append(total / len(texts))
    student.eval()
    return history


def _bags(ids: Tensor, offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and offsets of the chosen bags."""
    lengths = offsets.diff()[chosen]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    first = torch.repeat_interleave(offsets[chosen] - ends[:-1], lengths)
    return ids[first + torch.arange(len(first))], ends


@contextmanager
def _bar(title: str, items: Iterable, shown: bool) -> Iterator[Iterator]:
    """The items, behind a progress bar if that is to be shown."""
    if not shown:
        yield iter(items)
        return
    from rich.progress import Progress

    with Progress() as bar:
        total = len(items) if isinstance(items, Sequence) else None
        yield iter(bar.track(items, total=total, description=title))
