# SPDX-License-Identifier: Apache-2.0
"""NGramEmbeddingBag against the nn.EmbeddingBag it replaces."""

import copy

import pytest
import torch
from torch import nn

import lean_kernels as lk

IDS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9])
OFFSETS = torch.tensor([0, 4, 4])


def pair(**options):
    torch.manual_seed(0)
    theirs = nn.EmbeddingBag(10, 6, **options)
    return theirs, lk.nn.NGramEmbeddingBag.from_embedding_bag(copy.deepcopy(theirs))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"sparse": True}, {"include_last_offset": True}, {"max_norm": 1.0}],
    ids=str,
)
def test_it_does_what_it_replaces(mode, options):
    theirs, ours = pair(mode=mode, **options)
    offsets = (
        torch.cat([OFFSETS, torch.tensor([8])]) if "include_last_offset" in options else OFFSETS
    )
    results = []
    for layer in (theirs, ours):
        y = layer(IDS, offsets)
        y.square().sum().backward()
        grad = layer.weight.grad
        assert grad.is_sparse == ("sparse" in options)
        results.append((y, grad.to_dense(), layer.weight))
        if "include_last_offset" not in options:
            layer.zero_grad()
            assert layer(IDS.view(2, 4)).shape == (2, 6)
            assert layer(IDS.int().view(2, 4)).shape == (2, 6)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)


def test_weights_state_and_repr():
    theirs, ours = pair(mode="sum")
    weights = torch.randn(8)
    torch.testing.assert_close(
        ours(IDS, OFFSETS, per_sample_weights=weights),
        theirs(IDS, OFFSETS, per_sample_weights=weights),
    )
    torch.testing.assert_close(
        ours(IDS.view(2, 4), None, weights.view(2, 4)),
        theirs(IDS.view(2, 4), None, weights.view(2, 4)),
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    again = copy.deepcopy(ours)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again(IDS, OFFSETS), ours(IDS, OFFSETS))
    assert "10, 6, mode='sum'" in repr(ours)


def test_int8_rows():
    torch.manual_seed(0)
    layer = lk.nn.NGramEmbeddingBag(10, 60, padding_idx=-1)
    small = layer.to_int8()
    assert small.weight.dtype == torch.int8 and small.padding_idx == 9
    expected = layer(IDS, OFFSETS)
    error = (small(IDS, OFFSETS) - expected).norm() / expected.norm()
    assert 0 < error < 1e-2
    assert not any(p.requires_grad for p in small.parameters())
    fresh = layer.to_int8()
    fresh.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match="int8 already"):
        small.to_int8()
    small.half()  # scales too, which only costs digits
    assert small(IDS, OFFSETS).dtype == torch.float32
    layer.weight.data[3, 3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.to_int8()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "max"}, "mode 'max' is not supported"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True is not supported"),
        ({"padding_idx": 10}, r"padding_idx must lie in \[-10, 10\)"),
        ({"num_embeddings": 0}, "must be positive"),
    ],
)
def test_what_is_not_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lk.nn.NGramEmbeddingBag(**{"num_embeddings": 10, "embedding_dim": 6} | options)
    if "mode" in options or "scale_grad_by_freq" in options:
        with pytest.raises(ValueError, match=message):
            pair(**{"mode": "mean"} | options)


def test_inputs_that_do_not_fit_are_refused():
    layer = lk.nn.NGramEmbeddingBag(10, 6)
    for arguments in ((IDS,), (IDS.view(2, 4), OFFSETS), (IDS.view(2, 2, 2),)):
        with pytest.raises(ValueError, match=r"expected input \[B, L\] without offsets"):
            layer(*arguments)
    with pytest.raises(ValueError, match="per_sample_weights must be"):
        layer(IDS, OFFSETS, torch.ones(7))
    with pytest.raises(TypeError, match=r"replaces nn\.EmbeddingBag"):
        lk.nn.NGramEmbeddingBag.from_embedding_bag(nn.Embedding(3, 4))


def test_compile_and_export():
    torch.compiler.reset()
    for options in ({}, {"include_last_offset": True}, {"sparse": False, "padding_idx": 4}):
        layer = lk.nn.NGramEmbeddingBag(10, 6, **options)
        offsets = torch.cat([OFFSETS, torch.tensor([8])]) if len(options) == 1 else OFFSETS
        expected = layer(IDS, offsets)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, offsets), expected)
        count = torch.export.Dim("count", min=2)
        exported = torch.export.export(
            layer, (IDS, offsets), dynamic_shapes=({0: count}, None), strict=True
        )
        torch.testing.assert_close(exported.module()(IDS, offsets), expected)
