# SPDX-License-Identifier: Apache-2.0
"""TensorTrainEmbedding, and the SVDs that make one."""

import copy
import math

import pytest
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels.nn.tensor_train_embedding import near_factors, tt_svd


def test_near_factors():
    assert near_factors(512, 3) == (8, 8, 8) and near_factors(768, 2) == (24, 32)
    for size in (1, 2, 7, 97, 768, 30_522, 41_280, 128_256):
        for count in (2, 3, 4):
            factors = near_factors(size, count)
            assert factors == tuple(sorted(factors)) and len(factors) == count
            assert size <= math.prod(factors) <= 1.3 * size + 8


@pytest.mark.parametrize("order", [2, 3, 4])
def test_full_rank_is_exact(order):
    torch.manual_seed(0)
    table = nn.Embedding(50, 13, padding_idx=3)
    layer = lk.nn.TensorTrainEmbedding.from_embedding(table, 10**6, order=order)
    assert layer.padding_idx == 3 and layer.cores[0].requires_grad
    torch.testing.assert_close(layer.to_embedding().weight, table.weight)
    assert layer.to_embedding().padding_idx == 3


def test_svds_come_near_the_best():
    torch.manual_seed(0)
    train = lk.nn.TensorTrainEmbedding(60, 16, rank=3)
    table = train.to_embedding().weight.detach()
    again = lk.nn.TensorTrainEmbedding.from_embedding(nn.Embedding.from_pretrained(table), 3)
    torch.testing.assert_close(again.to_embedding().weight, table)  # rank 3 is all there is
    noisy = table + 0.05 * torch.randn_like(table)
    errors = []
    for rank in (1, 2, 3, 6):
        near = lk.nn.TensorTrainEmbedding.from_embedding(nn.Embedding.from_pretrained(noisy), rank)
        errors.append(float((near.to_embedding().weight.detach() - noisy).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] <= 2**0.5 * float((table - noisy).norm())
    assert not near.cores[0].requires_grad  # as the frozen table


def test_two_cores_are_the_truncated_svd():
    torch.manual_seed(0)
    table = torch.randn(30, 8)
    cores = tt_svd(table, 5, row_factors=(30, 1), col_factors=(1, 8))
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    best = left[:, :5] * values[:5] @ right[:5]
    torch.testing.assert_close(cores[0].view(30, 5) @ cores[1].view(5, 8), best)


def test_the_constructor_fills_a_table_like_that_of_nn_embedding():
    torch.manual_seed(0)
    layer = lk.nn.TensorTrainEmbedding(5000, 128, rank=16, order=4)
    weight = layer.to_embedding().weight
    assert weight.shape == (5000, 128) and 0.7 < float(weight.std()) < 1.4
    sizes = zip(
        layer.row_factors, layer.ranks[:-1], layer.col_factors, layer.ranks[1:], strict=True
    )
    assert layer.nbytes == 4 * sum(math.prod(size) for size in sizes)
    assert "ranks=[14, 16, 16]" in repr(layer)  # 7 x 2 is all the first cut has


def test_training_state_and_head():
    torch.manual_seed(0)
    layer = lk.nn.TensorTrainEmbedding(50, 12, rank=4, padding_idx=-1, scale_grad_by_freq=True)
    dense = layer.to_embedding()
    ids = torch.tensor([[1, 1, 49], [7, 3, 1]])
    for module in (layer, dense):
        module(ids).square().sum().backward()
    table = layer.rows(0, 50)
    expected = torch.autograd.grad(table, list(layer.cores), dense.weight.grad)
    for core, grad in zip(layer.cores, expected, strict=True):
        torch.testing.assert_close(core.grad, grad)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(ids), layer(ids))
    hidden = torch.randn(3, 12)
    torch.testing.assert_close(layer.tied_head()(hidden), hidden @ table.t())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 5}, "order must be 2, 3 or 4, got 5"),
        ({"rank": 0}, "rank must be one positive number, or 2 for 3 cores"),
        ({"rank": (2, 3, 4)}, "rank must be one positive number"),
        ({"row_factors": (2, 3, 4)}, "row_factors must be 3 positive numbers with a product of at"),
        ({"col_factors": (12,)}, "col_factors must be 3 positive numbers"),
        ({"sparse": True}, "sparse=True is not supported"),
        ({"max_norm": 1.0}, "max_norm"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lk.nn.TensorTrainEmbedding(50, 12, **{"rank": 4} | options)


def test_compile_and_export():
    torch.compiler.reset()
    layer = lk.nn.TensorTrainEmbedding(50, 12, rank=4)
    ids = torch.tensor([[1, 1, 49], [7, 3, 1]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), layer(ids))
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(layer, (ids,), dynamic_shapes=({0: rows},), strict=True)
    more = torch.cat([ids, ids + 1]).clamp(max=49)
    torch.testing.assert_close(exported.module()(more), layer(more))
