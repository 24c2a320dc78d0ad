# SPDX-License-Identifier: Apache-2.0
"""BlockSparseLinear as a drop-in for nn.Linear."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear import bsr, reference

from .layers import BLOCKS, layer_of, linear_with_zero_blocks

STATE = ("weight", "bias", "crow_indices", "col_indices")


class Conv1D(nn.Module):
    """As transformers': x W + b, W [in_features, out_features]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def same_state(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in STATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_zero_blocks_are_dropped(block, dtype):
    linear, mask = linear_with_zero_blocks(block, dtype=dtype)
    layer = BlockSparseLinear.from_linear(linear, block_shape=block)
    assert torch.equal(layer.block_mask, mask)
    assert layer.nnz == mask.sum() == layer.weight.shape[0]
    assert layer.density == pytest.approx(mask.float().mean().item())
    layer.validate()
    assert torch.equal(layer.to_linear().weight, linear.weight)
    assert torch.equal(layer.to_linear().bias, linear.bias)


def test_one_tiny_or_negative_weight_keeps_its_block():
    for value in (1e-45, -1e-45, -1.0):
        linear = nn.Linear(64, 64)
        linear.weight.data.zero_()
        linear.weight.data[40, 3] = value
        layer = BlockSparseLinear.from_linear(linear)
        assert layer.block_mask.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_density_keeps_the_blocks_of_largest_norm(block):
    torch.manual_seed(0)
    linear = nn.Linear(90, 70)
    layer = BlockSparseLinear.from_linear(linear, block_shape=block, density=0.3)
    norms = bsr.block_view(linear.weight.detach(), block).square().sum((2, 3))
    kept, dropped = norms[layer.block_mask], norms[~layer.block_mask]
    assert len(kept) == round(0.3 * norms.numel())
    assert kept.min() >= dropped.max()


def test_density_is_by_norm_not_by_sum():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, -1.0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]])
    layer = BlockSparseLinear.from_linear(linear, block_shape=(1, 2), density=0.25)
    assert layer.block_mask.tolist() == [[True, False], [False, False]]


def test_density_keeps_at_least_one_block():
    assert BlockSparseLinear.from_linear(nn.Linear(64, 64), density=1e-9).nnz == 1
    assert BlockSparseLinear.from_linear(nn.Linear(64, 64), density=1).density == 1


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_mask_of_blocks(block):
    linear, mask = nn.Linear(90, 70), torch.rand(bsr.grid(70, 90, block)) < 0.5
    for given in (mask, mask.int(), mask.float()):
        layer = BlockSparseLinear.from_linear(linear, block_shape=block, mask=given)
        assert torch.equal(layer.block_mask, mask)
    layer.validate()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_mask_of_weights(block):
    linear, mask = nn.Linear(90, 70), torch.rand(70, 90) < 0.02
    layer = BlockSparseLinear.from_linear(linear, block_shape=block, mask=mask)
    layer.validate()
    assert torch.equal(layer.to_linear().weight, linear.weight * mask)
    assert torch.equal(layer.block_mask, bsr.block_view(mask, block).flatten(2).any(2))


def test_a_mask_of_another_kind():
    linear, mask = nn.Linear(64, 64), [[1, 0], [0, 1]]
    expected = BlockSparseLinear.from_linear(linear, mask=torch.tensor(mask))
    for form in (mask, np.array(mask)):
        found = BlockSparseLinear.from_linear(linear, mask=form)
        assert torch.equal(found.block_mask, expected.block_mask)


def test_the_dense_layer_stays_as_it_is():
    linear = nn.Linear(90, 70)
    before = copy.deepcopy(linear)
    for options in ({}, {"density": 0.5}, {"mask": torch.rand(70, 90) < 0.5}):
        layer = BlockSparseLinear.from_linear(linear, **options)
        layer.weight.data.fill_(7)
        layer.bias.data.fill_(7)
        assert torch.equal(linear.weight, before.weight)
        assert torch.equal(linear.bias, before.bias)


