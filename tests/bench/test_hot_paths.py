# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark cases of the hot paths; ordinary runs execute each once.

Time them with `pytest tests/bench/test_hot_paths.py --benchmark-enable`, and compare with
`--benchmark-autosave --benchmark-compare --benchmark-compare-fail=mean:5%`.
"""

import pytest
import torch

import lean_kernels as lk


def _layer(dtype=torch.float32, block_shape=(32, 32), activation=None):
    torch.manual_seed(0)
    linear = torch.nn.Linear(768, 3072, dtype=dtype)
    return lk.nn.BlockSparseLinear.from_linear(
        linear, block_shape=block_shape, density=0.2, activation=activation
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 16, 128])
def test_forward(benchmark, m, dtype):
    layer, x = _layer(dtype), torch.randn(m, 768, dtype=dtype)
    with torch.inference_mode():
        assert benchmark(layer, x).shape == (m, 3072)


@pytest.mark.parametrize("block_shape", [(16, 16), (4, 16), (64, 64)], ids=str)
def test_forward_blocks(benchmark, block_shape):
    layer, x = _layer(block_shape=block_shape), torch.randn(128, 768)
    with torch.inference_mode():
        assert benchmark(layer, x).shape == (128, 3072)


def test_forward_gelu_residual(benchmark):
    layer, x, residual = _layer(activation="gelu"), torch.randn(128, 768), torch.randn(128, 3072)
    with torch.inference_mode():
        assert benchmark(layer, x, residual).shape == (128, 3072)


def test_forward_backward(benchmark):
    layer, x = _layer(), torch.randn(128, 768, requires_grad=True)
    grad = torch.randn(128, 3072)

    def step():
        return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)

    assert benchmark(step)[1].shape == layer.weight.shape


def test_from_linear(benchmark):
    linear = torch.nn.Linear(768, 3072)
    layer = benchmark(lk.nn.BlockSparseLinear.from_linear, linear, density=0.2)
    assert layer.density == pytest.approx(0.2, abs=0.01)
