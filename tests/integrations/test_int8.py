# SPDX-License-Identifier: Apache-2.0
"""int8 weights through recipes, conversion, saving and loading."""

import copy
import json

import pytest
import torch
import transformers
from hf_models import CONFIGS

import lean_kernels as lk
from lean_kernels.nn import BlockSparseLinear

RECIPE = {"linear": {"*.layer.*": {"density": 0.5, "block_shape": [16, 16], "dtype": "int8"}}}
IDS = torch.arange(24).view(2, 12)


def lean(dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS["bert"]()).to(dtype).eval()
    return lk.convert(model, RECIPE)


def int8_layers(model) -> list[BlockSparseLinear]:
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert layers and all(layer.weight.dtype == torch.int8 for layer in layers)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_exact(tmp_path, dtype):
    model = lean(dtype)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert all(entry["int8"] is True for entry in config["modules"].values())
    loaded, info = transformers.AutoModel.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    for a, b in zip(int8_layers(model), int8_layers(loaded), strict=True):
        assert b.weight_scales.dtype == torch.float32
        assert torch.equal(a.weight, b.weight) and torch.equal(a.weight_scales, b.weight_scales)
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, loaded(IDS).last_hidden_state)


def test_it_stays_close_to_the_same_mask_in_float32():
    model = lean()
    wide = copy.deepcopy(RECIPE)
    del wide["linear"]["*.layer.*"]["dtype"]
    torch.manual_seed(0)
    same = transformers.AutoModel.from_config(CONFIGS["bert"]()).eval()
    lk.convert(same, wide)
    with torch.no_grad():
        a, b = model(IDS).last_hidden_state, same(IDS).last_hidden_state
    assert 0 < (a - b).norm() < 0.03 * b.norm()
    report = model.lean_report()
    assert report.lean_bytes < same.lean_report().lean_bytes / 2
    assert report.dense_bytes == same.lean_report().dense_bytes


def test_a_packed_encoder_takes_it():
    model = lean()
    packed = lk.convert(copy.deepcopy(model), {"tokens": {}})
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    with torch.no_grad():
        a, b = (m(IDS, attention_mask=mask).last_hidden_state for m in (model, packed))
    real = mask.bool()
    assert (a[real] - b[real]).norm() < 2e-2 * a[real].norm()


@pytest.mark.parametrize(
    "rule, problem",
    [
        ({"dtype": "int4"}, "unknown dtype 'int4'; expected one of"),
        ({"dtype": "int8", "block_shape": [4, 16]}, "a multiple of 16 outputs"),
    ],
    ids=["dtype", "block"],
)
def test_errors_of_a_recipe(rule, problem):
    with pytest.raises(ValueError, match=problem):
        lk.Recipe.from_dict({"linear": {"*": rule}})


@pytest.mark.parametrize(
    "change", [{"int8": False}, {"int8": 1}, {"block_shape": [4, 16]}], ids=str
)
def test_a_wrong_description_is_refused(tmp_path, change):
    lean().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for entry in config["quantization_config"]["modules"].values():
        entry.update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must have exactly the keys|a multiple of 16 outputs"):
        transformers.AutoModel.from_pretrained(tmp_path)
