# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels give the same bits: from run to run, in any batch, on any number of threads."""

import pytest
import torch
from problems import DTYPES, needs_cpu_kernels, same_bits
from ragged import SCORES, ascending, cu_seqlens, problem

pytestmark = needs_cpu_kernels

LENGTHS = [70, 3, 0, 333, 20, 1, 700, 45]  # several segments of query rows, and many tasks
CASES = [
    {"kv_heads": 4, **SCORES[1]},
    {"kv_heads": 2, "causal": True, **SCORES[5]},
    {"kv_heads": 1, "window": (40, 9), **SCORES[3]},
    {"kv_heads": 1, "key_lengths": [5, 90, 3, 300, 20, 64, 650, 0], **SCORES[1]},
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_and_numbers_of_threads(threads, case, dtype):
    p = problem(LENGTHS, dim=24, dtype=dtype, **case)
    threads(1)
    expected = p.run_with_gradients("cpu")
    for count in (1, 2, 3):
        threads(count)
        for result, right in zip(p.run_with_gradients("cpu"), expected, strict=True):
            assert same_bits(result, right)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_sequence_does_not_depend_on_the_batch(threads, case, positions):
    threads(2)
    p = problem(LENGTHS, dim=24, **case)
    if positions:
        p = p.with_options(positions=ascending(LENGTHS, 2))
    whole = p.run_with_gradients("cpu")[:2]
    for b in range(len(LENGTHS)):
        rows = slice(*p.cu[b : b + 2].tolist())
        for alone, together in zip(p.sequence(b).run("cpu"), whole, strict=True):
            assert same_bits(alone, together[rows])


def test_gradients_of_a_sequence_do_not_depend_on_the_batch(threads):
    threads(2)
    p = problem(LENGTHS, dim=24, kv_heads=2, key_scores="mean")
    upstream = torch.randn(p.query.shape), torch.randn(len(p.query))

    def gradients(p, upstream):
        leaves = [t.clone().requires_grad_() for t in (p.query, p.key, p.value)]
        p.query, p.key, p.value = leaves
        return torch.autograd.grad(p.run("cpu"), leaves, upstream)

    parts = [p.sequence(b) for b in range(len(LENGTHS))]
    whole = gradients(p, upstream)
    for b, part in enumerate(parts):
        rows = slice(*p.cu[b : b + 2].tolist())
        for alone, together in zip(
            gradients(part, [u[rows] for u in upstream]), whole, strict=True
        ):
            assert same_bits(alone, together[rows])


def test_the_order_of_sequences_does_not_matter():
    p = problem(LENGTHS, dim=24, key_scores="sum")
    parts = [p.sequence(b) for b in range(len(LENGTHS))]
    order = [3, 0, 7, 6, 2, 1, 5, 4]
    turned = problem([LENGTHS[b] for b in order], dim=24, key_scores="sum")
    for name in ("query", "key", "value"):
        setattr(turned, name, torch.cat([getattr(parts[b], name) for b in order]))
    out, scores = p.run("cpu")
    for result, right in zip(turned.run("cpu"), (out, scores), strict=True):
        pieces = [right[p.cu[b] : p.cu[b + 1]] for b in order]
        assert same_bits(result, torch.cat(pieces))


def test_scores_do_not_change_the_output():
    p = problem(LENGTHS, dim=64, causal=True)
    assert same_bits(p.run("cpu")[0], p.with_options(key_scores="mean").run("cpu")[0])


@pytest.mark.parametrize("dim", [16, 64])
def test_new_memory_is_overwritten(dim, monkeypatch):
    """Every output element, also of empty sequences and unseen keys, comes from the kernel."""
    p = problem([4, 0, 9], dim=dim, key_lengths=[0, 7, 20], key_scores="sum", window=(2, 2))
    expected = p.run_with_gradients("cpu")
    torch.use_deterministic_algorithms(True)  # fills what torch allocates with NaN
    try:
        assert torch.empty(3).isnan().all()
        for result, right in zip(p.run_with_gradients("cpu"), expected, strict=True):
            assert same_bits(result, right)
    finally:
        torch.use_deterministic_algorithms(False)


def test_ten_thousand_sequences_on_every_number_of_threads(threads):
    lengths = (torch.arange(10_000) * 7919 % 6).tolist()
    p = problem(lengths, heads=2, dim=8, key_scores="sum")
    threads(1)
    expected = p.run("cpu")
    threads(2)
    assert all(same_bits(*pair) for pair in zip(p.run("cpu"), expected, strict=True))
    assert torch.equal(p.cu, cu_seqlens(lengths))
