# SPDX-License-Identifier: Apache-2.0
"""ragged_attention inside torch: registration, compile, export, autocast; and bad input."""

import pytest
import torch
from problems import IMPLS, needs_cpu_kernels, same_bits
from ragged import MIXED, SCORES, ascending, assert_exact, cu_seqlens, error, problem

from lean_kernels.ops import ragged_attention
from lean_kernels.ops.ragged_attention import reference

ops = torch.ops.lean_kernels


def schema_arguments(p, key_scores=0, per_head=False):
    cu_k, positions = p.options.get("cu_seqlens_k"), p.options.get("positions")
    return (
        p.cu, cu_k, positions, p.options.get("key_positions"), -1, 0.3, -1, 0, key_scores, per_head,
        False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_scores", "per_head"), [(0, False), (1, False), (2, True)])
def test_opcheck(key_scores, per_head, dtype):
    p = problem([5, 0, 9], heads=4, kv_heads=2, dtype=dtype)
    p = p.with_options(positions=ascending([5, 0, 9], 2)) if per_head else p
    layout = schema_arguments(p, key_scores, per_head)
    inputs = (p.query, p.key, p.value)
    torch.library.opcheck(ops.ragged_attention.default, (*inputs, *layout))
    out, lse, scores = ops.ragged_attention(*inputs, *layout)
    grads = (torch.randn_like(out), scores if key_scores else None)
    torch.library.opcheck(ops.ragged_attention_grad.default, (*grads, *inputs, out, lse, *layout))


@needs_cpu_kernels
def test_the_log_of_the_sum_of_exponentials():
    p = problem([70, 3, 1], heads=2, dim=8, key_lengths=[9, 200, 0])
    layout = schema_arguments(p)
    lse = ops.ragged_attention(p.query, p.key, p.value, *layout)[1]
    right = reference.forward(
        *(t.double() for t in (p.query, p.key, p.value)), *layout[:4], *layout[5:8], False, False,
        False, False,
    )[1]  # fmt: skip
    seen = right > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert error(lse[seen], right[seen]) < 1e-6


def check_compiled(backend, impl, options):
    def function(query, key, value, cu):
        results = ragged_attention(query * 2, key, value, cu, causal=True, impl=impl, **options)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r.tanh() for r in results)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([4, 3], [7, 0, 9], [20, 1, 3, 5]):
        p = problem(lengths, heads=4, kv_heads=2)
        runs = []
        for run in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (p.query, p.key, p.value)]
            results = run(*leaves, p.cu)
            generator = torch.Generator().manual_seed(0)
            upstream = [torch.randn(r.shape, generator=generator) for r in results]
            runs.append((*results, *torch.autograd.grad(results, leaves, upstream)))
        for eager, ours in zip(*runs, strict=True):
            torch.testing.assert_close(ours, eager)
        with torch.no_grad():
            arguments = (p.query, p.key, p.value, p.cu)
            torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("options", SCORES[::4], ids=str)
def test_compile_with_dynamic_lengths(options, impl):
    if impl == "reference":
        pytest.skip("loops over the values of cu_seqlens")
    check_compiled("aot_eager", impl, options)


@needs_cpu_kernels
def test_inductor_with_dynamic_lengths():
    check_compiled("inductor", None, {"key_scores": "mean"})


@needs_cpu_kernels
def test_export_with_dynamic_lengths():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, cu):
            return ragged_attention(query, key, value, cu, key_scores="sum")

    p = problem([4, 3])
    tokens, ends = torch.export.Dim("tokens"), torch.export.Dim("ends")
    exported = torch.export.export(
        Model(),
        (p.query, p.key, p.value, p.cu),
        dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}, {0: ends}),
    ).module()
    for lengths in ([2, 9], [5, 0, 1]):
        p = problem(lengths)
        expected = ragged_attention(p.query, p.key, p.value, p.cu, key_scores="sum")
        torch.testing.assert_close(exported(p.query, p.key, p.value, p.cu), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, impl):
    p = problem([9, 20])
    leaves = [t.requires_grad_() for t in (p.query, p.key, p.value)]
    with torch.autocast("cpu", dtype=dtype):
        out, scores = p.with_options(key_scores="sum").run(impl)
    assert (out.dtype, scores.dtype) == (dtype, torch.float32)
    assert error(out, p.double.run("reference")[0]) < 0.02
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


