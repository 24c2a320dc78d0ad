# SPDX-License-Identifier: Apache-2.0
"""Small random models of each family, dense and lean, and what makes two of them the same."""

import json
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lean_kernels as lk
from lean_kernels.nn import BlockSparseLinear

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 90,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "minilm": lambda: transformers.BertConfig(**{**SIZES, "hidden_size": 48}),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=90, max_position_embeddings=40, dim=64, n_layers=2, n_heads=2, hidden_dim=112
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES,
        pad_token_id=1,
        bos_token_id=0,
        cls_token_id=0,
        sep_token_id=2,
        eos_token_id=2,
        local_attention=8,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=90,
        n_positions=40,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, pad_token_id=1, tie_word_embeddings=True
    ),
}
ENCODERS = ["bert", "minilm", "roberta", "distilbert", "modernbert"]
LINEAR = [family for family in CONFIGS if family != "modernbert"]
HEADS = {
    "AutoModel": LINEAR,
    "AutoModelForSequenceClassification": LINEAR,
    "AutoModelForMaskedLM": ["bert", "roberta", "distilbert"],
    "AutoModelForCausalLM": ["gpt2", "llama"],
}
CASES = [(auto, family) for auto, families in HEADS.items() for family in families]
IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 10, 12, 2]])
MASK = torch.ones_like(IDS)


def dense(family="bert", auto="AutoModel"):
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(CONFIGS[family]()).eval()
    for parameter in model.parameters():  # biases start at zero, which would hide a lost one
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def lean(family="bert", auto="AutoModel", density=0.4):
    model = dense(family, auto)
    return lk.convert(model, {"linear": {"*": {"density": density, "block_shape": [16, 16]}}})


@torch.no_grad()
def run(model):
    return model(input_ids=IDS, attention_mask=MASK)[0]


def lean_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def assert_same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    kinds = [type(module) for module in first.modules()]
    assert kinds == [type(module) for module in second.modules()]
    layers = zip(lean_layers(first).values(), lean_layers(second).values(), strict=True)
    for one, other in layers:
        assert one.extra_repr() == other.extra_repr()
        assert one.weight.stride() == other.weight.stride() and one.weight.stride(1) == 1
    assert torch.equal(run(first), run(second))


def edit_config(directory, edit):
    """Change the description of a saved model in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(directory, edit):
    """Change the tensors of a saved model in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load_elsewhere(imports, directory):
    """Load a saved BERT in another process that imports this first."""
    script = (
        f"{imports}\nmodel = AutoModel.from_pretrained({str(directory)!r})\n"
        "print(type(model.encoder.layer[0].output.dense).__name__)\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
