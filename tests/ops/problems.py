# SPDX-License-Identifier: Apache-2.0
"""Problems for the tests of block_sparse_linear, their exact answers, and what counts as equal."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels import _extension
from lean_kernels.ops import block_sparse_linear
from lean_kernels.ops.block_sparse_linear import bsr, reference

# One of each loop nest of the CPU kernels, whatever the vector length, and its edges.
BLOCKS = [
    *((16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16)),
    *((1, 16), (1, 32), (16, 1), (4, 16), (8, 32), (2, 48), (3, 5), (20, 12), (8, 8), (1, 1)),
]
FEW_BLOCKS = [(32, 32), (16, 16), (8, 24), (4, 16), (8, 32), (2, 48), (1, 32), (20, 12), (3, 5)]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]

_missing = _extension.load_cpu()
needs_cpu_kernels = pytest.mark.skipif(_missing is not None, reason=f"no CPU kernels: {_missing}")
IMPLS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]


@dataclass
class Problem:
    x: Tensor  # [..., in_features]
    matrix: tuple[Tensor, Tensor, Tensor]  # weight, crow_indices, col_indices
    bias: Tensor  # [out_features]
    residual: Tensor  # [..., out_features]
    grad: Tensor  # [..., out_features]

    @property
    def out_features(self) -> int:
        return self.bias.shape[0]

    @property
    def dense(self) -> Tensor:
        return bsr.to_dense(*self.matrix, self.out_features, self.x.shape[-1])

    def run(self, impl=None, *, bias=True, residual=True, activation=None) -> Tensor:
        return block_sparse_linear(
            self.x,
            *self.matrix,
            self.bias if bias else None,
            out_features=self.out_features,
            activation=activation,
            residual=self.residual if residual else None,
            impl=impl,
        )

    def exact(self, *, bias=True, residual=True, activation=None) -> Tensor:
        """The answer in float64."""
        weight, *indices = self.matrix
        return reference.forward(
            self.x.double(),
            weight.double(),
            *indices,
            self.bias.double() if bias else None,
            self.residual.double() if residual else None,
            self.out_features,
            activation,
        )

    def torch_dense(self, *, bias=True, residual=True, activation=None) -> Tensor:
        """What a dense model would compute in this dtype."""
        y = F.linear(self.x, self.dense, self.bias if bias else None)
        y = reference.ACTIVATIONS[activation](y)
        return y + self.residual if residual else y


def uneven_mask(block_rows: int, block_cols: int) -> Tensor:
    """A random pattern: its first row full, its second row and its last column empty."""
    mask = torch.rand(block_rows, block_cols) < 0.4
    if block_cols > 2:
        mask[:, -1] = False
    mask[0] = True
    mask[1:2] = False
    return mask


def problem(lead, out_features, in_features, block, dtype=torch.float32, mask=None) -> Problem:
    """Random numbers of the given sizes; `lead` is the number of rows, or the leading sizes."""
    lead = (lead,) if isinstance(lead, int) else lead
    torch.manual_seed(0)
    if mask is None:
        mask = uneven_mask(*bsr.grid(out_features, in_features, block))
    dense = torch.randn(out_features, in_features, dtype=dtype)
    return Problem(
        torch.randn(*lead, in_features, dtype=dtype),
        bsr.from_dense(dense, mask, block),
        torch.randn(out_features, dtype=dtype),
        torch.randn(*lead, out_features, dtype=dtype),
        torch.randn(*lead, out_features, dtype=dtype),
    )


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square of what is right."""
    assert result.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    scale = exact.norm().item()
    difference = (result.double() - exact).norm().item()
    return difference / scale if scale else difference


def assert_accurate(result: Tensor, exact: Tensor, dense: Tensor) -> None:
    """float32 within 1e-6 (float64 1e-14); halves no worse than twice what `dense` torch does."""
    limits = {torch.float32: 1e-6, torch.float64: 1e-14}
    limit = limits.get(result.dtype) or 2 * error(dense, exact)
    assert error(result, exact) <= limit


def bits(tensor: Tensor) -> Tensor:
    """The same tensor as integers: equal only where every bit is."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))
