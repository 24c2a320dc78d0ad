# SPDX-License-Identifier: Apache-2.0
"""tensor_product_embedding and its gradients against the definition; what it refuses."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, IMPLS, assert_accurate, error, needs_cpu_kernels, same_bits
from torch import Tensor

from lean_kernels.ops import tensor_product_embedding
from lean_kernels.ops._row_norm import RowNorm

# (order, q, D, rank): of every loop nest, whatever the vectors' length, and their edges. The last
# three use few of the digits that they have.
SHAPES = [
    *((2, 4, 13, 3), (2, 8, 64, 5), (2, 28, 768, 10), (3, 3, 27, 9), (3, 4, 61, 33)),
    *((3, 8, 512, 10), (3, 8, 500, 17), (3, 10, 1000, 8), (4, 2, 11, 1), (4, 4, 200, 7)),
    *((4, 6, 768, 8), (2, 1, 1, 4), (3, 17, 40, 3), (4, 30, 31, 2), (2, 70, 66, 2)),
]
FEW_SHAPES = [(2, 5, 23, 3), (3, 8, 512, 10), (4, 3, 70, 2)]


@dataclass(frozen=True)
class Problem:
    ids: Tensor
    morphemes: Tensor
    factors: Tensor
    features: int
    tables: tuple[Tensor, ...]  # added
    table_ids: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor
    norm: str | None = None
    padding_idx: int | None = None

    @property
    def learned(self) -> tuple[Tensor, ...]:
        norms = (self.weight, self.bias) if self.norm else ()
        return self.factors, *self.tables, *norms

    def with_learned(self, learned) -> "Problem":
        factors, *rest = learned
        count = len(self.tables)
        norms = rest[count:] if self.norm else (self.weight, self.bias)
        return replace(
            self, factors=factors, tables=tuple(rest[:count]), weight=norms[0], bias=norms[1]
        )

    def to(self, dtype) -> "Problem":
        return self.with_learned([t.detach().to(dtype) for t in self.learned])

    def run(self, impl=None) -> Tensor:
        return tensor_product_embedding(
            self.ids,
            self.morphemes,
            self.factors,
            embedding_dim=self.features,
            added=tuple(zip(self.table_ids, self.tables, strict=True)),
            norm=RowNorm(self.norm, self.weight, self.bias, 1e-5) if self.norm else None,
            padding_idx=self.padding_idx,
            impl=impl,
        )

    def dense(self) -> Tensor:
        """The definition, by einsum, in the factors' dtype."""
        letters = "abcd"[: self.morphemes.shape[1]]
        terms = ",".join("vr" + letter for letter in letters)
        parts = [self.factors[m.long()] for m in self.morphemes.unbind(1)]
        table = torch.einsum(f"{terms}->v{letters}", *parts).flatten(1)[:, : self.features]
        x = F.embedding(self.ids, table)
        for ids, added in zip(self.table_ids, self.tables, strict=True):
            x = x + F.embedding(ids, added)
        if self.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)
        elif self.norm:
            x = F.rms_norm(x, x.shape[-1:], self.weight, 1e-5) + self.bias
        if self.padding_idx is not None:
            x = torch.where((self.ids == self.padding_idx)[..., None], x.detach(), x)
        return x

    def blown_up(self) -> float:
        """How much smaller than usual the smallest row is that is normalised."""
        rows = replace(self.to(torch.float64), norm=None).dense().detach().flatten(0, -2)
        if self.norm == "layer":
            rows = rows - rows.mean(1, keepdim=True)
        sizes = rows.norm(dim=1)
        return (sizes.median() / sizes.min()).item()

    def grads(self, run, upstream) -> tuple[Tensor, ...]:
        p = self.with_learned([t.detach().clone().requires_grad_() for t in self.learned])
        y = run(p)
        return y, *torch.autograd.grad(y, p.learned, upstream.to(y.dtype))


def problem(shape, ids=60, dtype=torch.float32, added=0, norm=None, padding_idx=None, words=50):
    order, size, features, rank = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    def pick(most, *sizes):
        return torch.randint(0, most, sizes, generator=generator)

    chosen = pick(words, ids) if isinstance(ids, int) else ids
    return Problem(
        chosen,
        pick(40, words, order).int(),
        draw(40, rank, size),
        features,
        tuple(draw(5, features) for _ in range(added)),
        tuple(pick(5, *chosen.shape) for _ in range(added)),
        draw(features),
        draw(features),
        norm,
        padding_idx,
    )


