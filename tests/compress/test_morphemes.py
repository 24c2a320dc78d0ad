# SPDX-License-Identifier: Apache-2.0
import json
import random
import sys

import pytest
import torch

from lean_kernels.compress.morphemes import (
    build_morphemes,
    count_tokens,
    index_morphemes,
    read_morphemes,
)

STEMS = ("play", "walk", "jump", "talk", "work", "look", "call", "turn", "help", "open")
ENDINGS = ("", "ed", "ing", "er", "ers", "s")
WORDS = [stem + ending for stem in STEMS for ending in ENDINGS]


class Tokenizer:
    all_special_tokens = ("[PAD]", "[CLS]")

    def __init__(self, tokens):
        self.vocab = {t: i for i, t in enumerate((*self.all_special_tokens, *tokens))}

    def get_vocab(self):
        return self.vocab


def words_of(indices, names):
    return [[names[i] for i in row] for row in indices.tolist()]


def build(tokens, **options):
    pytest.importorskip("morfessor")
    indices, names = build_morphemes(
        Tokenizer(tokens), progress=lambda *step: None, epochs=10, **options
    )
    return (
        dict(zip(Tokenizer(tokens).vocab, words_of(indices, names), strict=False)),
        names,
        indices,
    )


def test_words_are_split_and_padded():
    words, names, indices = build(WORDS)
    assert indices.dtype == torch.int32 and indices.shape == (len(WORDS) + 2, 3)
    assert words["playing"] == ["play", "ing", "[mor-PAD-2]"]
    assert words["play"] == ["play", "[mor-PAD-1]", "[mor-PAD-2]"]
    assert words["[CLS]"] == ["[CLS]", "[mor-PAD-1]", "[mor-PAD-2]"]
    assert names[:2] == ["[mor-PAD-1]", "[mor-PAD-2]"]
    assert len(names) < 30 and len(set(names)) == len(names)
    assert len({tuple(row) for row in indices.tolist()}) == len(indices)


@pytest.mark.parametrize(
    ("mark", "marked", "parts"),
    [
        ("##", "##ing", ["##", "ing", "[mor-PAD-2]"]),
        ("Ġ", "Ġplay", ["Ġ", "play", "[mor-PAD-2]"]),
        ("▁", "▁play", ["▁", "play", "[mor-PAD-2]"]),
        ("@@", "play@@", ["play", "@@", "[mor-PAD-2]"]),
        ("</w>", "play</w>", ["play", "</w>", "[mor-PAD-2]"]),
    ],
)
def test_marks_of_subwords_are_morphemes(mark, marked, parts):
    twins = [w + mark if mark in ("@@", "</w>") else mark + w for w in (*WORDS, "ing")]
    words, _, indices = build([*WORDS, "ing", *twins, mark])
    assert words[marked] == parts
    assert words[mark][0] == mark
    assert len({tuple(row) for row in indices.tolist()}) == len(indices)


def test_what_is_beyond_the_order_is_joined():
    twins = [f"##{word}" for word in WORDS]
    words, _, _ = build([*WORDS, *twins], order=2)
    assert words["##playing"] == ["##", "playing"]
    words, _, _ = build([*WORDS, *twins], order=4)
    assert words["##playing"] == ["##", "play", "ing", "[mor-PAD-3]"]


def test_a_mark_that_is_rare_is_text():
    words, _, _ = build([*WORDS, *(f"x{i}" for i in range(200)), "##"])
    assert words["##"][0] == "##"


def test_rows_without_a_token_share_a_morpheme():
    _, names, indices = build(WORDS, num_embeddings=len(WORDS) + 5)
    assert len(indices) == len(WORDS) + 5
    assert torch.equal(indices[-1], indices[-3]) and names[indices[-1, 0]] == "[no token]"
    with pytest.raises(ValueError, match=r"ids up to 61, the table 10 rows"):
        build(WORDS, num_embeddings=10)


def test_a_seed_fixes_the_result_and_leaves_pythons_alone():
    state = random.getstate()
    first, same = (build(WORDS, seed=3)[2] for _ in range(2))
    assert torch.equal(first, same) and random.getstate() == state


def test_without_morfessor_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "morfessor", None)
    with pytest.raises(ImportError, match=r'pip install "lean_kernels\[morphemes\]"'):
        build_morphemes(Tokenizer(WORDS))


def test_counting_tokens():
    def tokenizer(texts, **_):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    texts = ["a bb a", "", *["ccc"] * 2000]
    assert count_tokens(tokenizer, texts, 5).tolist() == [0, 2, 1, 2000, 0]
    with pytest.raises(ValueError, match="gave id 3, the table has 3 rows"):
        count_tokens(tokenizer, texts, 3)


def test_indexing():
    indices, names = index_morphemes([["a"], ["b", "a", "c", "d"], ["a", "b"]], order=3)
    assert names == ["[mor-PAD-1]", "[mor-PAD-2]", "a", "b", "cd"]
    assert indices.tolist() == [[2, 0, 1], [3, 2, 4], [2, 3, 1]]
    with pytest.raises(ValueError, match="row 1 must be a list of strings, got"):
        index_morphemes([["a"], []])
    with pytest.raises(ValueError, match="order must be 2, 3 or 4, got 5"):
        index_morphemes([["a"]], order=5)


def test_reading_a_file(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([["a"], ["b", "a"], ["b"], ["a"]]))
    assert read_morphemes(path, order=2)[0].tolist() == [[1, 0], [2, 1], [2, 0], [1, 0]]
    path.write_text(json.dumps({"ab": ["a", "b"]}))
    indices, names = read_morphemes(path, order=2, tokenizer=Tokenizer(["ab", "b"]))
    assert words_of(indices, names)[2:] == [["a", "b"], ["b", "[mor-PAD-1]"]]
    with pytest.raises(ValueError, match=r"m.json: maps tokens to morphemes.*tokenizer="):
        read_morphemes(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "m.json: not valid JSON"),
        ("3", "expected a list of 4 rows or an object, got int"),
        ('[["a"]]', "expected a list of 4 rows or an object, got 1 rows"),
        ('[["a"], "b", ["c"], ["d"]]', "row 1 must be a list of strings, got 'b'"),
        ('[["a"], [1], ["c"], ["d"]]', "row 1 must be a list of strings"),
        ('[["a"], [""], ["c"], ["d"]]', "row 1 must be a list of strings"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_morphemes(path, num_embeddings=4)
