# SPDX-License-Identifier: Apache-2.0
"""What can be tuned in block_sparse_linear's Triton kernels.

The table: "matmul" maps a block as the kernel sees it, with its dtype ("64x64 bfloat16"), to
{"BLOCK_K": ..., "tiles": {most tokens: [BLOCK_M, BLOCK_N, GROUP_M, warps, stages]}}; the last also
serves more tokens. "grad_weight" maps it to [BLOCK_OUT, BLOCK_IN, BLOCK_M, warps, stages].
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from lean_kernels._tuning import table
from lean_kernels.ops.block_sparse_linear import bsr, triton
from lean_kernels.tune import Problem

BLOCKS = ((32, 32), (64, 64), (16, 16), (128, 128))
SHAPES = ((3072, 768), (4096, 4096))
TOKENS = (16, 64, 256, 1024, 8192)  # the last comes first: it settles BLOCK_K
DENSITY = 0.2


def problems(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Problem]:
    """Forward per block shape and number of tokens, then the weight gradient."""
    for block in BLOCKS:
        yield from _matmul(device, block, dtype)
        yield _grad_weight(device, block, dtype)


def _pattern(shape, block, dtype, device):
    rows, cols = bsr.grid(*shape, block)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, cols, generator=generator) < DENSITY
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.int32)
    weight = bsr.blocks_empty(len(col), block, dtype=dtype, device=device).normal_()
    return weight, crow.to(device), col.to(device)


def _call(device, shape, block, dtype, tokens):
    weight, crow, col = _pattern(shape, block, dtype, device)
    x = torch.randn(tokens, shape[1], dtype=dtype, device=device)
    return partial(triton.forward, x, weight, crow, col, None, None, shape[0], 0)


def _matmul(device, block, dtype) -> Iterator[Problem]:
    kind = triton.kind(*block, dtype)
    side = max(16, min(128, block[0]))

    def untuned(tokens: int) -> tuple[int, tuple[int, ...]]:
        known = triton.config(*block, dtype, tokens)
        return known["BLOCK_K"], tuple(known[name] for name in triton.TILE)

    def entry(block_k: int, most: int, tile: tuple[int, ...]) -> dict:
        return {"matmul": {kind: {"BLOCK_K": block_k, "tiles": {str(most): list(tile)}}}}

    largest = TOKENS[-1]
    tiles = [
        (m, side, 8, warps, stages)
        for m, stages in product((64, 128, 256), (3, 5))
        for warps in ((4, 8) if m * side >= 64 * 64 else (4,))
    ]
    every = dict.fromkeys([untuned(largest), *product((32, 64, 128), tiles)])
    calls = [_call(device, shape, block, dtype, largest) for shape in SHAPES]
    yield Problem(f"{kind}, {largest} tokens", [entry(k, largest, t) for k, t in every], calls)
    # Every number of tokens sums in the same order.
    settled = triton.config(*block, dtype, largest, table(triton.NAME, device))["BLOCK_K"]
    for most in TOKENS[:-1]:
        tiles = [
            (m, side, 8, warps, stages)
            for m in (16, 32, 64, 128)
            if m <= most
            for warps, stages in product((2, 4), (3, 5))
        ]
        every = dict.fromkeys([untuned(most)[1], *tiles])
        calls = [_call(device, shape, block, dtype, most) for shape in SHAPES]
        yield Problem(f"{kind}, {most} tokens", [entry(settled, most, t) for t in every], calls)


def _grad_weight(device, block, dtype) -> Problem:
    kind = triton.kind(*block, dtype)
    out, inner = (max(16, min(128, size)) for size in block)
    tiles = product((out,), (inner,), (32, 64, 128), (2, 4, 8), (3, 4))
    every = dict.fromkeys([tuple(triton.grad_weight_config(*block, dtype).values()), *tiles])
    candidates = [{"grad_weight": {kind: list(tile)}} for tile in every]
    calls = [_grad_call(device, shape, block, dtype) for shape in SHAPES]
    return Problem(f"{kind}, weight gradient", candidates, calls)


def _grad_call(device, shape, block, dtype):
    _, crow, col = _pattern(shape, block, dtype, device)
    grad, x = (torch.randn(TOKENS[-1], size, dtype=dtype, device=device) for size in shape)
    return partial(triton.grad_weight, grad, x, crow, col, *block)
