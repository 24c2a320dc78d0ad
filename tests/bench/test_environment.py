# SPDX-License-Identifier: Apache-2.0
"""What a benchmark report says about its machine, and what it must not say."""

import json
from pathlib import Path

from bench import environment, peak


def test_environment_says_these_things_and_no_others():
    found = environment.collect("cpu", threads=1)
    expected = "cpu isa torch_isa forced_isa cores threads cpu_kernels platform versions commit"
    assert set(found) == {*expected.split(), "dirty", "load_average", "time"}
    assert str(Path.home()) not in json.dumps(found)
    assert environment.describe(found).startswith(found["cpu"])


def test_device_slug_is_a_folder_name():
    found = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "isa": ["avx512f"], "torch_isa": "AVX512"}
    assert (
        environment.device_slug(found | {"threads": 2}) == "intel-xeon-cpu-2-20ghz-avx512-2-threads"
    )
    assert environment.device_slug({"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_unknown_roof_is_none(monkeypatch):
    monkeypatch.setattr(peak._extension, "load_cpu", lambda: "not built")
    assert peak.fma_peak(1) is None


def test_read_bandwidth_is_plausible():
    assert 0.5 < peak.read_bandwidth(1) < 5000
