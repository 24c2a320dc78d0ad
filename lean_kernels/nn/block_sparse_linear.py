# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Linear that stores and multiplies only the kept blocks of its weight."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from lean_kernels.ops.block_sparse_linear import bsr, int8, op

_COMPUTE_WEIGHTS = [f"torch.nn.utils.{name}" for name in ("prune", "weight_norm", "spectral_norm")]


def dense_weight(linear: nn.Module) -> Tensor:
    """The [out_features, in_features] weight of an nn.Linear or a Hugging Face Conv1D."""
    if isinstance(linear, nn.Module):
        _compute_weight(linear)
    weight = getattr(linear, "weight", None)
    if isinstance(linear, nn.Linear):
        return weight
    # transformers' Conv1D computes x W + b, with W [in_features, out_features], nf = out_features
    if isinstance(getattr(linear, "nf", None), int) and isinstance(weight, Tensor):
        return weight.t()
    raise TypeError(
        f"BlockSparseLinear replaces nn.Linear (or transformers' Conv1D), got "
        f"{type(linear).__name__}"
    )


def _compute_weight(linear: nn.Module) -> None:
    """Bring up to date a weight that is computed before each call; load_state_dict leaves it be."""
    for hook in linear._forward_pre_hooks.values():
        if type(hook).__module__ in _COMPUTE_WEIGHTS:
            with torch.enable_grad():
                hook(linear, ())


def magnitude_mask(weight: Tensor, block_shape: tuple[int, int], density: float) -> Tensor:
    """Bool [block_rows, block_cols] keeping the `density` fraction of blocks of largest L2 norm."""
    if not isinstance(density, Real) or not 0 < density <= 1:
        raise ValueError(f"BlockSparseLinear: density must lie in (0, 1], got {density!r}")
    blocks = bsr.block_view(weight.detach(), block_shape)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scores = torch.linalg.vector_norm(blocks, dim=(2, 3), dtype=wide)
    keep = max(1, round(density * scores.numel()))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.view(-1)[scores.flatten().topk(keep, sorted=False).indices] = True
    return mask


