# SPDX-License-Identifier: Apache-2.0
"""A lean encoder in the tools people use around a model."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import dense  # noqa: E402
from test_lean_encoder import CLASSIFY, PROFILE, assert_rms, batch, encoder_of, hidden  # noqa: E402

import lean_kernels as lk  # noqa: E402

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "dog",
    "cat",
    "sleeps",
    "runs",
    "rain",
    "on",
    "house",
    ".",
]
TEXTS = ["the dog sleeps .", "rain", "the cat runs on the house . the dog runs"]


def test_trainer_fine_tunes_while_tokens_are_dropped(tmp_path):
    pytest.importorskip("accelerate")
    model = lk.convert(dense("bert", CLASSIFY), {"tokens": {"profile": PROFILE}})
    before = copy.deepcopy(model.state_dict())
    ids, mask = batch(lengths=(17, 9, 12, 14))
    ids[:, 0] = torch.tensor([5, 6, 5, 6])  # the label, in a token that always stays
    samples = [
        {"input_ids": ids[row], "attention_mask": mask[row], "labels": torch.tensor(row % 2)}
        for row in range(4)
    ]
    seen = []
    feed_forward = encoder_of(model).layers[0].intermediate.dense
    hook = feed_forward.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=30,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30 and min(losses[-5:]) < 0.5 * losses[0]
    assert seen == [12 + 7 + 9 + 10] * 30  # tokens of 17, 9, 12, 14
    hook.remove()
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert any("layer.1" in name for name in changed) and any("layer.0" in name for name in changed)
    saved = tmp_path / "runs" / "checkpoint-30"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    assert encoder_of(loaded).token_rule == encoder_of(model).token_rule
    model.eval()
    assert torch.equal(hidden(loaded, ids, mask), hidden(model, ids, mask))


def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=16)
    model = dense("bert")

    def sentences(folder):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        words = modules.Transformer(str(folder))
        pooling = modules.Pooling(words.get_embedding_dimension())
        return sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu")

    expected = sentences(tmp_path / "dense").encode(TEXTS, convert_to_tensor=True)
    lk.convert(model, {"tokens": {}})
    packed = sentences(tmp_path / "packed")
    assert encoder_of(packed[0]) is not None
    assert_rms(packed.encode(TEXTS, convert_to_tensor=True), expected, 1e-6)

    lk.convert(model, {"tokens": {"profile": PROFILE}})
    dropping = sentences(tmp_path / "dropping")
    found = dropping.encode(TEXTS, convert_to_tensor=True)
    alone = torch.cat([dropping.encode([text], convert_to_tensor=True) for text in TEXTS])
    assert_rms(found, alone, 1e-6)
    assert (found - expected).abs().max() > 1e-3  # something was dropped
    dropping.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)


@pytest.mark.parametrize("tokens", [{}, {"profile": PROFILE}], ids=["packed", "dropping"])
def test_compile_breaks_the_graph_and_computes_the_same(tokens):
    model = lk.convert(dense("bert"), {"tokens": tokens})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for lengths in ((17, 9, 12), (5, 11), (8,)):
        ids, mask = batch(lengths=lengths)
        assert torch.equal(hidden(compiled, ids, mask), hidden(model, ids, mask))
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        hidden(whole, *batch())
    torch.compiler.reset()
