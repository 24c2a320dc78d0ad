# SPDX-License-Identifier: Apache-2.0
"""Forward numerics of ragged_attention: every implementation against float64."""

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, IMPLS, needs_cpu_kernels, same_bits
from ragged import MIXED, SCORES, ascending, assert_exact, cu_seqlens, error, problem

from lean_kernels.ops import ragged_attention

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def check(p, impl):
    results = p.run(impl)
    assert results[0].dtype == p.query.dtype
    assert_exact(results, p.double.run("reference"))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 8, 20, 32, 64, 72, 96, 128, 256])
def test_head_dims(impl, dim, dtype):
    check(problem([40, 0, 3, 25], heads=2, dim=dim, dtype=dtype, key_scores="sum"), impl)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 47, 48, 49, 97, 193, 300])
def test_lengths(impl, length):
    check(problem([length], heads=2, dim=24, key_scores="sum"), impl)
    check(problem([length], heads=2, dim=24, causal=True, key_scores="mean"), impl)


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (3, 5)}], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masks_groups_and_scores(impl, kv_heads, mask, scores):
    check(problem(MIXED, kv_heads=kv_heads, **mask, **scores), impl)


@pytest.mark.parametrize("window", [(0, 0), (0, 7), (-1, 0), (30, -1), (2**62, 1), (1, 2**62)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(impl, causal, window):
    check(problem([200, 20], heads=2, window=window, causal=causal, key_scores="sum"), impl)


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (4, 2)}], ids=str)
def test_positions_of_kept_tokens(impl, mask, scores):
    options = mask | scores
    check(problem(MIXED, positions=ascending(MIXED, 3), **options), impl)
    keys = [9, 4, 0, 3, 70, 33, 2]
    both = {"positions": ascending(MIXED, 3), "key_positions": ascending(keys, 2)}
    check(problem(MIXED, key_lengths=keys, **both, **options), impl)


def test_positions_mean_what_a_mask_of_keys_means(impl):
    """Dropped tokens: the same as computing all of them with those keys masked out."""
    whole = problem([40], heads=2, causal=True)
    kept = torch.tensor([0, 3, 4, 9, 10, 11, 20, 33, 39])
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask &= torch.zeros(40, dtype=torch.bool).index_fill(0, kept, True)
    q, k, v = (t.double().transpose(0, 1) for t in (whole.query, whole.key, whole.value))
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)[kept]
    out = ragged_attention(
        whole.query[kept], whole.key[kept], whole.value[kept], cu_seqlens([9]), causal=True,
        positions=kept.int(), impl=impl,
    )  # fmt: skip
    assert error(out, right) < 1e-6


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_lie_elsewhere(impl, causal, kv_heads, scores):
    keys = [1, 9, 0, 40, 100, 33, 2]
    check(problem(MIXED, kv_heads=kv_heads, key_lengths=keys, causal=causal, **scores), impl)
    one_each = [1] * 7
    check(problem(one_each, kv_heads=kv_heads, key_lengths=keys, causal=causal, **scores), impl)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, -1.5])
def test_scale(impl, scale):
    check(problem([30, 7], scale=scale, key_scores="sum"), impl)


def test_logits_far_apart(impl):
    """Weights underflow to zero, never to something else."""
    p = problem([50], heads=2, dim=8, scale=40.0, key_scores="sum")
    out, scores = p.run(impl)
    exact_out, exact_scores = p.double.run("reference")
    # float32 logits of up to about 1000 are known to 1000 units in the last place
    assert error(out, exact_out) < 1e-4
    assert error(scores, exact_scores) < 1e-4


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_scores_add_up_to_rows_times_heads(impl, kv_heads):
    p = problem(MIXED, kv_heads=kv_heads, key_scores="sum")
    _, scores = p.run(impl)
    for b, length in enumerate(MIXED):
        total = scores[p.cu[b] : p.cu[b + 1]].double().sum().item()
        assert total == pytest.approx(4 * length, rel=1e-6)
    _, apart = p.with_options(key_scores_per_head=True).run(impl)
    assert error(apart.sum(1), scores.double()) < 1e-6


