# SPDX-License-Identifier: Apache-2.0
"""What ngram_lookup means, in plain Python: words, their hashes, and those of their n-grams."""

import re
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# Runs of letters, digits, apostrophes and anything beyond ASCII; any other visible character alone.
WORD = re.compile(rb"[a-z0-9'\x80-\xff]+|[!-~]")
_MASK = (1 << 64) - 1


def words(text: bytes) -> list[bytes]:
    return WORD.findall(text.lower())  # of bytes, ASCII alone


def word_hash(word: bytes) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in word:
        value = (value ^ byte) * 0x100000001B3 & _MASK
    return value


def _mix(z: int) -> int:
    """splitmix64's last step."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def ngram_hashes(hashes: list[int], min_n: int, max_n: int) -> Iterator[int]:
    """Hashes of the n-grams of words with these hashes, by where they end, then short ones first.

    hash(w1 ... wn) = mix(hash(w1 ... wn-1) * 0x9E3779B97F4A7C15 + hash(wn)), that of none being 0.
    """
    for end in range(1, len(hashes) + 1):
        for n in range(min_n, min(max_n, end) + 1):
            value = 0
            for word in hashes[end - n : end]:
                value = _mix((value * 0x9E3779B97F4A7C15 + word) & _MASK)
            yield value


def signed(value: int) -> int:
    """The int64 with the bits of this unsigned number."""
    return value - (1 << 64) if value >> 63 else value


def lookup(
    text: Tensor,
    offsets: Tensor,
    slots: Tensor | None,
    buckets: int,
    min_n: int,
    max_n: int,
    distinct: bool,
) -> tuple[Tensor, Tensor]:
    numbers = None
    if slots is not None:
        numbers = {hash: number for hash, number in slots.tolist() if number >= 0}
    bounds, ids, ends = offsets.tolist(), [], [0]
    for begin, end in pairwise(bounds):
        piece = text[begin:end].tolist()
        if text.dtype == torch.uint8:
            piece = [word_hash(word) for word in words(bytes(piece))]
        else:
            piece = [token & _MASK for token in piece]
        found = ngram_hashes(piece, min_n, max_n)
        if numbers is not None:
            found = [numbers[h] for h in map(signed, found) if h in numbers]
        else:
            found = [h % buckets if buckets else signed(h) for h in found]
        ids += sorted(set(found)) if distinct else found
        ends.append(len(ids))
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(ends, dtype=torch.int64)


def slots(hashes: Tensor) -> Tensor:
    capacity = 8
    while capacity < 2 * len(hashes):
        capacity *= 2
    made = [[0, -1] for _ in range(capacity)]
    for number, value in enumerate(hashes.tolist()):
        at = value & (capacity - 1)
        while made[at][1] >= 0 and made[at][0] != value:
            at = (at + 1) & (capacity - 1)
        if made[at][1] >= 0:
            raise ValueError(f"ngram_slots: hashes must not repeat, but {value} does")
        made[at] = [value, number]
    return torch.tensor(made, dtype=torch.int64)
