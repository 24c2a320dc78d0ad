# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton launchers of ragged_attention launch; see ahead_of_time.py."""

import os
import re
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from ahead_of_time import GFX942, SM80, SM90, Recorder, stack_bytes

from lean_kernels import _tuning
from lean_kernels.ops.ragged_attention import triton as launcher
from lean_kernels.ops.ragged_attention import triton_call, triton_varlen

KERNELS = [name for name in dir(launcher) if name.endswith("_kernel")]
# sm_80's table serves the small chips of its generation and later ones too.
SHARED_KIB = {SM80: 99, SM90: 227, GFX942: 64}
ARCHITECTURES = {SM80: "sm_80", SM90: "sm_90", GFX942: "gfx942"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Longest sequence, and the kernels it takes with scores and gradients.
GENERAL_GRADIENTS = ["_grad_keys_kernel", "_grad_query_kernel"]
CLASSES = {
    16: ["_grad_packed_kernel", "_packed_kernel"],
    32: ["_grad_packed_kernel", "_packed_kernel"],
    64: ["_grad_packed_kernel", "_packed_kernel"],
    128: [*GENERAL_GRADIENTS, "_resident_kernel"],
    256: [*GENERAL_GRADIENTS, "_resident_kernel"],
    None: [*GENERAL_GRADIENTS, "_scores_kernel", "_tiles_kernel"],
}
EVERYTHING = {
    "kv_heads": 4, "left": 100, "right": 7, "per_head": True, "exclude_diagonal": True, "mean": True
}  # fmt: skip


@pytest.fixture
def record(monkeypatch):
    """Return the launches of one forward (with scores) and one backward, ordered by kernel."""

    def run(
        target, longest=None, dim=64, dtype=BF16, *, heads=12, kv_heads=12, tokens=8192,
        sequences=None, positions=False, keys=None, left=-1, right=-1, mean=False,
        per_head=False, exclude_diagonal=False, scale=0.125,
    ):  # fmt: skip
        if sequences is None:
            sequences = tokens // longest if longest else 8

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        cu = meta(sequences + 1, dtype=torch.int32)
        places = [meta(tokens, dtype=torch.int32) if positions else None, None]
        if positions and keys:
            places[1] = meta(keys, dtype=torch.int32)
        layout = (
            cu, None if keys is None else torch.empty_like(cu), *places, longest or -1, scale,
            left, right, 2 if mean else 1, per_head, exclude_diagonal,
        )  # fmt: skip
        recorders = {name: Recorder(getattr(launcher, name)) for name in KERNELS}
        with monkeypatch.context() as patch:
            patch.setattr(_tuning, "architecture", lambda device: ARCHITECTURES[target])
            for name, recorder in recorders.items():
                patch.setattr(launcher, name, recorder)
            query = meta(tokens, heads, dim)
            key, value = meta(2, keys or tokens, kv_heads, dim)
            out, lse, scores = launcher.forward(query, key, value, *layout)
            launcher.grad(out, scores, query, key, value, out, lse, *layout)
        return [launch for name in KERNELS for launch in recorders[name].launches]

    return run


def names(launches) -> list[str]:
    return [launch.kernel.fn.__name__ for launch in launches]


def check(launches, target, tmp_path, allowed=0) -> None:
    wrong = []
    for launch in launches:
        compiled = launch.compile(target)
        spilled, shared = stack_bytes(compiled, tmp_path), compiled.metadata.shared / 1024
        if spilled > allowed or shared > SHARED_KIB[target]:
            tile = {k: v for k, v in launch.options.items() if "BLOCK" in k or "num" in k}
            wrong.append(f"{launch.kernel.fn.__name__} {tile}: {spilled} B, {shared} KiB")
    assert not wrong


@pytest.mark.parametrize("target", [SM80, SM90], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("heads, dim", [(12, 64), (5, 40)], ids=str)
def test_what_finishes_for_torch(monkeypatch, tmp_path, target, heads, dim):
    kernel = Recorder(triton_varlen._finish_kernel)
    query = torch.empty(8192, heads, dim, dtype=BF16, device="meta")
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    lse = torch.empty(heads, 8192, device="meta")
    by_torch = (lambda *args, **kwargs: (query, lse), None, True)
    monkeypatch.setattr(triton_varlen, "_varlen_attn", lambda: by_torch)
    monkeypatch.setattr(triton_varlen, "_finish_kernel", kernel)
    layout = (cu, None, None, None, 4096, 0.125, -1, -1, 0, False, False)
    triton_varlen.forward(triton_call.call_of(query, query, query, *layout))
    check(kernel.launches, target, tmp_path)


# Every kernel x configuration x target takes minutes; the tests below cover each kernel.
exhaustive = pytest.mark.skipif(
    os.environ.get("LEAN_KERNELS_EXHAUSTIVE") != "1", reason="LEAN_KERNELS_EXHAUSTIVE=1 runs it"
)
TARGETS = pytest.mark.parametrize("target", SHARED_KIB, ids=lambda t: str(t.arch))


@pytest.mark.parametrize("longest", [16, 64, 256, None])
def test_bert_on_hopper(record, tmp_path, longest):
    launches = record(SM90, longest)
    assert names(launches) == CLASSES[longest]
    check(launches, SM90, tmp_path)


@pytest.mark.parametrize("target", [SM80, GFX942], ids=lambda t: str(t.arch))
def test_bert_elsewhere(record, tmp_path, target):
    check([*record(target, 64)], target, tmp_path)


@exhaustive
@TARGETS
@pytest.mark.parametrize("longest", CLASSES)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_every_half_configuration(record, tmp_path, target, dim, longest):
    check(record(target, longest, dim), target, tmp_path)


@exhaustive
@TARGETS
@pytest.mark.parametrize("longest", [16, 32, None])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_float32_configuration(record, tmp_path, target, dim, longest):
    # ptxas may spill a few registers of exact products rather than lose a resident block.
    check(record(target, longest, dim, FP32), target, tmp_path, allowed=16)


@exhaustive
@TARGETS
@pytest.mark.parametrize("longest", [64, 256, None])
@pytest.mark.parametrize("positions", [False, True])
def test_every_option_at_once(record, tmp_path, target, positions, longest):
    options = EVERYTHING | {"positions": positions, "scale": -0.1}
    check(record(target, longest, 48, FP16, **options), target, tmp_path, allowed=32)


@exhaustive
@TARGETS
@pytest.mark.parametrize("left", [-1, 1024])
def test_decoders(record, tmp_path, target, left):
    check(record(target, None, 128, kv_heads=3, left=left, right=0), target, tmp_path, allowed=16)


@exhaustive
@TARGETS
def test_decoding(record, tmp_path, target):
    options = {"heads": 32, "kv_heads": 8, "tokens": 64, "sequences": 64, "keys": 2**16}
    launches = record(target, None, 128, right=0, **options)
    assert names(launches) == CLASSES[None]
    check(launches, target, tmp_path)


@pytest.mark.parametrize("longest", [16, 64, 256, None])
@pytest.mark.parametrize("kv_heads", [12, 2])
def test_programs_are_bounded_by_shapes(record, longest, kv_heads):
    tokens, sequences = 8192, 512
    for launch in record(SM90, longest, kv_heads=kv_heads, sequences=sequences):
        name, options = launch.kernel.fn.__name__, launch.options
        if name in ("_packed_kernel", "_grad_packed_kernel"):
            assert launch.grid[0] == sequences // options["SEQUENCES"]
        elif name == "_resident_kernel":
            assert launch.grid[0] == sequences
        else:
            by_rows = name in ("_tiles_kernel", "_grad_query_kernel")
            rows = tokens * (12 // kv_heads) if by_rows else tokens
            block = options["BLOCK_M" if by_rows else "BLOCK_N"]
            assert launch.grid[0] <= rows // block + sequences + 1


def test_short_sequences_share_a_program(record):
    # 2048 sequences of up to 5 tokens: three to a tile, and all heads of them in a program.
    forward = record(SM90, 5, tokens=4096, sequences=2048)[1]
    assert forward.options["BLOCK"] == 16 and forward.options["SEQUENCES"] == 3
    assert forward.options["HEADS_PER_PROGRAM"] == 12
    few = record(SM90, 5, tokens=40, sequences=8)[1]
    assert few.options["HEADS_PER_PROGRAM"] == 1


def test_hopper_uses_wgmma(record):
    for longest in (64, None):
        for launch in record(SM90, longest):
            assert "wgmma.mma_async" in launch.compile(SM90).asm["ptx"], launch.kernel


def test_operands_move_sixteen_bytes_at_a_time(record):
    for longest in (16, 64, 256, None):
        for launch in record(SM90, longest):
            ptx = launch.compile(SM90).asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", ptx)
            assert "10" in copies and set(copies) <= {"10", "4"}, launch.kernel
            assert not re.search(r"ld\.global\S*\.b16", ptx), launch.kernel


def test_offsets_are_64_bit(record):
    for longest in (16, 256, None):
        for launch in record(SM90, longest):
            ir = launch.compile(SM90).asm["ttir"]
            steps = re.findall(
                r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<bf16>>, tensor<\d+x\d+x(i\d+)>", ir
            )
            assert "i64" in steps, launch.kernel


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def test_float32_is_exact_unless_asked(record, request):
    def precisions(dtype):
        return {launch.options["PRECISION"] for launch in record(SM90, None, 64, dtype)}

    assert precisions(FP32) == {"ieee"}
    request.getfixturevalue("tf32")
    assert precisions(FP32) == {"tf32"} and precisions(BF16) == {"ieee"}


def test_cpu_tensors_without_the_interpreter_are_refused():
    x = torch.zeros(2, 1, 16)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="needs tensors on a GPU, got cpu"):
        launcher.forward(x, x, x, cu, None, None, None, -1, 1.0, -1, -1, 0, False, False)