def test_a_conv1d():
    torch.manual_seed(0)
    conv, x = Conv1D(70, 90), torch.randn(5, 90)
    layer = BlockSparseLinear.from_linear(conv, block_shape=(16, 16))
    assert (layer.in_features, layer.out_features) == (90, 70)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_flags_carry_over():
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).eval().requires_grad_(False)
    layer = BlockSparseLinear.from_linear(linear)
    assert layer.bias is None
    assert not layer.training
    assert not layer.weight.requires_grad
    dense = layer.to_linear()
    assert dense.bias is None
    assert not dense.training
    assert not dense.weight.requires_grad
    assert dense.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": "0.5"}, ValueError, r"density must lie in \(0, 1\], got '0.5'"),
        ({"density": 1.1}, ValueError, r"density must lie in \(0, 1\], got 1.1"),
        ({"density": float("nan")}, ValueError, "density must lie in"),
        ({"density": 0.5, "mask": torch.ones(2, 2)}, ValueError, "density or mask, not both"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask must be \(64, 64\) .* or \(2, 2\) .*, got"),
        ({"block_shape": (0, 32)}, ValueError, "block_shape must be two positive ints"),
        ({"block_shape": (32,)}, ValueError, "block_shape must be two positive ints"),
        ({"block_shape": (32.0, 32)}, ValueError, "block_shape must be two positive ints"),
        ({"block_shape": 32}, ValueError, "block_shape must be two positive ints"),
        ({"linear": nn.Linear(4, 4, device="meta")}, ValueError, "must have data .* on meta"),
        ({"linear": nn.Linear(4, 4, dtype=torch.complex64)}, ValueError, "got torch.complex64"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'; expected one of"),
        ({"linear": nn.Conv2d(3, 3, 3)}, TypeError, "replaces nn.Linear .*, got Conv2d"),
        ({"linear": nn.Bilinear(3, 3, 3)}, TypeError, "got Bilinear"),
    ],
)
def test_from_linear_says_what_is_wrong(options, error, message):
    with pytest.raises(error, match=f"BlockSparseLinear.*{message}"):
        BlockSparseLinear.from_linear(**{"linear": nn.Linear(64, 64), **options})


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_from_linear_refuses_empty_and_non_finite_weights():
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="the weight is empty"):
            BlockSparseLinear.from_linear(nn.Linear(*shape))
    for value in (torch.nan, torch.inf, -torch.inf):
        linear = nn.Linear(64, 64)
        linear.weight.data[5, 7] = value
        with pytest.raises(ValueError, match="the weight has NaN or infinite values"):
            BlockSparseLinear.from_linear(linear)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 64, 0), "in_features and out_features must be positive, got 0 and 64"),
        ((64, -1, 0), "in_features and out_features must be positive, got 64 and -1"),
        ((64, 64, 5), r"nnz must lie in \[0, 4\] for 2 x 2 blocks, got 5"),
        ((64, 64, -1), r"nnz must lie in \[0, 4\]"),
    ],
)
def test_the_constructor_says_what_is_wrong(sizes, message):
    with pytest.raises(ValueError, match=f"^BlockSparseLinear: {message}"):
        BlockSparseLinear(*sizes)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_forward(block, activation):
    layer = layer_of(block, activation)
    x, residual = torch.randn(2, 9, 90), torch.randn(2, 9, 70)
    expected = reference.ACTIVATIONS[activation](layer.to_linear()(x))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                layer(x, residual), expected + residual, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_says_what_is_wrong(activation, grad):
    layer = layer_of(activation=activation).requires_grad_(grad)
    x = torch.randn(3, 90)
    with pytest.raises(ValueError, match=r"x must be \[..., 90\], got \[3, 91\]"):
        layer(torch.randn(3, 91))
    with pytest.raises((ValueError, RuntimeError), match=r"dtype|share one of"):
        layer(x.double())
    for residual in (torch.randn(70), torch.randn(1, 70), torch.randn(3, 70).double()):
        with pytest.raises((ValueError, RuntimeError), match="residual must be"):
            layer(x, residual)


def test_repr():
    assert repr(layer_of()) == (
        "BlockSparseLinear(in_features=90, out_features=70, block_shape=32x32, density=0.667, "
        "bias=True)"
    )
    assert "bias=False, activation=gelu)" in repr(layer_of(bias=False, activation="gelu"))


def test_deepcopy_and_pickle_are_equal_and_independent():
    layer = layer_of(activation="gelu").eval()
    x = torch.randn(3, 90)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert same_state(layer, other)
        assert other.weight.stride() == layer.weight.stride()
        assert torch.equal(other(x), expected)
        other.weight.data.zero_()
        other.crow_indices.zero_()
    assert torch.equal(layer(x), expected)


