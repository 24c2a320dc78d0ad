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
    mend_bfloat16,
    on_gpu,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

import triton as triton_language  # noqa: E402
import triton.language as tl  # noqa: E402

from lean_kernels.ops import ragged_attention  # noqa: E402
from lean_kernels.ops.ragged_attention import reference, triton  # noqa: E402
from lean_kernels.ops.ragged_attention.triton_schedule import find_tile  # noqa: E402

LENGTHS = [5, 0, 18, 1]
SUM, MEAN = 1, 2
PATHS = ["packed", "resident", "tiles"]


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    mend_bfloat16(monkeypatch, triton)


@pytest.fixture
def take(monkeypatch):
    """Make the launcher take one path, in tiles small enough for the interpreter."""
    plain = triton.config

    def choose(path: str) -> None:
        def config(kernel, *args):
            if kernel == "resident":
                small = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1}
                return small if path == "resident" else None
            if "packed" in kernel and path != "packed":
                return None
            return plain(kernel, *args)

        monkeypatch.setattr(triton, "config", config)

    return choose


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def ascending(lengths) -> torch.Tensor:
    """Positions that tokens could have after others were dropped."""
    parts = [torch.randperm(2 * n)[:n].sort()[0] for n in lengths]
    return torch.cat(parts).int().to(DEVICE)


class Problem:
    def __init__(
        self, lengths=LENGTHS, lengths_k=None, *, heads=2, kv_heads=None, dim=16,
        dtype=torch.float32, positions=False, max_seqlen=None, scale=0.3, left=-1, right=-1,
        scores=SUM, per_head=False, exclude_diagonal=False,
    ):  # fmt: skip
        torch.manual_seed(0)
        keys = lengths if lengths_k is None else lengths_k
        of_query = (sum(lengths), heads, dim)
        of_key = (sum(keys), kv_heads or heads, dim)
        self.qkv, self.grad = (
            [torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes]
            for shapes in ((of_query, of_key, of_key), (of_query,))
        )
        shape = (sum(keys), heads) if per_head else (sum(keys),)
        self.grad_scores = torch.randn(shape).to(DEVICE) if scores else None
        self.index = (
            bounds(lengths),
            None if lengths_k is None else bounds(lengths_k),
            ascending(lengths) if positions else None,
            ascending(keys) if positions and lengths_k is not None else None,
        )
        self.longest = max(lengths) if max_seqlen is None else max_seqlen
        self.numbers = (scale, left, right, scores, per_head, exclude_diagonal)

    @property
    def layout(self):
        return *self.index, self.longest, *self.numbers

    def forward(self):
        return triton.forward(*self.qkv, *self.layout)

    def gradients(self, out, lse):
        return triton.grad(*self.grad, self.grad_scores, *self.qkv, out, lse, *self.layout)

    def exact(self):
        """Output, LSE, scores; gradients of query, key, value. In float64."""
        scale, left, right, scores, *kind = self.numbers
        qkv = [t.double() for t in self.qkv]
        options = (*self.index, scale, left, right)
        forward = reference.forward(*qkv, *options, scores > 0, scores == MEAN, *kind)
        upstream = (None if t is None else t.double() for t in (*self.grad, self.grad_scores))
        return forward, reference.grad(*upstream, *qkv, *options, scores == MEAN, *kind)


