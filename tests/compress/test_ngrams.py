# SPDX-License-Identifier: Apache-2.0
"""Vocabularies from a corpus, and students that learn from a teacher."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels.compress import ngrams
from lean_kernels.ops.ngram_lookup import reference

CORPUS = ["the cat sat", "the cat", "the the dog", "", "a dog sat on the mat !"]


def counted(texts, min_n, max_n):
    """Document counts by hash, in plain Python."""
    found = Counter()
    for text in texts:
        words = [reference.word_hash(word) for word in reference.words(text.encode())]
        found.update({reference.signed(h) for h in reference.ngram_hashes(words, min_n, max_n)})
    return found


@pytest.mark.parametrize("n", [(1, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("pending", [1, 1 << 22])
def test_the_most_common_come_first(monkeypatch, n, pending):
    monkeypatch.setattr(ngrams, "_PENDING", pending)
    monkeypatch.setattr(ngrams, "_CHUNK_BYTES", 10)
    counts = counted(CORPUS, *n)
    expected = sorted(counts, key=lambda h: (-counts[h], h))
    for size in (3, 1000):
        made = ngrams.build_vocabulary(iter(CORPUS), size, min_n=n[0], max_n=n[1])
        assert made.hashes.tolist() == expected[:size]
    often = ngrams.build_vocabulary(CORPUS, 1000, min_n=n[0], max_n=n[1], min_count=2)
    assert often.hashes.tolist() == [h for h in expected if counts[h] >= 2]


def test_what_gives_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="have no n-gram of 1 to 4 words that 1 of them"):
        ngrams.build_vocabulary(["", " "], 10)
    with pytest.raises(ValueError, match="size and min_count must be positive"):
        ngrams.build_vocabulary(CORPUS, 0)
    with pytest.raises(TypeError, match="texts must be a sequence of str or bytes, got one"):
        ngrams.build_vocabulary("the cat sat", 10)


class Teacher(nn.Module):
    """As a Hugging Face classifier: says how many of the tokens are 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.batches = []

    def forward(self, input_ids, attention_mask):
        assert not self.training
        self.batches.append(len(input_ids))
        share = ((input_ids == 1) * attention_mask).sum(1) / attention_mask.sum(1)
        return SimpleNamespace(logits=self.scale * torch.stack([share, 1 - share], 1))


def tokenizer(texts, padding, truncation, max_length, return_tensors):
    rows = [[int(word == "good") for word in text.split()] for text in texts]
    width = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    ids = [row + [1] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(80, 9, generator=generator) < torch.rand(80, 1, generator=generator)
    words = [["good" if good else "bad" for good in row] for row in draws.tolist()]
    return [" ".join(row[: 3 + i % 7]) for i, row in enumerate(words)]


def test_teacher_logits_come_in_the_order_of_the_texts(texts):
    teacher = Teacher().train()
    logits = ngrams.teacher_logits(teacher, tokenizer, texts, batch_size=32, progress=True)
    shares = [text.split().count("good") / len(text.split()) for text in texts]
    torch.testing.assert_close(logits[:, 0], 4 * torch.tensor(shares))
    assert teacher.batches == [32, 32, 16] and teacher.training


@pytest.mark.parametrize("sparse", [True, False])
def test_a_student_learns_from_its_teacher(texts, sparse):
    torch.manual_seed(0)
    vocabulary = ngrams.build_vocabulary(texts, 500)
    student = lk.nn.NGramClassifier(
        vocabulary, 2, embedding_dim=16, hidden_features=16, sparse=sparse, dropout=0.1
    )
    teacher = Teacher()
    options = {"tokenizer": tokenizer, "epochs": 30, "lr": 1e-2, "batch_size": 16}
    history = ngrams.distill(student, teacher, texts, **options)
    assert len(history) == 30 and history[-1] < 0.1 * history[0] and not student.training
    logits = ngrams.teacher_logits(teacher, tokenizer, texts)
    agree = (student(texts).argmax(1) == logits.argmax(1)).float().mean()
    assert agree > 0.9
    again = lk.nn.NGramClassifier(vocabulary, 2, embedding_dim=16, hidden_features=16)
    labels = 1 - logits.argmax(1)  # wrong ones, and they count for all
    ngrams.distill(
        again, logits, texts, labels=labels, distillation=0.0, epochs=30, lr=1e-2, temperature=2.0
    )
    assert (again(texts).argmax(1) == labels).float().mean() > 0.9


def test_the_same_seed_trains_the_same_student(texts):
    students = []
    for _ in range(2):
        torch.manual_seed(0)
        vocabulary = ngrams.build_vocabulary(texts, 500)
        student = lk.nn.NGramClassifier(vocabulary, 2, embedding_dim=16, hidden_features=16)
        ngrams.distill(student, torch.randn(80, 2), texts, epochs=2, progress=True)
        students.append(student.state_dict())
    assert all(torch.equal(a, students[1][key]) for key, a in students[0].items())


def test_what_does_not_fit_is_refused(texts):
    vocabulary = ngrams.build_vocabulary(texts, 50)
    student = lk.nn.NGramClassifier(vocabulary, 2, embedding_dim=4, hidden_features=4)
    logits = torch.zeros(80, 2)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        ngrams.distill(student, Teacher(), texts)
    with pytest.raises(ValueError, match=r"logits must be \[80, 2\]"):
        ngrams.distill(student, torch.zeros(80, 3), texts)
    with pytest.raises(ValueError, match=r"distillation=0\.5 needs labels"):
        ngrams.distill(student, logits, texts, distillation=0.5)
    with pytest.raises(ValueError, match=r"labels must be \[80\]"):
        ngrams.distill(student, logits, texts, labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match="does not train"):
        ngrams.distill(student.fold(), logits, texts)
