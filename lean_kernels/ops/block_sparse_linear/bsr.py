# SPDX-License-Identifier: Apache-2.0
"""Block sparse row (BSR) matrices as plain tensors: building, checking, expanding.

A matrix [rows, cols] cut into blocks [block_out, block_in] is stored as

    weight        [nnz, block_out, block_in]   the kept blocks, row by row
    crow_indices  int32 [block_rows + 1]       blocks of block row r: crow[r] .. crow[r + 1]
    col_indices   int32 [nnz]                  block column of each kept block, ascending in a row

Blocks over the right or lower edge are padded with zeros. Kernels take `weight` in any memory
order; the one they read without packing is that of `blocks_empty`.
"""

import torch
from torch import Tensor


def grid(rows: int, cols: int, block_shape: tuple[int, int]) -> tuple[int, int]:
    """Number of block rows and block columns of a [rows, cols] matrix."""
    return -(-rows // block_shape[0]), -(-cols // block_shape[1])


def blocks_empty(nnz: int, block_shape: tuple[int, int], **kwargs) -> Tensor:
    """Uninitialised [nnz, block_out, block_in] in the memory order the forward kernels read.

    That is block_out fastest where it fills vectors (multiples of 16), else block_in fastest.
    """
    block_out, block_in = block_shape
    if block_out % 16:
        return torch.empty(nnz, block_out, block_in, **kwargs)
    return torch.empty(nnz, block_in, block_out, **kwargs).transpose(1, 2)


def row_indices(crow_indices: Tensor, nnz: int) -> Tensor:
    """Block row of each kept block, int64 [nnz]. In range whatever `crow_indices` holds."""
    entries = torch.arange(nnz, dtype=crow_indices.dtype, device=crow_indices.device)
    rows = torch.searchsorted(crow_indices[1:].contiguous(), entries, right=True)
    return rows.clamp_(max=crow_indices.numel() - 2)


def pattern(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`crow_indices`, `col_indices` (int32) of the True entries of [block_rows, block_cols]."""
    counts = block_mask.sum(dim=1)
    crow_indices = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=block_mask.device)
    torch.cumsum(counts, dim=0, out=crow_indices[1:])
    return crow_indices, block_mask.nonzero()[:, 1].to(torch.int32)


def block_view(dense: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """[rows, cols] as [block_rows, block_cols, block_out, block_in], zero-padded at the edges."""
    rows, cols = dense.shape
    block_out, block_in = block_shape
    block_rows, block_cols = grid(rows, cols, block_shape)
    pad = (0, block_cols * block_in - cols, 0, block_rows * block_out - rows)
    if any(pad):
        dense = torch.nn.functional.pad(dense, pad)
    return dense.reshape(block_rows, block_out, block_cols, block_in).transpose(1, 2)


def from_dense(dense: Tensor, block_mask: Tensor, block_shape: tuple[int, int]):
    """`weight`, `crow_indices`, `col_indices` of the blocks of `dense` that `block_mask` keeps."""
    crow_indices, col_indices = pattern(block_mask)
    nnz = col_indices.numel()
    weight = blocks_empty(nnz, block_shape, dtype=dense.dtype, device=dense.device)
    weight.copy_(block_view(dense, block_shape)[block_mask])
    return weight, crow_indices, col_indices


def to_dense(
    weight: Tensor, crow_indices: Tensor, col_indices: Tensor, rows: int, cols: int
) -> Tensor:
    """The dense [rows, cols] matrix, differentiable in `weight`."""
    block_out, block_in = weight.shape[1:]
    block_rows, block_cols = grid(rows, cols, (block_out, block_in))
    blocks = weight.new_zeros(block_rows, block_cols, block_out, block_in)
    index = (row_indices(crow_indices, weight.shape[0]), col_indices.long())
    blocks = blocks.index_put(index, weight, accumulate=True)
    return blocks.transpose(1, 2).reshape(block_rows * block_out, -1)[:rows, :cols]


def gather_blocks(
    dense: Tensor, crow_indices: Tensor, col_indices: Tensor, block_shape: tuple[int, int]
) -> Tensor:
    """The blocks [nnz, block_out, block_in] of a dense matrix at the places of a pattern."""
    rows = row_indices(crow_indices, col_indices.numel())
    return block_view(dense, block_shape)[rows, col_indices.long()]


def check_bounds(
    crow_indices: Tensor, col_indices: Tensor, block_cols: int, name: str = "block_sparse_linear"
) -> None:
    """Raise ValueError if indices lead outside the matrix. Reads them."""
    nnz = col_indices.numel()
    # compared, not subtracted: int32 differences wrap around
    steps_down = bool((crow_indices[1:] < crow_indices[:-1]).any())
    if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != nnz or steps_down:
        raise ValueError(
            f"{name}: crow_indices must rise from 0 to nnz = {nnz} without a step down"
        )
    if nnz == 0:
        return
    low, high = (int(v) for v in col_indices.aminmax())
    if low < 0 or high >= block_cols:
        raise ValueError(
            f"{name}: col_indices must lie in [0, {block_cols}), got values from {low} to {high}"
        )


def validate(
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows: int,
    cols: int,
    *,
    name: str = "block-sparse weight",
) -> None:
    """Raise ValueError unless the three tensors are a well-formed BSR matrix [rows, cols].

    Reads the indices (a host sync on an accelerator): run it when a layer is built or loaded, not
    on each call. What passes cannot make a kernel read or write out of bounds.
    """

    def fail(problem: str) -> None:
        raise ValueError(f"{name}: {problem}")

    if weight.dim() != 3:
        fail(f"weight must be [nnz, block_out, block_in], got shape {tuple(weight.shape)}")
    if not weight.is_floating_point() and weight.dtype != torch.int8:
        fail(f"weight must be a floating point or int8 tensor, got {weight.dtype}")
    nnz, block_out, block_in = weight.shape
    if block_out < 1 or block_in < 1 or rows < 1 or cols < 1:
        fail(
            f"sizes must be positive, got a [{rows}, {cols}] matrix of "
            f"{block_out}x{block_in} blocks"
        )
    block_rows, block_cols = grid(rows, cols, (block_out, block_in))
    for label, index, expected in (
        ("crow_indices", crow_indices, block_rows + 1),
        ("col_indices", col_indices, nnz),
    ):
        if index.dtype != torch.int32:
            fail(f"{label} must be int32, got {index.dtype}; convert with .to(torch.int32)")
        if index.shape != (expected,):
            fail(
                f"{label} must have shape [{expected}] for a [{rows}, {cols}] matrix of "
                f"{block_out}x{block_in} blocks with {nnz} kept, got {tuple(index.shape)}"
            )
        if index.device != weight.device:
            fail(f"{label} is on {index.device}, weight on {weight.device}; move them together")
    if weight.is_meta:
        return
    check_bounds(crow_indices, col_indices, block_cols, name)
    if nnz == 0:
        return
    row = row_indices(crow_indices, nnz)
    if bool(((col_indices.diff() <= 0) & (row.diff() == 0)).any()):
        fail("col_indices must ascend without repeats within each block row; sort each row")
    edge_out, edge_in = rows % block_out, cols % block_in
    if edge_out and bool(weight[row == block_rows - 1, edge_out:].count_nonzero()):
        fail(f"the padding of the last block row (rows {rows} and up) must be zero")
    if edge_in and bool(weight[col_indices == block_cols - 1, :, edge_in:].count_nonzero()):
        fail(f"the padding of the last block column (columns {cols} and up) must be zero")