@needs_cpu_kernels
def test_the_best_impl_on_cpu_is_the_compiled_one():
    p = problem([200, 30], dim=64)
    assert same_bits(p.run()[0], p.run("cpu")[0])
    assert not same_bits(p.run()[0], p.run("reference")[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_mode_and_no_grad_agree(impl):
    p = problem(MIXED, key_scores="sum")
    with torch.inference_mode():
        first = p.run(impl)
    p.value.requires_grad_()
    with torch.no_grad():
        assert all(same_bits(*pair) for pair in zip(p.run(impl), first, strict=True))


def test_meta_tensors_give_shapes():
    p = problem([5, 9], heads=4, kv_heads=2, dtype=torch.bfloat16)
    inputs = [t.to("meta") for t in (p.query, p.key, p.value, p.cu)]
    out, scores = ragged_attention(*inputs, key_scores="sum", key_scores_per_head=True)
    assert (out.shape, out.dtype) == (p.query.shape, torch.bfloat16)
    assert (scores.shape, scores.dtype) == ((14, 4), torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient_gets_one(impl):
    p = problem([9, 4], key_scores="sum")
    p.value.requires_grad_()
    out, scores = p.run(impl)
    assert out.requires_grad
    (grad,) = torch.autograd.grad(out.sum() + scores.sum(), [p.value])
    p64 = p.double
    p64.value = p64.value.detach().requires_grad_()
    assert_exact([grad], torch.autograd.grad(p64.run("reference")[0].sum(), [p64.value]), slack=3)


# ---- bad input ----------------------------------------------------------------------------------


def edited(edits):
    p = problem([3, 0, 4], heads=4, kv_heads=2)
    given = {"query": p.query, "key": p.key, "value": p.value, "cu_seqlens": p.cu}
    return given | {
        name: edit(given[name]) if callable(edit) else edit for name, edit in edits.items()
    }


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"query": lambda q: q[0]}, r"query must be \[T, H, D\], key and value \[T_k, H_kv, D\]"),
        ({"value": lambda v: v[:, :, :-1]}, r"query must be \[T, H, D\], key and value"),
        ({"query": lambda q: q[:, :3]}, "H be a multiple of H_kv"),
        ({"query": lambda q: q[:, :, :8]}, "head dimensions must agree"),
        ({"query": lambda q: q[:, :0]}, "H be a multiple of H_kv"),
        ({"query": lambda q: q.double()}, "must share one of .* got torch.float64, torch.float32"),
        ({"value": lambda q: q.half()}, "got torch.float32, torch.float32, torch.float16"),
        ({"query": lambda q: q[:-1]}, "6 queries but 7 keys: pass cu_seqlens_k"),
        ({"cu_seqlens": lambda c: c.long()}, r"cu_seqlens must be int32 \[B \+ 1\], got .*int64"),
        ({"cu_seqlens": lambda c: c[None]}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens": lambda c: c[:0]}, r"cu_seqlens must be int32 \[B \+ 1\]"),
        ({"cu_seqlens_k": i32(0, 7)}, r"cu_seqlens_k must be int32 \[4\], got .* \[2\]"),
        ({"positions": i32(1, 2)}, r"positions must be int32 \[7\]"),
        ({"positions": torch.arange(7)}, r"positions must be int32 \[7\], got torch.int64"),
        ({"key_positions": torch.arange(7).int()}, "key_positions goes with positions and"),
        ({"key": lambda k: k.to("meta")}, "key is on meta, query on cpu; move"),
        ({"cu_seqlens": lambda c: c.to("meta")}, "cu_seqlens is on meta, query on cpu; move"),
        ({"key_scores": "max"}, "unknown key_scores 'max'; expected one of"),
        ({"key_scores_per_head": True}, "need key_scores='sum' or 'mean'"),
        ({"exclude_diagonal": True}, "need key_scores='sum' or 'mean'"),
        ({"window": (-2, 3)}, "window must be"),
        ({"impl": "cuda"}, "unknown impl 'cuda'; expected one of 'reference', 'cpu', 'triton'"),
    ],
)
def test_the_public_function_says_what_is_wrong(edits, message):
    with pytest.raises(ValueError, match=message):
        ragged_attention(**edited(edits))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (i32(1, 3, 7), "cu_seqlens must rise from 0 to the number of tokens, 7; got first 1"),
        (i32(0, 5, 3, 7), "cu_seqlens must rise .* smallest step -2"),
        (i32(0, 3, 6), "cu_seqlens must rise .* last 6"),
        (i32(0, 3, 8), "cu_seqlens must rise .* last 8"),
        (i32(0), "cu_seqlens must rise .* last 0"),
        (i32(0, 2**31 - 1, -(2**31), 7), "cu_seqlens must rise"),
        (i32(0, -(2**31), 7), "cu_seqlens must rise"),
    ],
    ids=str,
)
def test_bad_values_of_cu_seqlens(cu, message, impl):
    p = problem([7], heads=2)
    for p.cu in (cu, torch.stack((cu, cu), 1)[:, 0]):
        with pytest.raises((ValueError, RuntimeError), match=message):
            p.run(impl)
    keys = problem([7] + [0] * (len(cu) - 2), heads=2, cu_seqlens_k=cu)
    if len(cu) > 1:
        message = message.replace("cu_seqlens must", "cu_seqlens_k must")
        with pytest.raises((ValueError, RuntimeError), match=message):
            keys.run(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_must_ascend(impl):
    p = problem([4, 3], heads=2, causal=True, positions=i32(0, 1, 2, 3, 0, 5, 5))
    p.run(impl)
    for bad in (i32(0, 2, 1, 3, 0, 5, 5), i32(0, 1, 2, 3, 0, 5, 4)):
        with pytest.raises((ValueError, RuntimeError), match="positions must ascend within each"):
            p.with_options(positions=bad).run(impl)


@needs_cpu_kernels
def test_the_raw_op_says_what_is_wrong():
    """Nothing that reaches the kernels may make them leave their memory."""
    p = problem([3, 4], heads=4, kv_heads=2)
    names = ("query", "key", "value", "cu", "cu_k", "positions", "key_positions")
    right = dict(zip(names, (p.query, p.key, p.value, p.cu, None, None, None), strict=True))
    numbers = (-1, 0.3, -1, -1, 1, False, False)
    ops.ragged_attention(*right.values(), *numbers)
    for edits in (
        {"query": p.query[0]},
        {"query": p.query[:-1]},
        {"query": p.query[:, :3]},
        {"query": p.query[..., :8]},
        {"query": p.query.double()},
        {"query": p.query.int(), "key": p.key.int(), "value": p.value.int()},
        {"value": p.value[:, :1]},
        {"value": p.value.half()},
        {"cu": p.cu.long()},
        {"cu": p.cu[:0]},
        {"cu": p.cu[None]},
        {"cu_k": p.cu[:-1]},
        {"cu_k": cu_seqlens([3, 5])},
        {"positions": i32(1, 2, 3)},
        {"key_positions": torch.arange(7).int()},
        {"positions": torch.arange(7).int(), "cu_k": p.cu},
    ):
        with pytest.raises(RuntimeError, match="ragged_attention: "):
            ops.ragged_attention(*(right | edits).values(), *numbers)
    with pytest.raises(RuntimeError, match="key_scores must be a code"):
        ops.ragged_attention(*right.values(), -1, 0.3, -1, -1, 3, False, False)
    out, lse, scores = ops.ragged_attention(*right.values(), *numbers)
    for grads in (
        (out[:-1], scores),
        (out.double(), scores),
        (out, scores[:-1]),
        (out, scores.double()),
        (out, scores[:, None]),
    ):
        with pytest.raises(RuntimeError, match=r"ragged_attention: grad_(out|scores) must"):
            ops.ragged_attention_grad(*grads, p.query, p.key, p.value, out, lse, p.cu, None, None,
                                      None, *numbers)  # fmt: skip
