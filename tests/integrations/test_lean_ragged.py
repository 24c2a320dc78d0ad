# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="lean_ragged", on its own."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_models import CONFIGS, ENCODERS, SIZES, dense  # noqa: E402
from test_lean_encoder import assert_rms, batch, hidden  # noqa: E402

import lean_kernels  # noqa: E402, F401

DECODERS = {
    "gpt2": CONFIGS["gpt2"],
    "llama": CONFIGS["llama"],
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, num_key_value_heads=1, sliding_window=4, pad_token_id=1
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=3,
        max_window_layers=1, pad_token_id=1,
    ),
}  # fmt: skip


def decoder(family):
    torch.manual_seed(0)
    config = DECODERS[family]()
    config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def lean_twin(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("lean_ragged")
    return twin


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, side):
    model = dense(family)
    ids, mask = batch(side, (17, 9, 1, 12))
    tokens = mask.bool()
    lean = lean_twin(model)
    assert_rms(hidden(lean, ids, mask)[tokens], hidden(model, ids, mask)[tokens], 1e-6)
    assert_rms(hidden(lean, ids), hidden(model, ids), 1e-6)
    assert hidden(lean, ids, torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", list(DECODERS))
def test_decoders_in_one_pass(family, side):
    model = decoder(family)
    ids, mask = batch(side, (17, 9, 1, 12))
    tokens = mask.bool()
    lean = lean_twin(model)
    assert_rms(hidden(lean, ids, mask)[tokens], hidden(model, ids, mask)[tokens], 2e-6)
    assert_rms(hidden(lean, ids), hidden(model, ids), 2e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", list(DECODERS))
def test_generation_with_a_cache(family, cache):
    model = decoder(family)
    ids, mask = batch("left", (8, 5, 1))
    options = {
        "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True,
    }  # fmt: skip
    expected = model.generate(ids, **options)
    found = lean_twin(model).generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_rms(one, other, 2e-6)


def test_a_prompt_in_two_parts():
    model = decoder("llama")
    lean = lean_twin(model)
    ids, mask = batch("left", (12, 9, 4))
    with torch.no_grad():
        for mask_of in (lambda end: mask[:, :end], lambda end: None):
            outputs = []
            for run in (model, lean):
                first = run(ids[:, :7], attention_mask=mask_of(7), use_cache=True)
                second = run(
                    ids[:, 7:], attention_mask=mask_of(12), past_key_values=first.past_key_values
                )
                outputs.append(second.logits)
            tokens = mask[:, 7:].bool()
            assert_rms(outputs[1][tokens], outputs[0][tokens], 2e-6)


def test_cross_attention():
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 2}
    layers = {"num_hidden_layers": 2, "vocab_size": 90, "max_position_embeddings": 40}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **sizes, **layers, is_decoder=True, add_cross_attention=True, use_cache=False
    )
    model = transformers.BertModel(config).eval()
    lean = lean_twin(model)
    ids, mask = batch("right", (9, 4))
    for length in (5, 9):  # also as many queries as keys
        states, other = torch.randn(2, 9, 64), {"encoder_attention_mask": mask}
        with torch.no_grad():
            found, expected = (
                run(ids[:, :length], encoder_hidden_states=states, **other)[0]
                for run in (lean, model)
            )
        assert_rms(found, expected, 2e-6)


def test_gradients_with_and_without_dropout():
    model = decoder("llama")
    ids, mask = batch("right", (17, 9, 1, 12))
    grads = []
    for run in (model, lean_twin(model)):
        run.train()
        run(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        grads.append([p.grad for p in run.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    bert = lean_twin(dense("bert")).train()
    one, other = (bert(ids, attention_mask=mask)[0] for _ in range(2))
    assert not torch.equal(one, other)


def test_it_can_be_asked_for_when_a_model_is_loaded(tmp_path):
    model = dense("bert")
    model.save_pretrained(tmp_path)
    lean = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="lean_ragged")
    ids, mask = batch("right", (9, 4))
    assert lean.config._attn_implementation == "lean_ragged"
    expected = hidden(model, ids, mask)[mask.bool()]
    assert_rms(hidden(lean, ids, mask)[mask.bool()], expected, 1e-6)


def test_what_it_cannot_do():
    ids, mask = batch("right", (9, 4))
    bert = lean_twin(dense("bert"))
    with pytest.raises(ValueError, match="attention_mask must be None or"):
        bert(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="never stored"):
        bert(ids, attention_mask=mask, output_attentions=True)
    with pytest.raises(ValueError, match="a pattern that is not causal"):
        places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        lean_twin(decoder("llama"))(ids[:1], position_ids=places, use_cache=False)
    gemma = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=1, head_dim=32, attn_logit_softcapping=5.0, pad_token_id=1
    )
    with pytest.raises(ValueError, match="softcap is not supported"):
        lean_twin(transformers.AutoModel.from_config(gemma))(ids)
