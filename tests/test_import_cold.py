# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

_SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
_OPTIONAL = {"transformers", "triton", "matplotlib", "onnxruntime", "openvino", "onnx", "packaging"}


def cold(statement: str) -> tuple[float, set[str]]:
    """Seconds a statement takes in a fresh process that has torch, and what it imports."""
    script = _SCRIPT.format(statement=statement)
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    seconds, modules = json.loads(output.splitlines()[-1])
    return seconds, {name.partition(".")[0] for name in modules}


def test_import_is_cheap_and_pulls_in_nothing_optional():
    runs = [cold("import lean_kernels") for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.05
    assert not runs[0][1] & _OPTIONAL


def test_converting_pulls_in_nothing_optional():
    _, modules = cold(
        "import lean_kernels as lk\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "lk.convert(model, {'linear': {'0': {'density': 0.5}}})(torch.ones(1, 64))"
    )
    assert "lean_kernels" in modules
    assert not modules & _OPTIONAL


def test_compressing_does_not_wait_for_dynamo():
    script = "import sys, lean_kernels.compress.ngrams; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_without_transformers_load_says_what_to_install():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import lean_kernels as lk\n"
        "try:\n    lk.load('anywhere')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "lean_kernels[hf]"' in done.stdout, done.stderr


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_every_name_in_the_readme_is_there():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"\blk\.[a-zA-Z_.]*\w", readme)))
    assert len(names) > 10
    script = "import sys, lean_kernels as lk\nfor name in sys.argv[1:]: eval(name)"
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
