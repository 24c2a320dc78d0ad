# SPDX-License-Identifier: Apache-2.0
"""BlockSparseLinear under autocast, compile, export and optimizers."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lean_kernels.nn import BlockSparseLinear

from .layers import BLOCKS, layer_of, linear_with_zero_blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = layer_of(activation="gelu"), torch.randn(5, 90)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x, torch.randn(5, 70))
        assert y.dtype == dtype
        torch.testing.assert_close(
            layer(x), F.gelu(layer.to_linear()(x)), rtol=0.02, atol=0.02, check_dtype=True
        )
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_compile_with_a_dynamic_batch():
    model = nn.Sequential(layer_of(activation="gelu"), layer_of((16, 10), in_features=70))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (2, 5, 64):
        x = torch.randn(rows, 90)
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(x)
            y.square().sum().backward()
            gradients.append([y, *(parameter.grad for parameter in model.parameters())])
        for eager, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    model = nn.Sequential(layer_of(activation="gelu"), nn.LayerNorm(70)).eval()
    shapes = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(
        model, (torch.randn(4, 90),), dynamic_shapes=shapes, strict=strict
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    for rows in (2, 9):
        x = torch.randn(rows, 90)
        torch.testing.assert_close(exported(x), model(x))


def optimizers(parameters):
    return {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=1e-4),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        "adamw foreach": lambda: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
        "adamw fused": lambda: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    }


@pytest.mark.parametrize("name", optimizers([]))
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_training(block, name):
    """Kept blocks learn a matrix of the same pattern, and no weight outside of them appears."""
    torch.manual_seed(0)
    student = layer_of(block)
    teacher = copy.deepcopy(student)
    teacher.weight.data += 0.2 * (teacher.weight != 0) * torch.randn(teacher.weight.shape)
    mask, start = student.block_mask, student.weight.detach().clone()
    optimizer = optimizers(list(student.parameters()))[name]()
    losses = []
    for _ in range(60):
        x = torch.randn(64, 90)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (student.weight != start).flatten(1).any(1).all()
    student.validate()  # padding included
    assert torch.equal(student.block_mask, mask)


def test_training_follows_the_dense_layer_step_by_step():
    torch.manual_seed(0)
    linear, mask = linear_with_zero_blocks(dtype=torch.float64)
    layer = BlockSparseLinear.from_linear(linear)
    wide = mask.repeat_interleave(32, 0).repeat_interleave(32, 1)[:70, :90]
    pairs = [(m, torch.optim.AdamW(m.parameters(), lr=0.01)) for m in (linear, layer)]
    for _ in range(5):
        x, target = torch.randn(16, 90).double(), torch.randn(16, 70).double()
        for module, optimizer in pairs:
            optimizer.zero_grad()
            F.mse_loss(F.gelu(module(x)), target).backward()
            if module is linear:
                linear.weight.grad *= wide
            optimizer.step()
    torch.testing.assert_close(layer.to_linear().weight, linear.weight)
    torch.testing.assert_close(layer.bias, linear.bias)
