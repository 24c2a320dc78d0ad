# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of n-grams, the classifier over them, and their files."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import lean_kernels as lk
from lean_kernels.nn.ngram_vocabulary import NGramVocabulary, pack
from lean_kernels.ops import ngram_lookup

TEXTS = ["a good film", "", "not a good film !", "bad, bad; BAD", b"\xff\x00 a", "\ud800 a"]


@pytest.fixture
def vocabulary():
    hashes, _ = ngram_lookup(*pack(TEXTS[:4]), max_n=2)
    return NGramVocabulary(hashes.unique(), min_n=1, max_n=2)


@pytest.fixture
def model(vocabulary):
    torch.manual_seed(0)
    return lk.nn.NGramClassifier(vocabulary, 3, embedding_dim=12, hidden_features=5).eval()


@pytest.mark.parametrize("kind", ["hashes", "hashed"])
def test_vocabulary_files(tmp_path, kind):
    hashes = torch.tensor([5, -7, 2**62])
    made = NGramVocabulary(hashes) if kind == "hashes" else NGramVocabulary(buckets=9, min_n=2)
    made.save(tmp_path / "v.safetensors")
    read = NGramVocabulary.load(tmp_path / "v.safetensors")
    assert len(read) == len(made) and repr(read) == repr(made)
    assert all(map(torch.equal, read(TEXTS), made(TEXTS)))
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "v.safetensors")
    made.save(tmp_path / "v.safetensors", overwrite=True)


@pytest.mark.parametrize(
    ("tensors", "change", "message"),
    [
        ({}, {"format": "other"}, "expected format 'lean_kernels.ngram_vocabulary' version '1'"),
        ({}, {"version": "2"}, "version '2'"),
        ({}, {"buckets": "-4"}, "buckets must be a number, got '-4'"),
        ({}, {"buckets": "0"}, "expected hashes or a positive number of buckets"),
        ({"hashes": torch.tensor([1, 1])}, {"buckets": "0"}, "must not repeat"),
        ({"hashes": torch.zeros(2, 2).long()}, {"buckets": "0"}, r"int64 \[V\]"),
        ({}, {"max_n": "99"}, r"n must rise within \[1, 8\]"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path, tensors, change, message):
    path = tmp_path / "v.safetensors"
    metadata = {"format": "lean_kernels.ngram_vocabulary", "version": "1"}
    metadata |= {"buckets": "5", "min_n": "1", "max_n": "4"} | change
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        NGramVocabulary.load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no safetensors file"):
        NGramVocabulary.load(path)


def test_one_text_is_no_sequence_of_texts(vocabulary):
    with pytest.raises(TypeError, match="sequence of str or bytes"):
        vocabulary("a good film")
    ids, offsets = vocabulary(TEXTS)
    assert offsets.tolist() == [0, 5, 5, 14, 23, 24, 25]  # "a" is known, what goes before it is not
    ids, offsets = vocabulary([])
    assert len(ids) == 0 and offsets.tolist() == [0]


def test_texts_and_ids_give_the_same(model, vocabulary):
    logits = model(TEXTS)
    assert logits.shape == (6, 3)
    assert torch.equal(model(*vocabulary(TEXTS)), logits)
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(model([text])[0], logits[i])
    assert model([]).shape == (0, 3)
    with pytest.raises(ValueError, match="ids come with offsets"):
        model(torch.tensor([1]))
    with pytest.raises(ValueError, match="go with ids"):
        model(TEXTS, torch.tensor([0, 1]))


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_folded_and_int8(vocabulary, mode):
    torch.manual_seed(0)
    model = lk.nn.NGramClassifier(vocabulary, 3, embedding_dim=12, hidden_features=5, mode=mode)
    expected = model.eval()(TEXTS)
    folded = model.fold()
    assert folded.folded and folded.bag.weight.shape == (len(vocabulary), 5)
    torch.testing.assert_close(folded(TEXTS), expected)
    for small in (model.to_int8(), folded.to_int8()):
        assert small.bag.weight.dtype == torch.int8
        assert 0 < (small(TEXTS) - expected).abs().max() < 0.02 * expected.abs().max()
        assert not any(p.requires_grad for p in small.parameters())
    with pytest.raises(ValueError, match="fold comes once"):
        folded.fold()
    with torch.no_grad():
        folded.output.weight.zero_()
    assert torch.equal(model(TEXTS), expected)  # the copy has parameters of its own


@pytest.mark.parametrize("kind", ["plain", "folded", "int8", "folded int8", "bfloat16", "hashed"])
def test_files(tmp_path, model, kind):
    if kind == "hashed":
        model = lk.nn.NGramClassifier(
            NGramVocabulary(buckets=7), 2, embedding_dim=4, hidden_features=3, mode="sum"
        ).eval()
    model = model.fold() if "folded" in kind else model
    model = model.to_int8() if "int8" in kind else model
    model = model.bfloat16() if kind == "bfloat16" else model
    model.save(tmp_path / "m.safetensors")
    read = lk.nn.NGramClassifier.load(tmp_path / "m.safetensors")
    assert torch.equal(read(TEXTS), model(TEXTS))
    assert read.state_dict().keys() == model.state_dict().keys()
    assert read.bag.mode == model.bag.mode
    assert torch.equal(copy.deepcopy(read)(TEXTS), model(TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bag.weight": None}, "must be matrices"),
        ({"bag.weight": torch.zeros(3, 12)}, "size mismatch"),
        ({"bag.weight": torch.zeros(3, 12).long()}, "not supported"),
        ({"bag.scales": torch.zeros(3)}, "bag.scales"),
        ({"output.bias": None}, "output.bias"),
        ({"vocabulary.hashes": None}, "expected hashes"),
    ],
)
def test_damaged_files_are_refused(tmp_path, model, change, message):
    from safetensors import safe_open

    path = tmp_path / "m.safetensors"
    model.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: t for k, t in (load_file(path) | change).items() if t is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message):
        lk.nn.NGramClassifier.load(path)


def test_gradients_are_sparse_on_demand(vocabulary):
    for sparse in (True, False):
        model = lk.nn.NGramClassifier(
            vocabulary, 3, embedding_dim=12, hidden_features=5, sparse=sparse
        )
        model(TEXTS).sum().backward()
        assert model.bag.weight.grad.is_sparse == sparse
