# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: what it links to, each instruction set, and life without it."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lean_kernels import _extension

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lean_kernels" / "_C.abi3.so"
LIBRARIES = [LIBRARY, LIBRARY.with_name("_C_cuda.abi3.so")]
ISA_OBJECTS = sorted(ROOT.glob("build/temp.*/*/csrc/cpu/isa/*.o"))

compiled = pytest.mark.skipif(_extension.load_cpu() is not None, reason=str(_extension.load_cpu()))
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")


def run(*command, cwd=ROOT, check=True, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=check,
        capture_output=True,
        text=True,
    )


def info(**options):
    return json.loads(run("-m", "lean_kernels", "info", "--json", **options).stdout)


def symbols(path, *options):
    """(type letter, demangled name) of each symbol."""
    lines = subprocess.run(
        ["nm", "-C", *options, str(path)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [tuple(line[17:].split(" ", 1)) for line in lines]


@compiled
@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_only_the_stable_abi_of_torch_is_used(library):
    if not library.exists():
        pytest.skip("not built")
    undefined = [name for _, name in symbols(library, "-D", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    # at:: and c10:: change from release to release; Python is not linked at all
    unstable = [n for n in undefined if re.search(r"\b(at|c10|torch|caffe2)::|^_?Py", n)]
    assert not unstable


@compiled
@needs_nm
def test_only_the_entry_points_are_exported():
    exported = {name for _, name in symbols(LIBRARY, "-D", "--defined-only")}
    ours = {name for name in exported if "lean_kernels" in name}
    assert ours == {"lean_kernels_cpu_isa", "lean_kernels_fma_peak"}


@compiled
@needs_nm
@pytest.mark.skipif(not ISA_OBJECTS, reason="no objects in build/: not built in place")
@pytest.mark.parametrize("path", ISA_OBJECTS, ids=lambda path: f"{path.parts[-5]}-{path.stem}")
def test_no_code_of_one_instruction_set_can_stand_in_for_anothers(path):
    """The linker keeps one copy of a weak symbol: of AVX-512 code, say, for all processors."""
    defined = symbols(path, "--defined-only")
    assert not [name for letter, name in defined if letter in "WwVvu"]
    shared = [name for letter, name in defined if letter.isupper() and letter not in "WVU"]
    assert shared
    assert all(name.startswith(f"lean_kernels::{path.parts[-5]}::") for name in shared)


@cache
def available_isas():
    done = run("-c", RUN_ONCE, check=False, LEAN_KERNELS_CPU_ISA="none")
    return done.stderr.rpartition("expected one of: ")[2].strip().split(", ")


RUN_ONCE = """
import torch
from lean_kernels.ops import block_sparse_linear
zero, one = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
block_sparse_linear(torch.ones(2, 16), torch.ones(1, 16, 16), one, zero, out_features=16)
"""


@compiled
def test_an_unknown_instruction_set_is_an_error():
    done = run("-c", RUN_ONCE, check=False, LEAN_KERNELS_CPU_ISA="sse9")
    assert done.returncode == 1
    assert re.search(
        r"RuntimeError: LEAN_KERNELS_CPU_ISA=sse9 is not available here; "
        r"expected one of: .*generic",
        done.stderr,
    )
    report = json.loads(
        run("-m", "lean_kernels", "info", "--json", LEAN_KERNELS_CPU_ISA="x").stdout
    )
    assert report["cpu"]["kernels_use"] is None


@compiled
def test_the_best_instruction_set_is_the_default():
    library = ctypes.CDLL(str(LIBRARY))
    library.lean_kernels_cpu_isa.restype = ctypes.c_char_p
    wanted = os.environ.get("LEAN_KERNELS_CPU_ISA") or available_isas()[0]
    assert library.lean_kernels_cpu_isa().decode() == wanted == _extension.cpu_isa()


@compiled
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
def test_numerics_of_each_instruction_set(isa):
    if isa not in available_isas():
        pytest.skip(f"this processor, or this build, has no {isa}")
    report = json.loads(
        run("-m", "lean_kernels", "info", "--json", LEAN_KERNELS_CPU_ISA=isa).stdout
    )
    assert report["cpu"]["kernels_use"] == isa
    files = [
        f"tests/ops/test_{op}{part}.py"
        for op in ("block_sparse_linear", "ragged_attention")
        for part in ("", "_gradients")
    ]
    others = ("add_layer_norm", "block_sparse_linear_int8", "tensor_product_embedding")
    others += ("token_selection",)
    files += [f"tests/ops/test_{op}.py" for op in others]
    core = (
        "cpu and (sizes or epilogue or height or every or range or activations or head_dims or "
        "groups or definition)"
    )
    done = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", core),
        check=False,
        LEAN_KERNELS_CPU_ISA=isa,
        MALLOC_PERTURB_="1",  # glibc then fills new memory with 0xfe
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, nothing built."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "lean_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


WORKS = """
import torch, lean_kernels as lk
layer = lk.nn.BlockSparseLinear.from_linear(torch.nn.Linear(64, 64), density=0.5)
x = torch.randn(3, 64)
torch.testing.assert_close(layer(x), layer.to_linear()(x))
layer(x).sum().backward()
assert layer.weight.grad.abs().sum() > 0
weight, crow, col = layer.weight, layer.crow_indices, layer.col_indices
try:
    lk.ops.block_sparse_linear(x, weight, crow, col, out_features=64, impl="cpu")
except RuntimeError as error:
    print(error)
"""


def assert_pure_python_works(tree, reason):
    said = run("-c", WORKS, cwd=tree).stdout
    assert said.startswith("block_sparse_linear: impl 'cpu' is not available: ")
    assert reason in said
    report = info(cwd=tree)
    assert reason in report["ops"]["block_sparse_linear"]["cpu"]
    assert report["cpu"]["kernels_use"] is None


def test_a_package_without_its_library_works_and_says_so(tree):
    assert_pure_python_works(tree, "not built; reinstall with a C++ compiler and torch present")


def test_a_library_that_does_not_load_is_reported(tree):
    (tree / "lean_kernels" / LIBRARY.name).write_bytes(b"not a library")
    assert_pure_python_works(tree, f"{LIBRARY.name} could not be loaded: ")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LEAN_KERNELS_BUILD": "none"}, "LEAN_KERNELS_BUILD=none when the package was built"),
        ({"CXX": "/no/such/c++", "CC": "/no/such/cc"}, "the build failed: CompileError: "),
        ({"PYTHONPATH": "without_torch"}, "torch is not importable where the package is built"),
    ],
    ids=["none", "no compiler", "no torch"],
)
def test_a_build_that_fails_still_installs(tree, environment, reason):
    stub = tree / "without_torch" / "torch.py"
    stub.parent.mkdir()
    stub.write_text("raise ImportError('no torch here')\n")
    run("setup.py", "build_ext", "--inplace", cwd=tree, **environment)
    assert not list(tree.rglob("*.so"))
    assert_pure_python_works(tree, reason)
    run("setup.py", "build", "--build-base", "out", cwd=tree, **environment)
    (recorded,) = tree.glob("out/lib*/lean_kernels/_build_info.json")
    assert reason in json.loads(recorded.read_text())["cpu"]
    if "LEAN_KERNELS_BUILD" not in environment:
        strict = environment | {"LEAN_KERNELS_BUILD": "required"}
        assert run("setup.py", "build_ext", "--inplace", cwd=tree, check=False, **strict).returncode