def upstream(p: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*p.ids.shape, p.features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, dtype, impl):
    for ids, added, norm in ((1, 0, None), (5, 1, "layer"), (60, 2, "rms"), (60, 0, "layer")):
        if shape[2] == 1 and norm:
            continue  # a norm of one number leaves nothing to compare
        p = problem(shape, ids, dtype, added, norm)
        with torch.no_grad():
            y = p.run(impl)
        assert y.dtype == dtype and y.is_contiguous()
        assert_accurate(y, p.to(torch.float64).dense(), p.dense())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_the_definition(shape, dtype, impl):
    for ids, added, norm in ((1, 1, None), (60, 2, "layer"), (60, 0, "rms"), (300, 0, None)):
        if shape[2] == 1 and norm:
            continue
        p = problem(shape, ids, dtype, added, norm, padding_idx=3)
        grad = upstream(p).to(dtype)
        ours = p.grads(lambda q: q.run(impl), grad)
        right = p.to(torch.float64).grads(Problem.dense, grad)
        # A row of small norm blows up its terms' rounding, in the reference as in any other way.
        plain = p.grads((lambda q: q.run("reference")) if norm else Problem.dense, grad)
        rounding = torch.finfo(torch.float32).eps * p.blown_up() if norm else 0
        for a, b, c in zip(ours[1:], right[1:], plain[1:], strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            limit = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)
            if dtype == torch.float32:
                limit = max(limit, rounding)
            assert error(a, b) <= max(2 * error(c, b), limit)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_gradcheck(shape, impl):
    order, size, _, rank = shape
    p = problem((order, min(size, 4), min(size, 4) ** order - 1, min(rank, 3)), 6, torch.float64)
    p = replace(p, morphemes=p.morphemes % 5, ids=p.ids % 6)
    for added, norm in ((0, None), (1, "layer"), (2, "rms")):
        q = problem((order, p.factors.shape[2], p.features, 1), 6, torch.float64, added, norm)
        q = replace(q, ids=p.ids, morphemes=p.morphemes, factors=p.factors[:5])
        leaves = [t.clone().requires_grad_() for t in q.learned]
        assert torch.autograd.gradcheck(lambda *t, q=q: q.with_learned(t).run(impl), leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("added", [0, 1])
def test_an_id_that_fills_the_batch(impl, added):
    """More than a piece and a chunk, beside ids that occur once."""
    ids = torch.cat([torch.full((1500,), 7), torch.arange(700), torch.full((200,), 7)])
    p = problem((3, 4, 50, 3), ids, added=added, norm="layer", words=700)
    ours = p.grads(lambda q: q.run(impl), upstream(p))
    right = p.to(torch.float64).grads(Problem.dense, upstream(p))
    plain = p.grads(Problem.dense, upstream(p))
    for a, b, c in zip(ours, right, plain, strict=True):
        assert error(a, b) <= max(2 * error(c, b), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_of_the_batch_is_padding(impl):
    p = problem((3, 3, 20, 2), torch.full((40,), 3), added=1, norm="layer", padding_idx=3)
    for grad in p.grads(lambda q: q.run(impl), upstream(p))[1:]:
        assert (grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_shapes_and_index_types(impl):
    p = problem((3, 4, 50, 3), torch.arange(48).view(2, 4, 6), added=1, norm="layer")
    expected = p.dense()
    for change in (
        {"morphemes": p.morphemes.long()},
        {"morphemes": p.morphemes.short()},
        {"morphemes": p.morphemes.repeat(1, 2)[:, :3]},
        {"ids": p.ids.int()},
        {"ids": p.ids.transpose(0, 2).contiguous().transpose(0, 2)},
        {"factors": p.factors.transpose(0, 1).contiguous().transpose(0, 1)},
        {"tables": (p.tables[0].repeat(1, 2)[:, :50],)},
    ):
        torch.testing.assert_close(replace(p, **change).run(impl), expected)
    few = replace(p, table_ids=(p.table_ids[0][:1, :, :1],))
    torch.testing.assert_close(few.run(impl), replace(few, table_ids=few.table_ids).dense())
    turned = upstream(p).transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        p.grads(lambda q: q.run(impl), turned), p.grads(Problem.dense, turned), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_ids(impl):
    p = problem((3, 4, 50, 3), torch.zeros(0, 4, dtype=torch.long), added=1, norm="layer")
    y, *grads = p.grads(lambda q: q.run(impl), upstream(p))
    assert y.shape == (0, 4, 50)
    assert all((grad == 0).all() for grad in grads)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("added", [0, 2])
def test_bits_do_not_depend_on_the_run_or_the_threads(dtype, added):
    ids = torch.cat([torch.randint(0, 900, (2000,)), torch.full((800,), 7)])
    p = problem((3, 8, 512, 10), ids, dtype, added, "layer", padding_idx=5, words=900)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(p.grads(lambda q: q.run("cpu"), upstream(p)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_batch(shape, norm, dtype):
    """Not on whether its id occurs again, nor on whether the output streams past the caches."""
    p = problem(shape, 300, dtype, norm=norm)
    together = p.run("cpu")
    for i in range(0, 300, 23):
        assert same_bits(replace(p, ids=p.ids[i]).run("cpu"), together[i])
    many = replace(p, ids=p.ids.repeat(4000 // 300 * 512 // shape[2]))
    assert same_bits(many.run("cpu")[:300], together)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_streamed_rows(dtype):
    p = problem((3, 8, 512, 10), torch.arange(50).repeat(700), dtype, norm="layer")
    assert torch.equal(p.run("cpu"), replace(p, ids=torch.arange(50)).run("cpu").repeat(700, 1))


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compile_with_a_dynamic_batch(impl):
    def step(ids, morphemes, factors, weight, bias, table):
        q = replace(
            base, ids=ids, morphemes=morphemes, factors=factors, weight=weight, bias=bias,
            tables=(table,), table_ids=(ids % 5,),
        )  # fmt: skip
        return q.run(impl)

    base = problem((3, 4, 50, 3), added=1, norm="layer", padding_idx=2)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (7, 40):
        p = problem((3, 4, 50, 3), count, added=1, norm="layer", padding_idx=2)
        results = []
        for run in (step, compiled):
            leaves = [
                t.clone().requires_grad_() for t in (p.factors, p.weight, p.bias, p.tables[0])
            ]
            y = run(p.ids, p.morphemes, *leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    p = problem((3, 4, 50, 3), torch.arange(6).view(2, 3), dtype, added=1)
    ops = torch.ops.lean_kernels
    for ids0, table0, norm, weight, bias in (
        (None, None, 0, None, None),
        (p.table_ids[0], p.tables[0], 1, p.weight, p.bias),
        (None, None, 2, None, None),
    ):
        rest = p.ids, p.morphemes, p.factors
        added = ids0, table0, None, None, norm, weight
        arguments = (*rest, 50, *added, bias, 1e-5)
        torch.library.opcheck(ops.tensor_product_embedding.default, arguments)
        arguments = (upstream(p).to(dtype), *rest, *added, 1e-5, -1)
        torch.library.opcheck(ops.tensor_product_embedding_grad.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": torch.zeros(5, 2)}, r"factors must be \[M, r, q\]"),
        ({"factors": torch.zeros(5, 2, 0)}, "r and q at least 1"),
        ({"factors": torch.zeros(5, 2, 2).int()}, "factors must be"),
        ({"morphemes": torch.zeros(4, 5).long()}, r"morphemes must be \[V, n\] with n from 2 to 4"),
        ({"morphemes": torch.zeros(4, 3)}, "morphemes must be int16, int32 or int64"),
        ({"embedding_dim": 9}, r"embedding_dim must lie in \[1, q\^n = 2\^3 = 8\], got 9"),
        ({"embedding_dim": 0}, "embedding_dim must lie in"),
        ({"ids": torch.zeros(3)}, "ids must be int32 or int64"),
        ({"morphemes": torch.zeros(4, 3, device="meta").long()}, "morphemes is on meta"),
        ({"ids": torch.zeros(3, device="meta").long()}, "ids are on meta"),
        ({"norm": "layer"}, "norm must be None or RowNorm"),
        ({"norm": RowNorm("layer", torch.ones(7))}, r"norm weight must be \[8\]"),
        ({"added": ((torch.zeros(2).long(), torch.zeros(4, 8)),)}, "added ids must broadcast"),
        (
            {"added": ((torch.zeros(3).long(), torch.zeros(4, 7)),)},
            r"float32 \[\*, 8",
        ),
        ({"impl": "fast"}, "unknown impl 'fast'; expected one of 'reference', 'cpu', 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "ids": torch.zeros(3).long(),
        "morphemes": torch.zeros(4, 3).long(),
        "factors": torch.zeros(5, 2, 2),
        "embedding_dim": 8,
    } | change
    with pytest.raises(ValueError, match=message):
        tensor_product_embedding(**arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("bad", [-1, 2**31 - 1, -(2**63)])
def test_indices_out_of_bounds_are_refused(impl, count, bad):
    p = problem((3, 2, 8, 2), torch.arange(count) % 50, added=1)
    refused = pytest.raises((IndexError, RuntimeError), match=r"must lie in \[0, ")
    ids = p.ids.clone()
    ids[1] = bad
    with refused:
        replace(p, ids=ids).run(impl)
    with refused:
        replace(p, table_ids=(ids,)).run(impl)
    morphemes = p.morphemes.long()
    morphemes[1, 2] = bad
    broken = replace(p, morphemes=morphemes)
    with refused:
        broken.run(impl)
    grad = torch.ops.lean_kernels.tensor_product_embedding_grad.default
    with refused:
        grad(upstream(p).float(), p.ids, morphemes, p.factors, *(None,) * 4, 0, None, 0.0, -1)


@needs_cpu_kernels
def test_the_op_itself_refuses_what_does_not_fit():
    op = torch.ops.lean_kernels.tensor_product_embedding.default
    ids, morphemes, factors = torch.zeros(3).long(), torch.zeros(4, 3).int(), torch.zeros(5, 2, 2)
    none = (None,) * 4
    for arguments, message in (
        ((ids, morphemes[:, :1], factors, 2, *none), "n from 2 to 4"),
        ((ids, morphemes.float(), factors, 2, *none), "int16, int32 or int64"),
        ((ids, morphemes, factors[0], 2, *none), r"factors must be \[M, r, q\]"),
        ((ids, morphemes, factors, 9, *none), "embedding_dim must lie in"),
        ((ids.float(), morphemes, factors, 8, *none), "ids must be int32 or int64"),
        ((ids, morphemes, factors, 8, ids, None, None, None), "come together"),
        ((ids, morphemes, factors, 8, ids[:2], torch.zeros(4, 8), None, None), "shape of ids"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 0, None, None, 0.0)