def nonzero_mask(weight: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Bool [block_rows, block_cols], True where a block holds a non-zero."""
    blocks = bsr.block_view(weight.detach(), block_shape)
    return (blocks.amin(dim=(2, 3)) != 0) | (blocks.amax(dim=(2, 3)) != 0)


class BlockSparseLinear(nn.Module):
    """y = activation(x Wᵀ + bias), W [out_features, in_features] kept as BSR blocks.

    Usually made by `from_linear`; the constructor leaves the weight uninitialised with every block
    column of the pattern unset, ready for `load_state_dict` (then call `validate`).

    State: `weight` [nnz, block_out, block_in] and `bias` are parameters, `crow_indices` and
    `col_indices` (int32) are buffers. Kept blocks train; dropped ones stay zero.

    With weight_dtype="int8", for inference, `weight` is a buffer, int8 [nnz, block_in / 4,
    block_out, 4] (see `ops.block_sparse_linear.int8`), and so is `weight_scales`, float32
    [out_features]; x is rounded to int8 on the way in, row by row.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        *,
        block_shape: tuple[int, int] = (32, 32),
        bias: bool = True,
        activation: str | None = None,
        weight_dtype: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        block_shape = _block_shape(block_shape)
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"BlockSparseLinear: in_features and out_features must be positive, got "
                f"{in_features} and {out_features}"
            )
        block_rows, block_cols = bsr.grid(out_features, in_features, block_shape)
        if not 0 <= nnz <= block_rows * block_cols:
            raise ValueError(
                f"BlockSparseLinear: nnz must lie in [0, {block_rows * block_cols}] for "
                f"{block_rows} x {block_cols} blocks, got {nnz}"
            )
        if activation not in op.ACTIVATIONS:
            raise ValueError(
                f"BlockSparseLinear: unknown activation {activation!r}; "
                f"expected one of {op.ACTIVATIONS}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.block_shape = block_shape
        self.activation = activation
        options = {"device": device, "dtype": dtype}
        if _is_int8(weight_dtype):
            int8.check_block_shape(block_shape, "BlockSparseLinear")
            packed = (nnz, block_shape[1] // 4, block_shape[0], 4)
            zeros = torch.zeros(packed, dtype=torch.int8, device=device)
            self.register_buffer("weight", zeros)
            ones = torch.ones(out_features, dtype=torch.float32, device=device)
            self.register_buffer("weight_scales", ones)
        else:
            self.weight = nn.Parameter(bsr.blocks_empty(nnz, block_shape, **options))
            self.weight_scales = None
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        index = {"device": device, "dtype": torch.int32}
        self.register_buffer("crow_indices", torch.zeros(block_rows + 1, **index))
        self.register_buffer("col_indices", torch.zeros(nnz, **index))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_shape: tuple[int, int] = (32, 32),
        density: float | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
        weight_dtype: str | None = None,
    ) -> "BlockSparseLinear":
        """The block-sparse form of an nn.Linear (or a transformers Conv1D).

        Args:
            linear: the dense layer; left as it is. Device, dtype and requires_grad carry over.
            block_shape: (block_out, block_in).
            density: keep this fraction of blocks, those of largest L2 norm.
            mask: bool [out_features, in_features] of weights to keep (a block stays if any of its
                weights does, and its dropped weights become zero), or [block_rows, block_cols] of
                blocks to keep.
            activation: fused onto the output.
            weight_dtype: None for that of the linear, or "int8".

        With neither `density` nor `mask`, exactly the blocks that hold a non-zero are kept.
        """
        weight = dense_weight(linear)
        block_shape = _block_shape(block_shape)
        if density is not None and mask is not None:
            raise ValueError("BlockSparseLinear.from_linear: give density or mask, not both")
        if weight.dtype not in op.DTYPES or weight.is_meta:
            raise ValueError(
                f"BlockSparseLinear.from_linear: the weight must have data and be one of "
                f"{', '.join(map(str, op.DTYPES))}, got {weight.dtype} on {weight.device}"
            )
        if weight.numel() == 0:
            raise ValueError(
                f"BlockSparseLinear.from_linear: the weight is empty, got {tuple(weight.shape)}"
            )
        # not isfinite(weight).all(), which takes longer than all the rest
        if not all(math.isfinite(extreme) for extreme in weight.aminmax()):
            raise ValueError("BlockSparseLinear.from_linear: the weight has NaN or infinite values")
        blocks_shape = bsr.grid(*weight.shape, block_shape)
        weight_mask = None
        if density is not None:
            block_mask = magnitude_mask(weight, block_shape, density)
        elif mask is None:
            block_mask = nonzero_mask(weight, block_shape)
        else:
            mask = torch.as_tensor(mask).to(weight.device, torch.bool)
            if mask.shape == blocks_shape:
                block_mask = mask
            elif mask.shape == weight.shape:
                weight_mask = mask
                block_mask = bsr.block_view(mask, block_shape).any(dim=3).any(dim=2)
            else:
                raise ValueError(
                    f"BlockSparseLinear.from_linear: mask must be {tuple(weight.shape)} "
                    f"(weights) or {blocks_shape} (blocks), got {tuple(mask.shape)}"
                )
        kept, crow_indices, col_indices = bsr.from_dense(weight, block_mask, block_shape)
        if weight_mask is not None:
            kept *= bsr.gather_blocks(weight_mask, crow_indices, col_indices, block_shape)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            0,
            block_shape=block_shape,
            bias=linear.bias is not None,
            activation=activation,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(kept, requires_grad=linear.weight.requires_grad)
        layer.crow_indices, layer.col_indices = crow_indices, col_indices
        if linear.bias is not None:
            layer.bias = nn.Parameter(
                linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad
            )
        layer = layer.train(linear.training)
        return layer.to_int8() if _is_int8(weight_dtype) else layer

    @torch.no_grad()
    def to_int8(self) -> "BlockSparseLinear":
        """The layer with its weight rounded to int8, symmetrically per output."""
        if self.weight_scales is not None:
            return self
        if self.weight.dtype == torch.float64:
            raise ValueError("BlockSparseLinear: int8 takes no float64 weight; use .float() first")
        layer = type(self)(
            self.in_features,
            self.out_features,
            self.nnz,
            block_shape=self.block_shape,
            bias=self.bias is not None,
            activation=self.activation,
            weight_dtype="int8",
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        layer.crow_indices, layer.col_indices = self.crow_indices, self.col_indices
        layer.weight, layer.weight_scales = int8.quantise(
            self.weight, self.crow_indices, self.out_features
        )
        layer.bias = self.bias
        return layer.train(self.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear with the same weights (a fused activation does not carry over)."""
        blocks = self.weight
        if self.weight_scales is not None:
            dtype = torch.float32 if self.bias is None else self.bias.dtype
            blocks = int8.dequantise(blocks, self.weight_scales, self.crow_indices, dtype)
        weight = bsr.to_dense(
            blocks, self.crow_indices, self.col_indices, self.out_features, self.in_features
        )
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(
                self.bias.detach().clone(), requires_grad=self.bias.requires_grad
            )
        return linear.train(self.training)

    def validate(self, name: str = "BlockSparseLinear") -> None:
        """Raise ValueError unless the stored pattern is well formed. Call after loading."""
        scales, blocks = self.weight_scales, self.weight
        if scales is not None:
            blocks = int8.unpack(blocks)
            if not scales.is_meta and not bool(scales.isfinite().all()):
                raise ValueError(f"{name}: weight_scales must be finite")
        bsr.validate(
            blocks,
            self.crow_indices,
            self.col_indices,
            self.out_features,
            self.in_features,
            name=name,
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features], residual [..., out_features] -> [..., out_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"BlockSparseLinear: x must be [..., {self.in_features}], got {list(x.shape)}"
            )
        # nn.Module's own attribute lookup takes 2 us a tensor. Parametrizations and sharding move
        # parameters elsewhere.
        own, buffers = self._parameters, self._buffers
        return op.apply(
            x,
            own["weight"] if "weight" in own else self.weight,  # noqa: SIM401
            buffers["crow_indices"],
            buffers["col_indices"],
            own["bias"] if "bias" in own else self.bias,  # noqa: SIM401
            residual,
            self.out_features,
            self.activation,
            None,
            buffers.get("weight_scales"),
        )

    @property
    def nnz(self) -> int:
        """Number of kept blocks."""
        return self.weight.shape[0]

    @property
    def density(self) -> float:
        """Kept fraction of the blocks."""
        rows, cols = bsr.grid(self.out_features, self.in_features, self.block_shape)
        return self.nnz / (rows * cols)

    @property
    def block_mask(self) -> Tensor:
        """Bool [block_rows, block_cols], True where a block is kept."""
        shape = bsr.grid(self.out_features, self.in_features, self.block_shape)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.col_indices.device)
        rows = bsr.row_indices(self.crow_indices, self.nnz)
        mask[rows, self.col_indices.long()] = True
        return mask

    def extra_repr(self) -> str:
        block_out, block_in = self.block_shape
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block_shape={block_out}x{block_in}, density={self.density:.3g}, "
            f"bias={self.bias is not None}"
        )
        if self.weight_scales is not None:
            text += ", weight_dtype=int8"
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def _apply(self, fn, recurse=True):
        scales = self.weight_scales
        super()._apply(fn, recurse)
        if scales is not None and self.weight_scales.dtype != scales.dtype:
            # .half() and the like mean what is computed in: scales must stay as exact as they were.
            self.weight_scales = scales.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A file is untrusted: no index may reach a kernel unchecked. A shape mismatch was reported
        # above and left our own, valid, tensors in place.
        if any(prefix + key in state_dict for key in ("weight", "crow_indices", "col_indices")):
            error_msgs = args[-1] if args else kwargs["error_msgs"]
            if not error_msgs:
                try:
                    self.validate(prefix.rstrip(".") or "BlockSparseLinear")
                except ValueError as error:
                    error_msgs.append(str(error))


def _is_int8(weight_dtype: str | None) -> bool:
    if weight_dtype not in (None, "int8"):
        raise ValueError(
            f"BlockSparseLinear: weight_dtype must be None or 'int8', got {weight_dtype!r}"
        )
    return weight_dtype == "int8"


def _block_shape(block_shape) -> tuple[int, int]:
    shape = tuple(block_shape) if isinstance(block_shape, Sequence) else ()
    if len(shape) != 2 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(
            f"BlockSparseLinear: block_shape must be two positive ints, got {block_shape!r}"
        )
    return shape
