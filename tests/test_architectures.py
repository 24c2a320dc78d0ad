# SPDX-License-Identifier: Apache-2.0
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels import architectures
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear.reference import ACTIVATIONS

transformers = pytest.importorskip("transformers")

_CONFIG = SimpleNamespace(
    hidden_size=32,
    intermediate_size=64,
    hidden_act="silu",
    hidden_activation="silu",
    mlp_bias=False,
    layer_norm_eps=1e-5,
    dropout=0.0,
    resid_pdrop=0.0,
    chunk_size_feed_forward=0,
    dim=32,
    hidden_dim=64,
    activation="silu",
    activation_function="silu",
)


@pytest.mark.parametrize("qualified", sorted(architectures._FUSABLE))
def test_fusing_keeps_what_a_module_computes(qualified):
    module, _, name = qualified.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    model = owner(64, _CONFIG) if name == "GPT2MLP" else owner(_CONFIG)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 32)
    expected = model.eval()(x)
    linear, activation = architectures._FUSABLE[qualified]
    lk.convert(model, {"linear": {linear: {"density": 1.0}}})
    lean = getattr(model, linear)
    assert isinstance(lean, BlockSparseLinear) and lean.activation == "silu"
    assert type(getattr(model, activation)) is nn.Identity
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_every_known_activation_computes_what_its_name_says():
    from transformers.activations import ACT2FN

    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    known = set()
    for name in ACT2FN:
        module = ACT2FN[name]
        function = architectures.activation_function(module)
        if function is None:
            continue
        known.add(name)
        torch.testing.assert_close(module(x), ACTIVATIONS[function](x), rtol=1e-8, atol=1e-8)
    assert known >= {"gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish"}
    assert known.isdisjoint({"quick_gelu", "gelu_10", "relu6", "tanh", "relu2"})


@pytest.mark.parametrize("function", [name for name in ACTIVATIONS if name])
def test_modules_and_functions_are_inverse(function):
    assert architectures.activation_function(architectures.activation_module(function)) == function


def test_unknown_activations_and_classes_are_not_fused():
    class BertIntermediate(nn.Module):  # the name alone proves nothing
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(32, 32)
            self.intermediate_act_fn = nn.GELU()

    model = BertIntermediate()
    lk.convert(model, {"linear": {"dense": {"density": 0.5}}})
    assert model.dense.activation is None and type(model.intermediate_act_fn) is nn.GELU

    from transformers.models.bert.modeling_bert import BertIntermediate as Real

    model = Real(SimpleNamespace(**{**vars(_CONFIG), "hidden_act": "quick_gelu"}))
    lk.convert(model, {"linear": {"dense": {"density": 1.0}}})
    assert model.dense.activation is None
    assert "QuickGELUActivation" in model.lean_report().entries[0].note

    model = Real(_CONFIG)
    lk.convert(model, {"linear": {"dense": {"density": 1.0, "fuse_activation": False}}})
    assert model.dense.activation is None
