# SPDX-License-Identifier: Apache-2.0
"""MorphTEEmbedding as a drop-in for nn.Embedding, and the checkpoints of the released code."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_kernels as lk
from lean_kernels.nn import MorphTEEmbedding

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"
MAP = SHARED / "morphte-iwslt14deen-morphemes.json"


def layer(words=50, dim=60, order=3, rank=3, seed=0, **options):
    torch.manual_seed(seed)
    morphemes = torch.randint(0, 20, (words, order))
    morphemes[0, 0] = 20  # a morpheme of its own
    return MorphTEEmbedding(morphemes, dim, order=order, rank=rank, **options)


def table(embedding):
    """Equation 8 of the paper, word by word."""
    rows = []
    for word in embedding.morphemes.tolist():
        row = 0
        for i in range(embedding.rank):
            product = torch.ones(1, dtype=embedding.factors.dtype)
            for morpheme in word:
                product = torch.outer(product, embedding.factors[morpheme, i]).flatten()
            row = row + product
        rows.append(row[: embedding.embedding_dim])
    made = torch.stack(rows)
    return made if embedding.layer_norm is None else embedding.layer_norm(made)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_forward_and_gradients_are_those_of_the_definition(order, layer_norm):
    ours = layer(order=order, layer_norm=layer_norm, padding_idx=3, dtype=torch.float64)
    ids = torch.tensor([[3, 0, 49], [7, 7, 3]])
    expected = F.embedding(ids, table(ours), padding_idx=3)
    torch.testing.assert_close(ours(ids), expected)
    grad = torch.randn_like(expected)
    learned = list(ours.parameters())
    for a, b in zip(
        torch.autograd.grad(ours(ids), learned, grad),
        torch.autograd.grad(expected, learned, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_arguments_of_nn_embedding():
    assert layer(padding_idx=-1).padding_idx == 49
    for argument in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            layer(**argument)
    with pytest.raises(ValueError, match="padding_idx must lie in"):
        layer(padding_idx=50)


def test_what_does_not_fit_is_refused():
    good = torch.zeros(5, 3, dtype=torch.long)
    for arguments, message in (
        ((good, 8), r"order must be 2, 3 or 4 and rank at least 1, got 5"),
        ((good[:, :2], 8), r"morphemes must be integers \[V, 3\]"),
        ((good.float(), 8), r"morphemes must be integers"),
        ((good - 1, 8), r"morphemes must lie in \[0, 0\), got -1"),
    ):
        order = 5 if "got 5" in message else 3
        with pytest.raises(ValueError, match=message):
            MorphTEEmbedding(*arguments, order=order)
    with pytest.raises(ValueError, match=r"morphemes must lie in \[0, 2\), got 2 to 2"):
        MorphTEEmbedding(good + 2, 8, num_morphemes=2)
    with pytest.raises(ValueError, match="factor_size"):
        MorphTEEmbedding(good, 9, factor_size=2)


def test_rows_start_as_those_of_nn_embedding_do():
    ours = layer(words=400, dim=512, rank=10, layer_norm=False)
    assert 0.8 < float(ours(torch.arange(400)).detach().var()) < 1.2


def test_the_padding_row_starts_at_zero_where_it_is_its_own():
    assert (layer(padding_idx=0, layer_norm=False)(torch.tensor(0)) == 0).all()
    assert (layer(padding_idx=0)(torch.tensor([0])) == 0).all()  # the LayerNorm's bias
    assert (layer(padding_idx=1, layer_norm=False)(torch.tensor(1)) != 0).any()


def test_sizes():
    ours = layer(words=41280, dim=512, rank=10, num_morphemes=10818, layer_norm=False)
    assert ours.factors.shape == (10818, 10, 8)
    assert ours.nbytes == 4 * (10818 * 10 * 8 + 41280 * 3)
    assert math.isclose(ours.compression, 21.37, abs_tol=0.01)
    assert "compression=21.4x, order=3, rank=10, num_morphemes=10818" in repr(ours)


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.zeros(0, dtype=torch.int32)])
def test_any_shape_of_ids(ids):
    assert layer()(ids).shape == (*ids.shape, 60)


def test_copies_state_and_dtypes():
    ours = layer(padding_idx=2)
    ids = torch.arange(50).view(5, 10)
    expected = ours(ids)
    assert torch.equal(copy.deepcopy(ours)(ids), expected)
    other = layer(seed=1)
    assert not torch.equal(other(ids), expected)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(ids), expected)
    assert set(ours.state_dict()) == {
        "factors", "morphemes", "layer_norm.weight", "layer_norm.bias",
    }  # fmt: skip
    half = ours.bfloat16()
    assert half(ids).dtype == torch.bfloat16 and half.morphemes.dtype == torch.int32
    torch.testing.assert_close(half(ids).float(), expected, atol=0.05, rtol=0.02)
    dense = layer(padding_idx=2).to_embedding()
    torch.testing.assert_close(dense(ids), expected)
    assert dense.padding_idx == 2


def test_a_file_with_bad_morphemes_does_not_load():
    state = layer().state_dict()
    state["morphemes"] = state["morphemes"] + 1
    with pytest.raises(RuntimeError, match=r"morphemes must lie in \[0, 21\)"):
        layer().load_state_dict(state)


def test_compile_and_export():
    ours = layer(padding_idx=2)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 8):
        ids = torch.arange(2 * length).view(2, length)
        results = []
        for run in (ours, compiled):
            y = run(ids)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(ours.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    length = torch.export.Dim("length")
    program = torch.export.export(ours, (ids,), dynamic_shapes=({1: length},))
    longer = torch.randint(0, 50, (2, 40))
    assert torch.equal(program.module()(longer), ours(longer))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tied_head(layer_norm, with_bias, monkeypatch):
    monkeypatch.setattr("lean_kernels.nn.compressed_embedding.TILE", 16)
    ours = layer(layer_norm=layer_norm, dtype=torch.float64)
    bias = nn.Parameter(torch.randn(50, dtype=torch.float64)) if with_bias else None
    head = ours.tied_head(bias)
    hidden = torch.randn(2, 4, 60, dtype=torch.float64, requires_grad=True)
    expected = F.linear(hidden, table(ours), bias)
    torch.testing.assert_close(head(hidden), expected)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), expected)
    learned = [hidden, *head.parameters()]
    assert any(p is ours.factors for p in learned)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(head(hidden), learned, grad),
        torch.autograd.grad(expected, learned, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def released(words, morphemes, dim, order, rank, size, layer_norm=True):
    generator = torch.Generator().manual_seed(0)
    state = {
        "encoder.embed_tokens.weight.0": torch.randn(rank, morphemes, size, generator=generator),
        "encoder.embed_tokens.co_matrix": torch.randint(0, morphemes, (words, order)),
    }
    if layer_norm:
        state["encoder.embed_tokens.ln.weight"] = torch.rand(dim, generator=generator)
        state["encoder.embed_tokens.ln.bias"] = torch.rand(dim, generator=generator)
    return state


@pytest.mark.parametrize("size", [4, 5])
def test_a_checkpoint_of_the_released_code(size):
    state = released(30, 12, 60, 3, 5, size)
    prefix = "encoder.embed_tokens."
    ours = MorphTEEmbedding.from_morphte_checkpoint(state, prefix=prefix, padding_idx=1)
    weight, index = state[prefix + "weight.0"], state[prefix + "co_matrix"]
    parts = [weight[:, index[:, j]] for j in range(3)]  # [rank, V, q]
    made = torch.einsum("rva,rvb,rvc->vabc", *parts).flatten(1)[:, :60]
    expected = F.layer_norm(made, [60], state[prefix + "ln.weight"], state[prefix + "ln.bias"])
    torch.testing.assert_close(ours(torch.arange(30)), expected)
    assert ours.padding_idx == 1 and ours.factors.is_contiguous()


def test_checkpoints_that_are_not_of_the_released_code():
    prefix = "encoder.embed_tokens."
    state = released(30, 12, 60, 3, 5, 4, layer_norm=False)
    with pytest.raises(ValueError, match="pass embedding_dim"):
        MorphTEEmbedding.from_morphte_checkpoint(state, prefix=prefix)
    ours = MorphTEEmbedding.from_morphte_checkpoint(state, prefix=prefix, embedding_dim=60)
    assert ours.layer_norm is None
    with pytest.raises(ValueError, match=r"there is encoder.embed_tokens.weight.0; give its"):
        MorphTEEmbedding.from_morphte_checkpoint(state)
    state[prefix + "co_matrix"] += 12
    with pytest.raises(ValueError, match=r"morphemes must lie in \[0, 12\)"):
        MorphTEEmbedding.from_morphte_checkpoint(state, prefix=prefix, embedding_dim=60)


@pytest.mark.skipif(not MAP.exists(), reason="needs a map of words to morphemes")
def test_a_real_map_of_words_to_morphemes():
    data = json.loads(MAP.read_text())
    names = ["<pad>", "[mor-PAD-1]", "[mor-PAD-2]", "[mor-UNK]", *data["mor_set_tgt"]]
    at = {name: i for i, name in enumerate(names)}
    rows = [[0, 1, 2]]
    for parts in data["word2mor_tgt"].values():
        known = [at.get(part, 3) for part in parts[:3]]
        rows.append(known + [1, 2][len(known) - 1 :])
    ours = MorphTEEmbedding(torch.tensor(rows), 512, rank=10, padding_idx=0)
    stored = len(names) * 10 * 8 + 3 * len(rows) + 2 * 512  # factors, map, norm
    assert ours.num_morphemes == len(names)
    assert ours.compression == pytest.approx(len(rows) * 512 / stored)
    ids = torch.randint(0, len(rows), (7, 64))
    ids[0] = 0
    y = ours(ids)
    assert (y[0] == 0).all() and y[1:].isfinite().all()
    wide = copy.deepcopy(ours).double()
    expected = table(wide)[ids]
    assert (y.double() - expected).norm() <= 1e-6 * expected.norm()
    y.square().sum().backward()
    assert (ours.factors.grad[0] == 0).all() and ours.factors.grad[1].abs().sum() > 0


def test_it_is_found_where_the_others_are():
    assert lk.nn.MorphTEEmbedding is MorphTEEmbedding