def error(actual, exact) -> float:
    """RMS of the error over RMS of the exact values."""
    assert actual.shape == exact.shape
    difference = float((actual.detach().double() - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0


def check(problem, bound=1e-6, gradients=True):
    out, lse, scores = problem.forward()
    (exact_out, exact_lse, exact_scores), exact_gradients = problem.exact()
    assert error(out, exact_out) < bound
    seen = exact_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert error(lse[seen], exact_lse[seen]) < 1e-6
    assert error(scores, exact_scores) < 1e-6
    if gradients:
        for actual, exact in zip(problem.gradients(out, lse), exact_gradients, strict=True):
            assert error(actual, exact) < bound


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
    monkeypatch.setattr(triton, "_PROGRAMS", 1)
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
    programs = triton._tiles(total * pack, count, 16)
    found = torch.zeros(programs, 4, dtype=torch.int32, device=DEVICE)
    _schedule_kernel[(programs,)](bounds(lengths), found, count, total, PACK=pack, BLOCK=16)
    edges = [0, *accumulate(lengths), total]
    rows = []
    for b, start, stop, first in found.tolist():
        assert (start, stop) == (edges[b], edges[b + 1])
        rows += [start * pack + row for row in range(first, min(first + 16, (stop - start) * pack))]
    assert sorted(rows) == list(range(total * pack))


class Varlen:
    """In place of torch.nn.attention.varlen, with its habits and none of its needs."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(triton, "_VARLEN_FROM", 64)
        monkeypatch.setattr(triton, "_runs_varlen", lambda device: True)
        monkeypatch.setattr(triton, "_varlen_attn", lambda: (self, "lse", True))

    def __call__(
        self, query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux, scale, window_size,
        enable_gqa=False,
    ):  # fmt: skip
        assert return_aux == "lse" and enable_gqa == (query.shape[1] != key.shape[1])
        self.calls.append((max_q, max_k, scale, window_size))
        qkv = (t.float() for t in (query, key, value))
        out, lse, _ = reference.forward(
            *qkv, cu_q, None, None, None, scale, *window_size, False, False, False, False
        )
        written = torch.arange(len(query)) < cu_q[-1]
        out[~written], lse[~written] = torch.nan, torch.nan
        return out.to(query.dtype), lse.masked_fill(lse == -torch.inf, torch.inf).t().contiguous()


HALF = {"dtype": torch.float16, "dim": 8, "max_seqlen": 70}


@pytest.mark.parametrize(
    "options", [{"scores": 0}, {"kv_heads": 1, "left": 9, "right": 0}], ids=str
)
def test_long_sequences_go_to_torch(monkeypatch, take, options):
    if DEVICE != "cpu":
        pytest.skip("the stand-in runs on the CPU; test_long_sequences_on_gpu has the real one")
    take("tiles")
    varlen = Varlen(monkeypatch)
    problem = Problem([70, 6, 4], **HALF, **options)
    problem.index = (bounds([70, 6]), *problem.index[1:])
    out, lse, scores = problem.forward()
    (exact, exact_lse, exact_scores), _ = problem.exact()
    assert varlen.calls == [(70, 70, 0.3, problem.numbers[1:3])]
    assert error(out[:76], exact[:76]) < 1e-3 and not bool(out[76:].any())
    assert error(lse[:76], exact_lse[:76]) < 1e-6
    assert bool((lse[76:] == -torch.inf).all())
    assert scores.numel() == 0 or error(scores, exact_scores) < 1e-6


def test_varlen_poisons_what_max_seqlen_denied(monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("the stand-in runs on the CPU")
    Varlen(monkeypatch)
    problem = Problem([4, 90, 6], **HALF, scores=0)
    out, lse, _ = problem.forward()
    for t in (out, lse):
        assert bool(t[4 + 70 : 94].isnan().all())
        assert bool(t[:74].isfinite().all()) and bool(t[94:].isfinite().all())


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dim": 12},
        {"max_seqlen": 60},
        {"max_seqlen": -1},
        {"positions": True, "left": 3},
        {"lengths_k": [70, 3, 3]},
    ],
    ids=str,
)
def test_what_torch_would_not_take(monkeypatch, options):
    Varlen(monkeypatch)
    assert triton._varlen_fits(call_of(Problem([70, 6, 0], **HALF)), 70)
    problem = Problem([70, 6, 0], **(HALF | options))
    assert not triton._varlen_fits(call_of(problem), problem.longest)


def call_of(problem):
    return triton._call(*problem.qkv, *problem.layout)


def test_misaligned_views_are_not_given_to_torch(monkeypatch):
    Varlen(monkeypatch)
    problem = Problem([70], **HALF)
    wide = torch.zeros(70, 2, 9, dtype=torch.float16, device=DEVICE)
    for view in (wide[..., 1:], wide[..., :8]):
        problem.qkv[1] = view
        assert not triton._varlen_fits(call_of(problem), 70)


def test_torch_here_has_what_the_dispatch_calls():
    kernel, request, _ = triton._varlen_attn()
    assert callable(kernel) and request.lse


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
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (200, 50)], ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_long_sequences_on_gpu(monkeypatch, window, kv_heads):
    left, right = window
    problem = Problem(
        [2000, 7, 0, 1100], heads=6, kv_heads=kv_heads, dim=64, dtype=torch.bfloat16,
        left=left, right=right,
    )  # fmt: skip
    assert triton._varlen_fits(call_of(problem), 2000)
    check(problem, 2e-2)


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
