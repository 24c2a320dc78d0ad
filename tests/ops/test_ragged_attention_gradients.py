# SPDX-License-Identifier: Apache-2.0
"""Gradients of ragged_attention, through its output and through its scores."""

import pytest
import torch
from problems import DTYPES, IMPLS
from ragged import MIXED, SCORES, ascending, assert_exact, problem

from lean_kernels.ops import ragged_attention

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def check(p, impl):
    # Gradients of query and key are differences of sums: half a digit is lost.
    assert_exact(p.run_with_gradients(impl), p.double.run_with_gradients("reference"), slack=3)


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window": (3, 5)}, {"kv_heads": 1}, {"kv_heads": 2}], ids=str
)
def test_masks_groups_and_scores(impl, mask, scores):
    check(problem(MIXED, **mask, **scores), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 20, 64, 72])
def test_head_dims_and_dtypes(impl, dim, dtype):
    check(problem([40, 0, 3, 25], heads=2, dim=dim, dtype=dtype, key_scores="sum"), impl)


@pytest.mark.parametrize("scores", SCORES[:2], ids=str)
@pytest.mark.parametrize("length", [1, 9, 48, 100, 300])
def test_lengths(impl, length, scores):
    check(problem([length], heads=2, causal=length == 100, **scores), impl)


@pytest.mark.parametrize("scores", SCORES[::4], ids=str)
def test_keys_that_lie_elsewhere_and_positions(impl, scores):
    keys = [1, 9, 0, 40, 100, 33, 2]
    check(problem(MIXED, key_lengths=keys, causal=True, kv_heads=2, **scores), impl)
    both = {"positions": ascending(MIXED, 3), "key_positions": ascending(keys, 2)}
    check(problem(MIXED, key_lengths=keys, window=(20, 20), **both, **scores), impl)


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(impl, causal, scores):
    p = problem([4, 0, 3], heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (p.query, p.key, p.value)]

    def run(*inputs):
        return ragged_attention(*inputs, p.cu, causal=causal, impl=impl, **scores)

    assert torch.autograd.gradcheck(run, leaves)


def test_expanded_and_missing_upstream_gradients(impl):
    p = problem([20, 7], key_scores="sum")
    leaves = [t.requires_grad_() for t in (p.query, p.key, p.value)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for pick in (lambda r: r[0].sum(), lambda r: r[1][3:9].sum(), lambda r: (r[1] ** 2).sum()):
        grads = torch.autograd.grad(pick(p.run(impl)), leaves, materialize_grads=True)
        p64 = type(p)(*exact, p.cu, p.options)
        right = torch.autograd.grad(pick(p64.run("reference")), exact, materialize_grads=True)
        # The sum of all outputs hardly depends on the keys: compare with the largest gradient.
        scale = max(r.norm().item() for r in right)
        for grad, r in zip(grads, right, strict=True):
            assert (grad.double() - r).norm().item() <= 2e-6 * scale


def test_keys_nobody_sees_get_zeros(impl):
    p = problem([2], heads=2, key_lengths=[6], window=(1, 0), key_scores="sum")
    _, scores, _, dk, dv = p.run_with_gradients(impl)
    assert not dk[:3].any() and not dv[:3].any() and not scores[:3].any()
    assert dv[3:].all() and scores[3:].all()


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_nothing_at_all(impl, lengths):
    assert all(t.numel() == 0 for t in problem(lengths, key_scores="sum").run_with_gradients(impl))
