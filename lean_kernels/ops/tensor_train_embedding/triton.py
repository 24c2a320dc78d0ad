# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of tensor_train_embedding: products of leading cores, one core more per launch.

Where there are fewer combinations of leading indices than ids, the product of each combination is
made once; else that of each id. Their number is known without waiting for the device. A row whose
id is out of bounds comes out as zeros.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device


@triton.jit(do_not_specialize=["units", "limit"])
def _extend_kernel(
    product_ptr,  # [before, height, rank] or the first core: what there is of each unit
    core_ptr,  # [v, rank, width]
    ids_ptr,  # [units] int64, or None: the unit's number is its id
    out_ptr,  # [units, columns], contiguous
    units,
    limit,
    height,
    rank,
    width,
    columns,
    divisor,  # of an id, for the number of its combination up to this core
    factor,  # v
    BY_ID: tl.constexpr,  # the products before are those of ids, and not of combinations
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    unit = tl.cast(tl.program_id(0), tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    id = unit if ids_ptr is None else tl.load(ids_ptr + unit).to(tl.int64)
    valid = (id >= 0) & (id < limit)
    combination = tl.where(valid, id, 0) // divisor
    source = unit if BY_ID else combination // factor
    product_ptr += source * height * rank
    core_ptr += (combination % factor) * rank * width
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(tl.cdiv(rank, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        left = tl.load(  # [BLOCK_M, BLOCK_K]
            product_ptr + m[:, None] * rank + k[None, :],
            mask=(m < height)[:, None] & (k < rank)[None, :],
            other=0.0,
        ).to(ACC)
        right = tl.load(  # [BLOCK_K, BLOCK_N]
            core_ptr + k[:, None] * width + n[None, :],
            mask=(k < rank)[:, None] & (n < width)[None, :],
            other=0.0,
        ).to(ACC)
        sums += tl.sum(left[:, :, None] * right[None, :, :], axis=1)
    sums = tl.where(valid, sums, 0.0)
    column = m[:, None] * width + n[None, :]
    mask = (m < height)[:, None] & (n < width)[None, :] & (column < columns)
    tl.store(out_ptr + unit * columns + column, sums, mask=mask)


def config(height: int, width: int, rank: int) -> dict[str, int]:
    """Tile and launch options; not tuned on hardware."""
    return {
        "BLOCK_M": min(triton.next_power_of_2(height), 8),
        "BLOCK_N": min(triton.next_power_of_2(width), 64),
        "BLOCK_K": min(triton.next_power_of_2(rank), 8),
        "num_warps": 4,
    }


def forward(ids: Tensor, cores: list[Tensor], num_embeddings: int, embedding_dim: int) -> Tensor:
    """Rows of the table; see `op.tensor_train_embedding`."""
    check_device("tensor_train_embedding", ids)
    dtype, device = cores[0].dtype, ids.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(*ids.shape, embedding_dim, dtype=dtype, device=device)
    if ids.numel() == 0:
        return out
    flat = ids.contiguous().view(-1)
    total = math.prod(core.shape[0] for core in cores)
    product, height, made, by_id = cores[0].contiguous(), 1, cores[0].shape[0], False
    height *= cores[0].shape[2]
    for k, core in enumerate(cores[1:], 1):
        factor, rank, cols, after = core.shape
        made *= factor
        last = k == len(cores) - 1
        whole = not last and made <= flat.numel()
        units = made if whole else flat.numel()
        columns = embedding_dim if last else height * cols * after
        result = out if last else torch.empty(units, columns, dtype=wide, device=device)
        tiles = config(height, cols * after, rank)
        grid = (
            units,
            triton.cdiv(height, tiles["BLOCK_M"]),
            triton.cdiv(cols * after, tiles["BLOCK_N"]),
        )
        with torch.cuda.device_of(ids):
            _extend_kernel[grid](
                product,
                core.contiguous(),
                None if whole else flat,
                result,
                *(units, made if whole else num_embeddings, height, rank, cols * after, columns),
                *(1 if whole else total // made, factor),
                BY_ID=by_id,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                **tiles,
            )
        product, height, by_id = result, height * cols, not whole
    return out
