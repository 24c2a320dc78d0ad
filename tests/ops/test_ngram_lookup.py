# SPDX-License-Identifier: Apache-2.0
"""ngram_lookup against plain Python, on text of every kind."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_kernels import _extension
from lean_kernels.ops import ngram_lookup, ngram_slots
from lean_kernels.ops.ngram_lookup import reference

_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]
ODD = [
    b"", b" ", b"\x00\x7f\t\n", b"Don't STOP!", b"a", b"a b", b"x" * 3000, b"\xff\xfe\x80",
    "Äpfel, naïve — 日本語".encode(), b"...", b"it's 3.14% 'quoted'", b"a\x00b", b"\xc3",
]  # fmt: skip


def joined(texts):
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    return torch.tensor(list(b"".join(texts)), dtype=torch.uint8), offsets


def same(*arguments, **options):
    plain = ngram_lookup(*arguments, **options, impl="reference")
    ours = ngram_lookup(*arguments, **options, impl="cpu")
    assert all(map(torch.equal, plain, ours))
    return ours


def test_words():
    assert reference.words(b"Don't STOP, 3.14!\x00x") == [
        *(b"don't", b"stop", b",", b"3", b".", b"14", b"!", b"x")
    ]
    assert reference.words("Ä—B c".encode()) == ["Ä—b".encode(), b"c"]
    assert reference.word_hash(b"") == 0xCBF29CE484222325
    assert reference.word_hash(b"foobar") == 0x85944171F73967E8  # from FNV's own test vectors


@pytest.mark.parametrize("impl", IMPLS)
def test_order_and_lengths(impl):
    a, b, c = (reference.word_hash(w) for w in (b"a", b"b", b"c"))
    text, offsets = joined([b"A b! c", b"", b"c"])
    mark = reference.word_hash(b"!")
    ids, ends = ngram_lookup(text, offsets, min_n=2, max_n=3, impl=impl)
    grams = [[a, b], [b, mark], [a, b, mark], [mark, c], [b, mark, c]]
    wanted = [next(reference.ngram_hashes(g, len(g), len(g))) for g in grams]
    assert ids.tolist() == [reference.signed(h) for h in wanted] and ends.tolist() == [0, 5, 5, 5]


@needs_cpu_kernels
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("n", [(1, 1), (1, 4), (2, 3), (8, 8)])
def test_odd_texts(n, distinct):
    options = {"min_n": n[0], "max_n": n[1], "distinct": distinct}
    text, offsets = joined(ODD)
    hashes, _ = same(text, offsets, **options)
    same(text, offsets, buckets=7, **options)
    same(text, offsets, buckets=2**40 + 1, **options)
    known = hashes.unique()
    same(text, offsets, slots=ngram_slots(known[::2].contiguous()), **options)
    ids, _ = same(text, offsets, slots=ngram_slots(known), **options)
    if not distinct:
        assert torch.equal(known[ids], hashes)
    same(text, offsets, slots=ngram_slots(known[:0]), **options)


@needs_cpu_kernels
@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
def test_any_bytes(texts, distinct):
    same(*joined(texts), distinct=distinct)
    same(*joined(texts), buckets=11, distinct=distinct)


@needs_cpu_kernels
@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), max_size=5))
def test_tokens(texts):
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    tokens = torch.tensor([t for text in texts for t in text], dtype=torch.int64)
    hashes, _ = same(tokens, offsets)
    same(tokens, offsets, slots=ngram_slots(hashes.unique()), min_n=1, max_n=4)


@needs_cpu_kernels
def test_many_texts_on_many_threads():
    generator = random.Random(0)
    words = ["alpha", "beta", "x", "Y", "it's", "no.", "日本"]
    texts = [
        " ".join(generator.choices(words, k=generator.randrange(400))).encode() for _ in range(120)
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ngram_lookup(*joined(texts), impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
    assert all(map(torch.equal, results[0], ngram_lookup(*joined(texts), impl="reference")))


@needs_cpu_kernels
def test_a_long_text_of_random_bytes():
    text = torch.frombuffer(bytearray(os.urandom(1 << 20)), dtype=torch.uint8)
    ids, ends = ngram_lookup(text, torch.tensor([0, len(text)]), buckets=1000, impl="cpu")
    assert ends.tolist() == [0, len(ids)] and int(ids.min()) >= 0 and int(ids.max()) < 1000


def test_slots_number_all_and_refuse_repetitions():
    hashes = torch.randint(-(2**62), 2**62, (5000,)).unique()
    slots = ngram_slots(hashes)
    taken = slots[slots[:, 1] >= 0]
    assert len(slots) >= 2 * len(hashes) and len(taken) == len(hashes)
    assert torch.equal(hashes[taken[:, 1]], taken[:, 0])
    with pytest.raises((ValueError, RuntimeError), match="must not repeat"):
        ngram_slots(torch.tensor([3, 5, 3]))
    with pytest.raises(ValueError, match=r"hashes must be int64 \[V\]"):
        ngram_slots(torch.zeros(3))


@needs_cpu_kernels
def test_slots_of_unknown_origin_do_no_harm():
    full = torch.stack([torch.arange(8), torch.arange(8)], 1) + 2**40
    ids, _ = ngram_lookup(*joined([b"a b c"]), slots=full, impl="cpu")
    assert len(ids) == 0
    for slots in (torch.zeros(3, 2), torch.zeros(8, 3), torch.zeros(0, 2)):
        with pytest.raises(RuntimeError, match="ngram_slots"):
            ngram_lookup(*joined([b"a"]), slots=slots.long(), impl="cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 5, 3], [0, -1, 3], [0, 4], [3]])
def test_offsets_that_do_not_rise_to_the_end_are_refused(impl, offsets):
    with pytest.raises((ValueError, RuntimeError), match="offsets must rise from 0"):
        ngram_lookup(joined([b"abc"])[0], torch.tensor(offsets), impl=impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(3)}, r"text must be uint8 \[bytes\] or int64 \[tokens\]"),
        ({"offsets": torch.zeros(2).int()}, r"offsets must be int64 \[B \+ 1\]"),
        ({"slots": torch.zeros(8)}, "slots must be what ngram_slots makes"),
        ({"buckets": -1}, "buckets must not be negative"),
        ({"buckets": 3, "slots": torch.zeros(8, 2).long()}, "got both"),
        ({"min_n": 0}, r"n must rise within \[1, 8\], got 0 to 4"),
        ({"max_n": 9}, r"n must rise within \[1, 8\]"),
        ({"min_n": 5}, r"n must rise within \[1, 8\]"),
        ({"text": torch.zeros(3, dtype=torch.uint8, device="meta")}, "must be on the CPU"),
        ({"impl": "triton"}, "unknown impl 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"text": joined([b"abc"])[0], "offsets": torch.tensor([0, 3])} | change
    with pytest.raises(ValueError, match=message):
        ngram_lookup(**arguments)


def test_opcheck():
    text, offsets = joined([b"a b", b"c"])
    ops = torch.ops.lean_kernels
    torch.library.opcheck(ops.ngram_lookup.default, (text, offsets, None, 7, 1, 4, False))
    torch.library.opcheck(ops.ngram_slots.default, (torch.arange(5),))
