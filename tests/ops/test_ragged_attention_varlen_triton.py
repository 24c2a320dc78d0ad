# SPDX-License-Identifier: Apache-2.0
"""What ragged_attention's Triton launcher leaves to torch's varlen_attn, and what it then mends."""

import pytest
import torch
from interpreted import (  # noqa: F401
    DEVICE,
    guarded_empty,
    on_gpu,
    quick_device_functions,
    skip_where_nothing_runs,
)

skip_where_nothing_runs()

from ragged_triton import (  # noqa: E402, F401
    Problem,
    bounds,
    check,
    error,
    take_path,
)

from lean_kernels.ops.ragged_attention import reference, triton_call, triton_varlen  # noqa: E402


class Varlen:
    """In place of torch.nn.attention.varlen, with its habits and none of its needs."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(triton_varlen, "_VARLEN_FROM", 64)
        monkeypatch.setattr(triton_varlen, "_runs_varlen", lambda device: True)
        monkeypatch.setattr(triton_varlen, "_varlen_attn", lambda: (self, "lse", True))

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
    assert triton_varlen.fits(call_of(Problem([70, 6, 0], **HALF)), 70)
    problem = Problem([70, 6, 0], **(HALF | options))
    assert not triton_varlen.fits(call_of(problem), problem.longest)


def call_of(problem):
    return triton_call.call_of(*problem.qkv, *problem.layout)


def test_misaligned_views_are_not_given_to_torch(monkeypatch):
    Varlen(monkeypatch)
    problem = Problem([70], **HALF)
    wide = torch.zeros(70, 2, 9, dtype=torch.float16, device=DEVICE)
    for view in (wide[..., 1:], wide[..., :8]):
        problem.qkv[1] = view
        assert not triton_varlen.fits(call_of(problem), 70)


def test_torch_here_has_what_the_dispatch_calls():
    kernel, request, _ = triton_varlen._varlen_attn()
    assert callable(kernel) and request.lse


@on_gpu
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (200, 50)], ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_long_sequences_on_gpu(monkeypatch, window, kv_heads):
    left, right = window
    problem = Problem(
        [2000, 7, 0, 1100], heads=6, kv_heads=kv_heads, dim=64, dtype=torch.bfloat16,
        left=left, right=right,
    )  # fmt: skip
    assert triton_varlen.fits(call_of(problem), 2000)
    check(problem, 2e-2)
