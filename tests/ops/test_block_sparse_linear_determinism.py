# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels give the same bits: from run to run, in any batch, on any number of threads."""

from dataclasses import replace

import pytest
import torch
from problems import (
    ACTIVATIONS,
    BLOCKS,
    DTYPES,
    FEW_BLOCKS,
    needs_cpu_kernels,
    problem,
    same_bits,
    uneven_mask,
)

from lean_kernels.ops.block_sparse_linear import bsr

pytestmark = needs_cpu_kernels
ops = torch.ops.lean_kernels


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large_problem(block, dtype=torch.float32, density=0.5):
    """Enough work for several threads, unevenly spread over the block rows."""
    torch.manual_seed(0)
    mask = torch.rand(bsr.grid(250, 270, block)) < density
    mask[: max(1, len(mask) // 8)] = True
    mask[-1] = False
    return problem(210, 250, 270, block, dtype, mask=mask)


def forward_and_gradients(p):
    needed = True, True, True
    grads = ops.block_sparse_linear_grad(p.grad, p.x, *p.matrix, p.x.shape[-1], *needed)
    return p.run("cpu", activation="gelu"), *grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_runs_and_numbers_of_threads(threads, block, dtype):
    p = large_problem(block, dtype)
    threads(1)
    expected = forward_and_gradients(p)
    for count in (1, 2, 3):
        threads(count)
        for result, right in zip(forward_and_gradients(p), expected, strict=True):
            assert same_bits(result, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_a_row_does_not_depend_on_the_batch(threads, block, dtype):
    threads(2)
    p = large_problem(block, dtype)
    y, dx, *_ = forward_and_gradients(p)
    batches = [torch.tensor([row]) for row in (0, 101, 209)]
    batches += [torch.arange(1, 1 + count) for count in (2, 3, 4, 5, 7, 12, 13, 25, 72, 150)]
    batches += [torch.randperm(210)[:count] for count in (6, 31, 200)]
    for rows in batches:
        part = replace(p, x=p.x[rows], residual=p.residual[rows], grad=p.grad[rows])
        part_y, part_dx, *_ = forward_and_gradients(part)
        assert same_bits(part_y, y[rows]), f"rows {rows.tolist()}"
        assert same_bits(part_dx, dx[rows]), f"rows {rows.tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 16), (1, 48), (4, 16), (12, 32), (16, 1)], ids=str)
def test_few_rows_are_those_of_a_larger_batch(threads, block, dtype):
    threads(2)
    p = large_problem(block, dtype)
    y, dx, *_ = forward_and_gradients(p)
    for count in (*range(1, 13), 16, 17, 18, 26, 34, 64):
        rows = torch.randperm(210)[:count]
        part = replace(p, x=p.x[rows], residual=p.residual[rows], grad=p.grad[rows])
        part_y, part_dx, *_ = forward_and_gradients(part)
        assert same_bits(part_y, y[rows]), f"rows {rows.tolist()}"
        assert same_bits(part_dx, dx[rows]), f"rows {rows.tolist()}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_a_row_does_not_depend_on_the_batch_with_any_activation(block, activation):
    p = problem(40, 70, 90, block)
    whole = p.run("cpu", activation=activation)
    for row in range(40):
        part = replace(p, x=p.x[row], residual=p.residual[row])
        assert same_bits(part.run("cpu", activation=activation), whole[row])


@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_the_shape_of_the_batch_and_strides_do_not_matter(block):
    p = problem(24, 70, 90, block)
    y, dx, dw, db = forward_and_gradients(p)
    lead = (2, 3, 4)
    shaped = replace(
        p,
        x=p.x.reshape(*lead, 90),
        residual=p.residual.reshape(*lead, 70),
        grad=p.grad.reshape(*lead, 70).transpose(0, 1).contiguous().transpose(0, 1),
    )
    shaped_y, shaped_dx, shaped_dw, shaped_db = forward_and_gradients(shaped)
    assert same_bits(shaped_y.reshape(24, 70), y)
    assert same_bits(shaped_dx.reshape(24, 90), dx)
    assert same_bits(shaped_dw, dw)
    assert same_bits(shaped_db, db)


@pytest.mark.parametrize("block", FEW_BLOCKS, ids=str)
def test_other_block_rows_do_not_matter(block):
    """A row of blocks gives the same outputs in a matrix that holds nothing else."""
    mask = uneven_mask(*bsr.grid(70, 90, block))
    p = problem(30, 70, 90, block, mask=mask)
    y = p.run("cpu", activation="silu")
    alone = torch.zeros_like(mask)
    alone[0] = mask[0]
    only = replace(p, matrix=bsr.from_dense(p.dense, alone, block))
    assert same_bits(only.run("cpu", activation="silu")[:, : block[0]], y[:, : block[0]])
