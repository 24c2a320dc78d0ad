# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of block_sparse_linear launch; see ahead_of_time.py."""

import os
import re
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_KIB, SM80, SM90, Recorder, stack_bytes

from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.ops.block_sparse_linear import triton as kernels
from lean_kernels.ops.block_sparse_linear.op import ACTIVATIONS

NAMES = ("forward", "grad_input", "grad_weight")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def name(value) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


@pytest.fixture
def record(monkeypatch):
    """Return the launches of forward, grad_input and grad_weight, in this order."""

    def run(
        target, block, dtype, *, tokens=4096, shape=(3072, 768), activation="gelu", order="out"
    ):
        monkeypatch.setattr(torch.version, "hip", "6.0" if target.backend == "hip" else None)
        matmul, grad_weight = (
            Recorder(k) for k in (kernels._matmul_kernel, kernels._grad_weight_kernel)
        )
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_matmul_kernel", matmul)
            patch.setattr(kernels, "_grad_weight_kernel", grad_weight)
            block_rows, block_cols = bsr.grid(*shape, block)
            nnz = block_rows * block_cols // 5 // 16 * 16 + 16
            options = {"dtype": dtype, "device": "meta"}
            weight = bsr.blocks_empty(nnz, block, **options)
            if order == "in":
                weight = weight.contiguous()
            crow, col = (
                torch.empty(size, dtype=torch.int32, device="meta")
                for size in (block_rows + 1, nnz)
            )
            x, y = (torch.empty(tokens, size, **options) for size in reversed(shape))
            bias, code = y[0], ACTIVATIONS.index(activation)
            kernels.forward(x, weight, crow, col, bias, y, shape[0], code)
            kernels.grad_input(y, weight, crow, col, shape[1])
            kernels.grad_weight(y, x, crow, col, *block)
        return *matmul.launches, *grad_weight.launches

    return run


def check(launches, target, dtype, tmp_path) -> list:
    # ptxas may spill two registers of the wide types rather than lose a resident block.
    allowed = 0 if dtype.itemsize == 2 else 16
    compiled = [launch.compile(target) for launch in launches]
    for label, kernel in zip(NAMES, compiled, strict=True):
        assert kernel.metadata.shared <= SHARED_KIB[target] * 1024, label
        assert stack_bytes(kernel, tmp_path) <= allowed, label
    return compiled


FAST = [((b, b), BF16) for b in (16, 32, 64, 128)] + [((32, 32), FP32), ((64, 64), FP32)]
FAST += [((1, 16), BF16), ((16, 1), BF16)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16), (256, 16), (16, 256)]
BLOCKS += [(1, 16), (16, 1), (4, 16)]
SLOW = [(b, d) for b in BLOCKS for d in (BF16, FP32) if (b, d) not in FAST]
SLOW += [((b, b), d) for b in (32, 128) for d in (FP16, FP64)]
TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))


@TARGETS
@pytest.mark.parametrize("block, dtype", FAST, ids=name)
def test_many_tokens(record, tmp_path, target, block, dtype):
    check(record(target, block, dtype), target, dtype, tmp_path)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("block, dtype", SLOW, ids=name)
def test_many_tokens_of_every_kind(record, tmp_path, target, block, dtype):
    check(record(target, block, dtype), target, dtype, tmp_path)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("tokens", [1, 16, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name)
@pytest.mark.parametrize("block", [(32, 32), (128, 128)], ids=name)
def test_few_tokens(record, tmp_path, target, tokens, dtype, block):
    check(record(target, block, dtype, tokens=tokens), target, dtype, tmp_path)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=name)
def test_activations(record, tmp_path, target, activation, dtype):
    check(record(target, (64, 64), dtype, activation=activation), target, dtype, tmp_path)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("order", ["out", "in"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64)], ids=name)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name)
def test_odd_sizes_and_either_order(record, tmp_path, target, order, block, dtype):
    launches = record(target, block, dtype, shape=(1001, 777), order=order)
    check(launches, target, dtype, tmp_path)


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def precisions(launches) -> set[str]:
    return {launch.options["PRECISION"] for launch in launches}


def test_float32_is_exact_unless_asked(record):
    assert precisions(record(SM90, (32, 32), FP32)) == {"ieee"}


@TARGETS
def test_tf32_when_asked(tf32, record, tmp_path, target):
    launches = record(target, (32, 32), FP32)
    assert precisions(launches) == {"tf32"}
    compiled = check(launches, target, FP32, tmp_path)
    if target.backend == "cuda":
        assert all(".tf32" in kernel.asm["ptx"] for kernel in compiled)
    assert precisions(record(target, (32, 32), BF16)) == {"ieee"}


@pytest.mark.parametrize("size", [64, 128])
def test_hopper_uses_wgmma(record, size):
    for label, launch in zip(NAMES, record(SM90, (size, size), BF16), strict=True):
        assert "wgmma.mma_async" in launch.compile(SM90).asm["ptx"], label


@pytest.mark.parametrize("order", ["out", "in"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64)], ids=name)
def test_operands_move_sixteen_bytes_at_a_time(record, block, order):
    # In hexadecimal; 4: an int32 index; 8: 256 threads share a [64, 16] tile of weight.
    allowed = {"10", "4", "8"} if block == (16, 16) else {"10", "4"}
    for launch in record(SM80, block, BF16, order=order):
        ptx = launch.compile(SM80).asm["ptx"]
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", ptx)
        assert "10" in copies and set(copies) <= allowed
        assert not re.search(r"ld\.global\S*\.b16", ptx)


def test_offsets_are_64_bit_where_they_can_pass_two_to_the_31(record):
    launch = record(SM80, (32, 32), BF16, tokens=2**22, shape=(1024, 1024))[0]
    ir = launch.compile(SM80).asm["ttir"]
    steps = re.findall(
        r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<bf16>>, tensor<\d+x\d+x(i\d+)>", ir
    )
    assert steps and set(steps) == {"i64"}


def test_cpu_tensors_without_the_interpreter_are_refused():
    x, weight = torch.zeros(2, 16), torch.zeros(1, 16, 16)
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="needs tensors on a GPU, got cpu"):
        kernels.forward(x, weight, crow, col, None, None, 16, 0)