def test_dtype_changes_leave_indices_and_memory_order_alone():
    layer = layer_of((16, 64))
    crow, stride = layer.crow_indices.clone(), layer.weight.stride()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
        assert torch.equal(layer.crow_indices, crow)
        assert layer.weight.stride() == stride
        y = layer(torch.randn(3, 90, dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_meta_and_to_empty():
    layer = layer_of().to("meta")
    assert layer(torch.empty(3, 90, device="meta")).shape == (3, 70)
    assert layer.to_empty(device="cpu").weight.shape[1:] == (32, 32)
    assert BlockSparseLinear(90, 70, 3, device="meta").weight.is_meta


def test_block_sparse_model_in_a_sequential():
    model = nn.Sequential(layer_of(activation="relu"), nn.Linear(70, 2))
    assert {name for name, _ in model.named_parameters()} == {
        *("0.weight", "0.bias", "1.weight", "1.bias")
    }
    assert set(model.state_dict()) >= {f"0.{name}" for name in STATE}
    assert model(torch.randn(4, 90)).shape == (4, 2)


def empty_like(layer):
    return BlockSparseLinear(
        layer.in_features, layer.out_features, layer.nnz, block_shape=layer.block_shape
    )


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign, block):
    layer, x = layer_of(block), torch.randn(3, 90)
    other = empty_like(layer)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert same_state(layer, other)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_safetensors_round_trip(tmp_path, block):
    layer, x = layer_of(block), torch.randn(3, 90)
    tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(tensors, tmp_path / "layer.safetensors")
    for assign in (False, True):
        other = empty_like(layer)
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
        assert same_state(layer, other)
        assert torch.equal(other(x), layer(x))


def test_an_unloaded_layer_computes_nothing():
    with pytest.raises((ValueError, RuntimeError), match="crow_indices must rise"):
        empty_like(layer_of())(torch.randn(3, 90))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("crow_indices", lambda i: i.flip(0), "crow_indices must rise"),
        ("crow_indices", lambda i: i * 0, "crow_indices must rise"),
        ("crow_indices", lambda i: i + 1, "crow_indices must rise"),
        ("crow_indices", lambda i: i[:-1], r"size mismatch for .*crow_indices"),
        ("col_indices", lambda i: i + 3, r"col_indices must lie in \[0, 3\)"),
        ("col_indices", lambda i: i - 1, r"col_indices must lie in \[0, 3\)"),
        ("col_indices", lambda i: i * 0, "col_indices must ascend"),
        ("col_indices", lambda i: i[:-1], r"size mismatch for .*col_indices"),
        ("weight", lambda w: w[:-1], r"size mismatch for .*weight"),
        ("weight", lambda w: w + 1, "padding of the last block row"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_corrupted_state_dict_is_refused(alone, strict, name, edit, message):
    layer = layer_of()
    state = layer.state_dict()
    state[name] = edit(state[name])
    if alone:
        state = {name: state[name]}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(layer).load_state_dict({f"0.{k}": v for k, v in state.items()}, strict)


def test_assigned_indices_of_another_type_are_refused():
    layer = layer_of()
    state = layer.state_dict()
    state["col_indices"] = state["col_indices"].long()
    with pytest.raises(RuntimeError, match=r"must be int32, got torch.int64"):
        layer.load_state_dict(state, assign=True)


def test_a_dense_state_dict_is_refused():
    linear, _ = linear_with_zero_blocks()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        layer_of().load_state_dict(linear.state_dict())


def test_int8_follows_the_layer_it_is_made_of():
    layer = layer_of(activation="gelu")
    lean = layer.to_int8()
    assert "weight_dtype=int8" in repr(lean) and lean.to_int8() is lean
    assert [name for name, _ in lean.named_parameters()] == ["bias"]
    x = torch.randn(5, 90)
    with torch.no_grad():
        difference = lean(x) - layer(x)
        assert difference.norm() < 0.02 * layer(x).norm()
        assert torch.equal(lean.block_mask, layer.block_mask)
        torch.testing.assert_close(
            lean.to_linear().weight, layer.to_linear().weight, atol=1e-3, rtol=0
        )


def test_int8_state_round_trips_and_is_checked():
    lean = layer_of().to_int8()
    fresh = BlockSparseLinear(90, 70, lean.nnz, weight_dtype="int8")
    fresh.load_state_dict(lean.state_dict())
    x = torch.randn(3, 90)
    with torch.no_grad():
        assert torch.equal(fresh(x), lean(x)) and torch.equal(copy.deepcopy(lean)(x), lean(x))
    state = lean.state_dict()
    state["col_indices"] = state["col_indices"].flip(0)
    with pytest.raises(RuntimeError, match="must ascend"):
        BlockSparseLinear(90, 70, lean.nnz, weight_dtype="int8").load_state_dict(state)
    state = lean.state_dict()
    state["weight_scales"][3] = torch.nan
    with pytest.raises(RuntimeError, match="weight_scales must be finite"):
        BlockSparseLinear(90, 70, lean.nnz, weight_dtype="int8").load_state_dict(state)


def test_int8_scales_stay_exact_when_the_model_becomes_half():
    lean = layer_of().to_int8()
    scales = lean.weight_scales.clone()
    half = lean.bfloat16()
    assert half.weight_scales.dtype == torch.float32 and torch.equal(half.weight_scales, scales)
    with torch.no_grad():
        assert half(torch.randn(3, 90, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_int8_compiles():
    lean = layer_of(activation="relu").to_int8()
    compiled = torch.compile(lean, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.randn(rows, 90)
            torch.testing.assert_close(compiled(x), lean(x))


@pytest.mark.parametrize("options", [{"weight_dtype": "int4"}, {"block_shape": (4, 16)}], ids=str)
def test_int8_refuses(options):
    options = {"weight_dtype": "int8"} | options
    with pytest.raises(ValueError, match=r"weight_dtype must be|a multiple of 16 outputs"):
        BlockSparseLinear.from_linear(torch.nn.Linear(64, 64), **options)
