# SPDX-License-Identifier: Apache-2.0
"""Numerics of ragged_attention's Triton kernels, on a GPU or, by test_triton_interpreter.py, on
the CPU."""

from itertools import accumulate

import pytest
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    guarded_empty,
    on_gpu,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

import triton as triton_language  # noqa: E402
import triton.language as tl  # noqa: E402
from ragged_triton import (  # noqa: E402, F401
    MEAN,
    Problem,
    bfloat16_in_the_interpreter,
    bounds,
    check,
    error,
    take_path,
)

from lean_kernels.ops import ragged_attention  # noqa: E402
from lean_kernels.ops.ragged_attention import triton, triton_call  # noqa: E402
from lean_kernels.ops.ragged_attention.triton_schedule import find_tile  # noqa: E402

PATHS = ["packed", "resident", "tiles"]

CASES = {
    "plain": {"scores": 0},
    "sum": {"dim": 20},
    "causal mean": {"right": 0, "scores": MEAN, "exclude_diagonal": True, "scale": -0.4},
    "window per head": {"left": 3, "right": 2, "per_head": True},
    "positions": {"left": 4, "right": 6, "positions": True, "exclude_diagonal": True},
    "grouped": {"heads": 3, "kv_heads": 1, "right": 0, "scores": MEAN},
    "grouped per head": {
        "heads": 4, "kv_heads": 2, "positions": True, "per_head": True, "exclude_diagonal": True,
        "scores": MEAN,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_float32(take, path, case):
    if path == "resident" and case == "plain":
        pytest.skip("keys stay resident for the sake of scores")
    take(path)
    check(Problem(**CASES[case]), gradients=path != "resident")


@pytest.mark.parametrize("case", ["causal mean", "grouped"])
@pytest.mark.parametrize("path", PATHS)
def test_heads_that_share_a_program(take, monkeypatch, path, case):
    monkeypatch.setattr(triton_call, "_PROGRAMS", 1)
    take(path)
    check(Problem(**CASES[case]), gradients=path == "packed")


@pytest.mark.parametrize(
    "kind", [{}, {"scores": MEAN, "exclude_diagonal": True, "right": 1, "scale": 0.0}], ids=str
)
def test_several_sequences_in_a_program(kind):
    problem = Problem([3, 0, 4, 2, 4, 1, 3], **kind)
    launched = recorded(problem.forward, "_packed_kernel")
    assert launched[0]["SEQUENCES"] == 4
    check(problem)


KEYS = {
    "more keys": ([1, 3, 0, 2, 0], [20, 3, 4, 1, 0], {"heads": 4, "kv_heads": 2, "right": 0}),
    "fewer keys, positions": (
        [9, 3, 0, 2, 0], [2, 3, 4, 0, 5],
        {"left": 4, "right": 1, "positions": True, "per_head": True, "scores": MEAN},
    ),
    "rows that see no key": ([9, 2], [3, 18], {"right": 0, "exclude_diagonal": True}),
    "no keys at all": ([3, 2], [0, 0], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_keys_of_their_own(case):
    lengths, lengths_k, options = KEYS[case]
    check(Problem(lengths, lengths_k, **options))


def eager(query, key, value):
    """Causal attention of one sequence [T, H, D], each step in its dtype, scale 0.3."""
    logits = torch.einsum("ihd,jhd->hij", query * 0.3, key)
    future = torch.ones(logits.shape[1:], dtype=torch.bool, device=DEVICE).triu(1)
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(future, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("dtype, dim", [(torch.float16, 40), (torch.bfloat16, 16)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_half_errs_no_more_than_twice_dense(take, path, dtype, dim):
    take(path)
    problem = Problem([7, 20], dim=dim, dtype=dtype, right=0)
    inputs = [t.clone().requires_grad_() for t in problem.qkv]
    dense = torch.cat([eager(*(t[rows] for t in inputs)) for rows in (slice(7), slice(7, 27))])
    out, lse, scores = problem.forward()
    (exact, _, exact_scores), _ = problem.exact()
    assert error(out, exact) <= 2 * error(dense, exact)
    assert error(scores, exact_scores) < 1e-6
    if path == "resident":
        return  # the gradients are those of tiles
    problem.grad_scores = None
    gradients = problem.gradients(out, lse)
    peers = torch.autograd.grad(dense, inputs, *problem.grad)
    for actual, peer, exact in zip(gradients, peers, problem.exact()[1], strict=True):
        assert error(actual, exact) <= 2 * error(peer, exact)


def recorded(call, name):
    """Launch options of the kernel `name` in `call`."""
    kernel, launches = getattr(triton, name), []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append(options)
                return kernel[grid](*args, **options)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, name, Recorder())
        call()
    return launches


@pytest.mark.parametrize("path", PATHS)
def test_tokens_behind_the_last_sequence_get_zeros(take, path):
    take(path)
    problem = Problem([5, 9, 6])
    problem.index = (bounds([5, 9]), *problem.index[1:])
    check(problem, gradients=path != "resident")
    out, _, scores = problem.forward()
    assert not bool(out[14:].any()) and not bool(scores[14:].any())


@pytest.mark.parametrize("path", ["packed", "resident"])
def test_sequences_longer_than_max_seqlen_become_nan(take, path):
    take(path)
    problem = Problem([5, 40, 3], max_seqlen=18)
    out, lse, scores = problem.forward()
    (exact, exact_lse, exact_scores), exact_gradients = problem.exact()
    pairs = [(out, exact), (lse, exact_lse), (scores, exact_scores)]
    if path == "packed":
        pairs += zip(problem.gradients(out, lse), exact_gradients, strict=True)
    for actual, expected in pairs:
        assert bool(actual[5:45].isnan().all())
        for rest in (slice(5), slice(45, 48)):
            assert error(actual[rest], expected[rest]) < 1e-6


@pytest.mark.parametrize("cu", [[0, 99, -7, 24, 24], [-9, -9, 3, 2**31 - 1, 0]], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_bad_bounds_stay_inside(take, path, cu):
    take(path)
    problem = Problem(right=0)  # the guards check what is written
    problem.index = (torch.tensor(cu, dtype=torch.int32, device=DEVICE), *problem.index[1:])
    out, lse, _ = problem.forward()
    if path != "resident":
        problem.gradients(out.nan_to_num(), lse.nan_to_num())


@pytest.mark.parametrize("path", ["packed", "tiles"])
def test_views(take, path):
    take(path)
    problem = Problem()
    query, key, value = problem.qkv
    problem.qkv = (
        torch.stack([key, query, value], 1)[:, 1],  # as in a fused projection
        key.transpose(0, 1).contiguous().transpose(0, 1),
        value.transpose(0, 2).contiguous().transpose(0, 2),
    )
    problem.grad = [torch.ones(1, 1, 1, device=DEVICE).expand(24, 2, 16)]
    problem.grad_scores = torch.randn(1, device=DEVICE).expand(24)
    check(problem)
    out, lse, _ = problem.forward()
    assert all(t.is_contiguous() for t in (out, lse, *problem.gradients(out, lse)))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_no_tokens(lengths, per_head):
    problem = Problem(lengths, per_head=per_head, max_seqlen=0)
    out, lse, scores = problem.forward()
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)
    assert scores.shape == ((0, 2) if per_head else (0,))
    assert [t.shape for t in problem.gradients(out, lse)] == [(0, 2, 16)] * 3


def test_no_queries():
    problem = Problem([0, 0], [3, 2])
    out, lse, scores = problem.forward()
    assert out.shape == (0, 2, 16) and torch.equal(scores, torch.zeros_like(scores))
    dq, dk, dv = problem.gradients(out, lse)
    assert dq.shape == (0, 2, 16) and not bool(dk.any()) and not bool(dv.any())


def test_through_autograd():
    problem = Problem()
    inputs = [t.clone().requires_grad_() for t in problem.qkv]
    out, scores = ragged_attention(
        *inputs, problem.index[0], scale=0.3, key_scores="sum", impl="triton"
    )
    loss = (out * problem.grad[0]).sum() + (scores * problem.grad_scores).sum()
    gradients = torch.autograd.grad(loss, inputs)
    for actual, expected in zip(gradients, problem.exact()[1], strict=True):
        assert error(actual, expected) < 1e-6


@triton_language.jit
def _schedule_kernel(cu_ptr, out_ptr, sequences, total, PACK: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    b, start, stop, first = find_tile(cu_ptr, sequences, total, tile, PACK, BLOCK)
    tl.store(out_ptr + tile * 4, b)
    tl.store(out_ptr + tile * 4 + 1, start)
    tl.store(out_ptr + tile * 4 + 2, stop)
    tl.store(out_ptr + tile * 4 + 3, first)


@pytest.mark.parametrize("count, longest, pack", [(1, 50, 1), (15, 9, 3), (140, 1, 1)])
def test_every_row_has_one_tile(count, longest, pack):
    torch.manual_seed(0)
    lengths = torch.randint(longest + 1, (count,)).tolist()
    total = sum(lengths) + 7  # seven tokens behind the last sequence
    programs = triton_call.most_tiles(total * pack, count, 16)
    found = torch.zeros(programs, 4, dtype=torch.int32, device=DEVICE)
    _schedule_kernel[(programs,)](bounds(lengths), found, count, total, PACK=pack, BLOCK=16)
    edges = [0, *accumulate(lengths), total]
    rows = []
    for b, start, stop, first in found.tolist():
        assert (start, stop) == (edges[b], edges[b + 1])
        rows += [start * pack + row for row in range(first, min(first + 16, (stop - start) * pack))]
    assert sorted(rows) == list(range(total * pack))


def test_refusals():
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16, got float64"):
        Problem(dtype=torch.float64).forward()
    with pytest.raises(ValueError, match="heads of up to 256 dimensions, got 257"):
        Problem([2], dim=257).forward()


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"interpreter multiplies torch\.bfloat16 wrongly"):
        Problem([2], dtype=torch.bfloat16).forward()


def big(dtype=torch.bfloat16, **options):
    torch.manual_seed(1)
    lengths = torch.randint(options.pop("longest", 300), (40,)).tolist()
    return Problem([0, *lengths], heads=6, dim=64, dtype=dtype, **options)


@on_gpu
@pytest.mark.parametrize("longest", [16, 33, 64, 120, 250, 700])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_length_classes_on_gpu(longest, kv_heads):
    for options in ({}, {"right": 0, "scores": MEAN, "exclude_diagonal": True, "per_head": True}):
        check(big(torch.float32, longest=longest, kv_heads=kv_heads, **options), 2e-6)
        check(big(longest=longest, kv_heads=kv_heads, **options), 2e-2)


@on_gpu
@pytest.mark.parametrize("longest", [40, 200, 1500])
def test_cuda_graph_without_host_sync(longest):
    problem = big(longest=longest, scores=MEAN, right=0)

    def step():
        out, lse, scores = problem.forward()
        return out, lse, scores, *problem.gradients(out, lse)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    problem.qkv[0].copy_(torch.randn_like(problem.qkv[0]))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@on_gpu
def test_offsets_beyond_two_to_the_31():
    lengths = [40] * 27000
    total = sum(lengths)
    qkv = torch.zeros(total, 3, 12, 64, dtype=torch.float16, device=DEVICE)
    assert qkv.numel() > 2**31
    qkv[-40:] = torch.randn(40, 3, 12, 64, dtype=torch.float16, device=DEVICE)
    small = Problem([40], heads=12, dim=64, dtype=torch.float16)
    small.qkv = [t.clone() for t in qkv[-40:].unbind(1)]
    large = Problem([40], heads=12, dim=64, dtype=torch.float16)
    large.qkv, large.index = qkv.unbind(1), (bounds(lengths), None, None, None)
    for longest in (40, -1):
        large.longest = longest
        out, _, scores = large.forward()
        (exact, _, exact_scores), _ = small.exact()
        assert error(out[-40:], exact) < 1e-3
        assert error(scores[-40:], exact_scores) < 1e-5
