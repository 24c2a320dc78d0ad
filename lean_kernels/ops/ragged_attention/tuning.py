# SPDX-License-Identifier: Apache-2.0
"""What can be tuned in ragged_attention's Triton kernels; `triton_call.config` says what a table
holds."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from lean_kernels._tuning import entry, nested, table
from lean_kernels.ops.ragged_attention import triton
from lean_kernels.tune import Problem

HEADS, TOKENS = 12, 32768
DIMS = (64, 128)
# The lengths at which each kernel works; `triton.py` says which one a call takes.
LENGTHS = {
    "packed": (16, 32, 64),
    "grad_packed": (16, 32, 64),
    "resident": (128, 256),
    "tiles": (128, 256, 512),
    "scores": (512, 1024),
    "grad_query": (128, 512),
    "grad_keys": (128, 512),
}


def problems(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Problem]:
    """Each kernel for each width of heads."""
    for dim in DIMS:
        for kernel, lengths in LENGTHS.items():
            path = ("half" if dtype.itemsize == 2 else "float32", kernel, str(dim))
            untuned = entry(table("ragged_attention", device), path)
            if untuned is None:
                continue
            block_m, block_n, _, _ = untuned
            rows = (block_m,) if kernel == "resident" else (32, 64, 128)
            keys = (block_n,) if kernel == "resident" else (32, 64, 128)
            tiles = product(rows, keys, (4, 8), (2, 3, 4))
            if kernel in ("packed", "grad_packed"):  # whole sequences: as high as wide
                tiles = (tile for tile in tiles if tile[0] == tile[1] >= block_n)
            every = dict.fromkeys([tuple(untuned), *tiles])
            candidates = [nested(path, list(tile)) for tile in every]
            calls = [_call(kernel, dim, length, dtype, device) for length in lengths]
            yield Problem(f"{kernel}, heads of {dim}", candidates, calls)


def _call(kernel, dim, length, dtype, device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(length // 2, length + 1, (TOKENS // length,), generator=generator)
    cu = torch.zeros(len(sizes) + 1, dtype=torch.int32)
    cu[1:] = sizes.cumsum(0)
    total = int(cu[-1])
    query, key, value, grad = (
        torch.randn(total, HEADS, dim, generator=generator).to(device, dtype) for _ in range(4)
    )
    scores = 1 if kernel in ("packed", "resident", "scores") else 0
    layout = (
        cu.to(device), None, None, None, length, dim**-0.5, -1, -1, scores, False, False,
    )  # fmt: skip
    if not kernel.startswith("grad"):
        return lambda: triton.forward(query, key, value, *layout)[2 if scores else 0]
    out, lse, _ = triton.forward(query, key, value, *layout)
    gradients = partial(triton.grad, grad, None, query, key, value, out, lse, *layout)
    return lambda: gradients()[0 if kernel == "grad_query" else 1]
