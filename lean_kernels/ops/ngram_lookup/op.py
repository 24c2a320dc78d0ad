# SPDX-License-Identifier: Apache-2.0
"""ngram_lookup: from raw text to the numbers of its n-grams."""

import torch
from torch import Tensor

from lean_kernels._dispatch import Impl, Kernel, check_impl, resolve
from lean_kernels.ops.ngram_lookup import reference

NAME = "ngram_lookup"
IMPLS = (Impl.REFERENCE, Impl.CPU)
MAX_N = 8


def _reference_lookup(text, offsets, slots, buckets, min_n, max_n, distinct):
    _check(text, offsets, slots, buckets, min_n, max_n, None)
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(text) or bounds != sorted(bounds):
        raise ValueError(
            f"{NAME}: offsets must rise from 0 to the length of text, {len(text)}; got first "
            f"{bounds[0]}, last {bounds[-1]}"
        )
    return reference.lookup(text, offsets, slots, buckets, min_n, max_n, distinct)


def _fake_lookup(text, offsets, slots, buckets, min_n, max_n, distinct):
    found = torch.library.get_ctx().new_dynamic_size()
    return offsets.new_empty(found), offsets.new_empty(offsets.shape)


def _fake_slots(hashes):
    return hashes.new_empty((torch.library.get_ctx().new_dynamic_size(), 2))


_lookup = Kernel(
    "ngram_lookup",
    "(Tensor text, Tensor offsets, Tensor? slots, int buckets, int min_n, int max_n, bool distinct)"
    " -> (Tensor, Tensor)",
    reference=_reference_lookup,
    fake=_fake_lookup,
)
_slots = Kernel(
    "ngram_slots", "(Tensor hashes) -> Tensor", reference=reference.slots, fake=_fake_slots
)


def _check(text, offsets, slots, buckets, min_n, max_n, impl) -> None:
    def fail(problem: str) -> None:
        raise ValueError(f"{NAME}: {problem}")

    if text.dim() != 1 or text.dtype not in (torch.uint8, torch.int64):
        fail(f"text must be uint8 [bytes] or int64 [tokens], got {text.dtype} {list(text.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        fail(f"offsets must be int64 [B + 1], got {offsets.dtype} {list(offsets.shape)}")
    if slots is not None and (slots.dtype != torch.int64 or slots.dim() != 2):
        fail(f"slots must be what ngram_slots makes, got {slots.dtype} {list(slots.shape)}")
    if slots is not None and buckets:
        fail(f"expected slots or buckets, got both (buckets {buckets})")
    if buckets < 0:
        fail(f"buckets must not be negative, got {buckets}")
    if not 1 <= min_n <= max_n <= MAX_N:
        fail(f"n must rise within [1, {MAX_N}], got {min_n} to {max_n}")
    if text.device.type != "cpu" or offsets.device.type != "cpu":
        fail(f"text must be on the CPU, got {text.device} and offsets on {offsets.device}")
    check_impl(NAME, impl, text.device)


def ngram_lookup(
    text: Tensor,
    offsets: Tensor,
    *,
    slots: Tensor | None = None,
    buckets: int = 0,
    min_n: int = 1,
    max_n: int = 4,
    distinct: bool = False,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The numbers of the n-grams of B texts, tokenisation included.

    Of raw text, the words are the runs of letters, digits, apostrophes and bytes beyond ASCII, in
    lower case (ASCII letters alone), and every other visible ASCII character by itself. Nothing
    else about the bytes is assumed; they need not be UTF-8.

    Args:
        text: uint8 [T], the bytes of all texts one after another, or int64 [T], tokens in place of
            words. On the CPU.
        offsets: int64 [B + 1], rising from 0 to T; an n-gram never crosses from text to text.
        slots: a vocabulary, from `ngram_slots`; n-grams it does not have are left out.
        buckets: without slots, the number of an n-gram is its hash modulo `buckets`; or, if that
            is 0, the hash itself, as int64.
        min_n, max_n: lengths of n-grams, from 1 to 8.
        distinct: every number once per text, in rising order; else every occurrence, by where it
            ends, then short ones first.
        impl: "reference", "cpu", or None for the best one here.

    Returns:
        ids int64 [N] and offsets int64 [B + 1], as `ngram_embedding_bag` takes them.

    Raises:
        ValueError, RuntimeError: a shape, dtype, device, value or impl that does not fit.
    """
    chosen = resolve(NAME, impl, IMPLS)
    _check(text, offsets, slots, buckets, min_n, max_n, chosen)
    return _lookup.of(chosen, "cpu")(text, offsets, slots, buckets, min_n, max_n, distinct)


def ngram_slots(hashes: Tensor) -> Tensor:
    """A hash table that numbers `hashes`, int64 [V] without repetitions, by their position.

    Returns int64 [capacity, 2], at least half of it free. Raises ValueError or RuntimeError.
    """
    if hashes.dim() != 1 or hashes.dtype != torch.int64:
        raise ValueError(
            f"ngram_slots: hashes must be int64 [V], got {hashes.dtype} {list(hashes.shape)}"
        )
    return _slots.of(None, "cpu")(hashes)