def test_a_query_that_sees_no_key_gets_zeros(impl):
    p = problem([4, 3], heads=2, key_lengths=[2, 0], causal=True, key_scores="sum")
    out, scores = p.run(impl)
    assert not out[:2].any() and not out[4:].any()
    assert out[2:4].all()
    assert scores.sum().item() == pytest.approx(4)
    lse = torch.ops.lean_kernels.ragged_attention(
        p.query, p.key, p.value, p.cu, p.options["cu_seqlens_k"], None, None,
        -1, 0.25, -1, 0, 0, False, False,
    )[1]  # fmt: skip
    assert (lse == -torch.inf).all(1).tolist() == [True, True, False, False, True, True, True]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_nothing_at_all(impl, scores, lengths):
    results = check(problem(lengths, **scores), impl)
    assert all(r.numel() == 0 for r in results)


def test_ten_thousand_sequences(impl):
    lengths = (torch.arange(10_000) % 5).tolist()
    if impl == "reference":
        lengths = lengths[:200]
    p = problem(lengths, heads=2, dim=8, key_scores="sum")
    out, scores = p.run(impl)
    assert scores.sum().item() == pytest.approx(2 * sum(lengths), rel=1e-5)
    last = p.sequence(len(lengths) - 1)
    assert error(out[-len(last.query) :], last.double.run("reference")[0]) < 1e-6


def test_views_are_read_in_place_and_nothing_between_their_rows(impl):
    """A fused projection [T, 3, H, D] with NaN in a gap after every row and around the tensor."""
    lengths = [20, 0, 50, 3]
    p = problem(lengths, heads=4, dim=24, key_scores="sum")
    room = torch.full((sum(lengths) + 2, 3 * 4 * 24 + 5), torch.nan)
    fused = room[1:-1, : 3 * 4 * 24].view(-1, 3, 4, 24)
    for i, t in enumerate((p.query, p.key, p.value)):
        fused[:, i] = t
    q, k, v = fused.unbind(1)
    assert not q.is_contiguous()
    results = ragged_attention(q, k, v, p.cu, key_scores="sum", impl=impl)
    assert all(same_bits(*pair) for pair in zip(results, p.run(impl), strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack((t, t.new_full(t.shape, torch.nan)), -1)[..., 0],
        lambda t: torch._neg_view(-t),
    ],
    ids=["heads outermost", "heads innermost", "every other element", "negated"],
)
def test_strides(impl, view):
    p = problem([20, 7], key_scores="sum")
    results = ragged_attention(
        view(p.query), view(p.key), view(p.value), p.cu, key_scores="sum", impl=impl
    )
    assert all(same_bits(*pair) for pair in zip(results, p.run(impl), strict=True))


def test_expanded_inputs(impl):
    p = problem([20, 7], heads=4)
    p.query, p.key = p.query[:, :1].expand(-1, 4, -1), p.key[:1].expand(27, -1, -1)
    check(p, impl)


def test_other_sequences_do_not_leak(impl):
    p = problem(MIXED, key_scores="sum")
    right = p.run(impl)
    rows = slice(*p.cu[4:6].tolist())
    for t in (p.query, p.key, p.value):
        mine = t[rows].clone()
        t.fill_(torch.nan)
        t[rows] = mine
    for result, expected in zip(p.run(impl), right, strict=True):
        assert same_bits(result[rows], expected[rows])
        assert result[p.cu[3] : p.cu[4]].isnan().all()


def test_half_precision_scores_are_float32(impl):
    p = problem([30, 9], dtype=torch.bfloat16, key_scores="mean")
    _, scores = p.run(impl)
    assert scores.dtype == torch.float32
    assert error(scores, p.double.run("reference")[1]) < 1e-6


@needs_cpu_kernels
@pytest.mark.parametrize("length", [2000, 3000])
def test_long_sequences(impl, length):
    if impl == "reference":
        pytest.skip("defines what is right")
    p = problem([length, 3], heads=1, dim=16, key_scores="sum")
    check(p, impl)
    check(p.with_options(window=(100, 50)), impl)
