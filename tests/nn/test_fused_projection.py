# SPDX-License-Identifier: Apache-2.0
import copy
import threading
import time

import pytest
import torch
from torch import nn

from lean_kernels.nn import BlockSparseLinear, fused_projection
from lean_kernels.nn.fused_projection import FusedProjections


def linears(outs=(32, 32, 32), bias=True, density=0.5, block_shape=(16, 16), dtype=torch.float32):
    torch.manual_seed(0)
    return [
        BlockSparseLinear.from_linear(
            nn.Linear(48, out, bias=bias, dtype=dtype), density=density, block_shape=block_shape
        )
        for out in outs
    ]


def separately(layers, x):
    return [layer(x) for layer in layers]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("outs", "block_shape", "dtype"),
    [
        ((32, 32, 32), (16, 16), torch.float32),
        ((32, 64, 16), (16, 16), torch.bfloat16),
        ((8, 24), (4, 16), torch.float64),
    ],
)
@torch.no_grad()
def test_one_product_is_each_ones_bit_for_bit(bias, outs, block_shape, dtype):
    layers = linears(outs, bias, block_shape=block_shape, dtype=dtype)
    x, fuse = torch.randn(7, 48, dtype=dtype), FusedProjections()
    expected = separately(layers, x)
    for _ in range(2):
        found = fuse(layers, x)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert fuse(layers, x[:0])[0].shape == (0, outs[0])


@torch.no_grad()
def test_it_follows_whatever_happens_to_the_parameters():
    layers, fuse, x = linears(), FusedProjections(), torch.randn(7, 48)
    other = linears(density=0.5)
    for layer in other:
        layer.weight.mul_(-2)
        layer.load_state_dict(
            {**layer.state_dict(), "col_indices": (layer.col_indices + 0)}, strict=True
        )
    steps = [
        lambda: None,
        lambda: layers[0].weight.mul_(3),
        lambda: layers[1].weight.data.zero_(),
        lambda: layers[2].bias.data.copy_(torch.ones(32)),
        lambda: layers[0].load_state_dict(other[1].state_dict()),  # in place, another pattern
        lambda: layers[1].load_state_dict(other[2].state_dict(), assign=True),
        lambda: setattr(layers[2], "weight", nn.Parameter(torch.randn_like(layers[2].weight))),
        lambda: [layer.double() for layer in layers],
        lambda: [layer.float() for layer in layers],
        lambda: layers.__setitem__(1, copy.deepcopy(layers[1])),
        lambda: layers.__setitem__(0, other[0]),
    ]
    for step in steps:
        step()
        inputs = x.to(layers[0].weight.dtype)
        expected = separately(copy.deepcopy(layers), inputs)
        found = fuse(layers, inputs)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        for layer in layers:
            layer.validate()
    assert len(fuse._entries) <= 2  # of layers that are gone nothing is left


def test_what_is_left_alone():
    x, fuse = torch.randn(3, 48), FusedProjections()
    activated, hooked, dense, moved = linears(), linears(), linears(), linears()
    activated[0].activation = "relu"
    hooked[1].register_forward_hook(lambda *args: None)
    dense[2] = dense[2].to_linear()
    moved[0].weight.data.share_memory_()
    odd = linears((32, 30, 32))
    mixed = [*linears(bias=False)[:1], *linears()[1:]]
    int8 = [linears()[0].to_int8(), *linears()[1:]]
    empty = linears()
    empty[1] = BlockSparseLinear.from_linear(
        nn.Linear(48, 32), mask=torch.zeros(2, 3), block_shape=(16, 16)
    )
    with torch.no_grad():
        for layers in (activated, hooked, dense, moved, odd, mixed, int8, empty):
            before = [layer.weight.data_ptr() for layer in layers]
            assert fuse(layers, x) is None
            assert before == [layer.weight.data_ptr() for layer in layers]
    with torch.inference_mode():
        layers = linears()
        assert fuse(layers, x) is None


@torch.no_grad()
def test_what_a_layer_does_beyond_its_product_is_done_from_then_on():
    x, fuse = torch.randn(3, 48), FusedProjections()
    hooked, activated = linears(), linears()
    assert fuse(hooked, x) is not None and fuse(activated, x) is not None
    handle = hooked[1].register_forward_hook(lambda *args: None)
    activated[0].activation = "relu"
    assert fuse(hooked, x) is None and fuse(activated, x) is None
    handle.remove()
    assert fuse(hooked, x) is not None


def test_threads_share_what_the_first_one_made(monkeypatch):
    layers, fuse, x = linears(), FusedProjections(), torch.randn(7, 48)
    made, real = [], fused_projection._Fused

    def slow(layers):
        made.append(layers)
        time.sleep(0.05)  # all threads are there by now
        return real(layers)

    @torch.no_grad()
    def run():
        fuse(layers, x)

    monkeypatch.setattr(fused_projection, "_Fused", slow)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_training_goes_on_after_inference():
    layers, fuse, x = linears(), FusedProjections(), torch.randn(7, 48)
    twins = copy.deepcopy(layers)
    with torch.inference_mode():
        assert fuse(layers, x) is not None
    for group in (layers, twins):
        optimizer = torch.optim.AdamW([p for layer in group for p in layer.parameters()], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            sum(y.square().mean() for y in separately(group, x)).backward()
            optimizer.step()
    for layer, twin in zip(layers, twins, strict=True):
        assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)
    with torch.no_grad():
        expected = separately(twins, x)
        assert all(torch.equal(*pair) for pair in zip(fuse(layers, x), expected, strict=True))
