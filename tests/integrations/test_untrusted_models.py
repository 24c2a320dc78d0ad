# SPDX-License-Identifier: Apache-2.0
"""A saved model may come from anyone: what does not fit its description must not load."""

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from hf_models import edit_config, edit_tensors  # noqa: E402

import lean_kernels as lk  # noqa: E402

LAYER = "encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=4), "format version 4; lean_kernels .* reads up to 3"),
        (lambda c: c.update(format_version="1"), "format_version must be 1 or up, got '1'"),
        (lambda c: c.pop("format_version"), "format_version must be 1 or up, got None"),
        (lambda c: c.update(scheme=3), "unknown keys in quantization_config: scheme"),
        (lambda c: c.update(modules={}), "modules must be a non-empty table"),
        (lambda c: c.update(modules=[LAYER]), "modules must be a non-empty table"),
        (lambda c: c["modules"].update({LAYER: 3}), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].pop("nnz"), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].update(rank=3), "must have exactly the keys"),
        (lambda c: c["modules"][LAYER].update(kind="low_rank"), "unknown kind 'low_rank'"),
        (lambda c: c["modules"][LAYER].update(nnz=10**9), r"nnz must lie in \[0, 28\]"),
        (lambda c: c["modules"][LAYER].update(nnz=-1), r"nnz must lie in \[0, 28\]"),
        (lambda c: c["modules"][LAYER].update(nnz=True), "nnz has the wrong type"),
        (lambda c: c["modules"][LAYER].update(nnz=3), "weight has shape .*, expected"),
        (lambda c: c["modules"][LAYER].update(block_shape=[16, 0]), "sizes must be positive"),
        (lambda c: c["modules"][LAYER].update(block_shape=[8, 16]), "has shape"),
        (lambda c: c["modules"][LAYER].update(block_shape=["a", "b"]), "sizes must be positive"),
        (lambda c: c["modules"][LAYER].update(in_features=80), "is saved as .* the dense model"),
        (lambda c: c["modules"][LAYER].update(bias=False), "bias is no tensor of"),
        (lambda c: c["modules"][LAYER].update(activation="tanh"), "unknown activation 'tanh'"),
        (lambda c: c["modules"][LAYER].update(activation="relu"), "said to run .* as 'relu'"),
        (lambda c: c["modules"][LAYER].update(fused_module="dense"), "said to run 'dense'"),
        (lambda c: c["modules"][LAYER].update(fused_module="nothing"), "said to run 'nothing'"),
        (lambda c: c["modules"].update({"x.y": c["modules"][LAYER]}), "has no module 'x.y'"),
        (lambda c: c["modules"].pop(LAYER), "has shape|is missing"),
    ],
)
def test_a_wrong_description_is_an_error(saved, edit, message):
    edit_config(saved, edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(saved)


def _set(name, value):
    return lambda tensors: tensors.update({f"{LAYER}.{name}": value(tensors[f"{LAYER}.{name}"])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (lambda t: t.pop(f"{LAYER}.crow_indices"), f"{LAYER}.crow_indices is missing"),
        (lambda t: t.pop(f"{LAYER}.bias"), f"{LAYER}.bias is missing"),
        (lambda t: t.pop("embeddings.LayerNorm.weight"), "embeddings.LayerNorm.weight is missing"),
        (lambda t: t.update({f"{LAYER}.scale": torch.ones(2)}), f"{LAYER}.scale is no tensor of"),
        (_set("weight", lambda w: w[:-1].clone()), r"weight has shape"),
        (_set("weight", lambda w: w.to(torch.int32)), "weight must be a floating point"),
        (_set("bias", lambda b: b[:-1].clone()), r"bias has shape \[111\], expected \[112\]"),
        (_set("crow_indices", lambda i: i[:-1].clone()), "crow_indices has shape"),
        (_set("crow_indices", lambda i: i.flip(0)), "crow_indices must rise"),
        (_set("crow_indices", lambda i: i.to(torch.int64)), "crow_indices must be int32"),
        (_set("col_indices", lambda i: i + 1000), r"col_indices must lie in \[0, 4\)"),
        (_set("col_indices", lambda i: i - 1), r"col_indices must lie in \[0, 4\)"),
        (_set("col_indices", lambda i: i * 0), "col_indices must ascend"),
        (_set("col_indices", lambda i: i.float()), "col_indices must be int32"),
    ],
)
def test_wrong_weights_are_an_error(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(saved)


def test_a_missing_lean_tensor_is_an_error_in_another_class_too(saved):
    edit_tensors(saved, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(ValueError, match=f"bert.{LAYER}.weight is missing"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_shapes_of_ordinary_tensors_are_checked(saved):
    name = "embeddings.word_embeddings.weight"
    edit_tensors(saved, lambda tensors: tensors.update({name: tensors[name][:50].clone()}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[50, 64\], expected \[90, 64\]"):
        transformers.AutoModel.from_pretrained(saved)


def test_pickled_weights_are_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        transformers.AutoModel.from_pretrained(saved)
    with pytest.raises(OSError, match="safetensors"):
        lk.load(saved)
