# SPDX-License-Identifier: Apache-2.0
"""Scores measured on a model are those its own attention probabilities have."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification, BertModel

import lean_kernels as lk
from lean_kernels.compress import tokens
from lean_kernels.nn import LeanEncoder
from lean_kernels.recipe import TokenRule

LENGTHS = (9, 4, 1)


def bert(kind=BertModel, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
        attn_implementation="eager",
        **options,
    )
    return kind(config).eval()


def batch():
    torch.manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(5, 50, mask.shape), "attention_mask": mask}


@torch.no_grad()
def expected_scores(model, exclude_diagonal=False):
    """Column sums of the probabilities, from transformers itself."""
    inputs = batch()
    found = []
    for p in model(**inputs, output_attentions=True).attentions:  # [B, H, S, S]
        if exclude_diagonal:
            p = p * (1 - torch.eye(p.shape[-1]))
        rows = p * inputs["attention_mask"][:, None, :, None]
        scores = rows.sum(dim=(1, 2)) / (p.shape[1] * torch.tensor(LENGTHS)[:, None])
        found.append(scores[inputs["attention_mask"].bool()])
    return found


@pytest.mark.parametrize("exclude_diagonal", [False, True])
def test_scores_are_column_means_of_the_probabilities(exclude_diagonal):
    model = bert()
    measured = tokens.measure_scores(model, [batch()], exclude_diagonal=exclude_diagonal)
    assert measured.lengths.tolist() == list(LENGTHS)
    for found, expected in zip(
        measured.scores, expected_scores(model, exclude_diagonal), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = bert().train()
    encoder = model.encoder
    encoder.layer[1].eval()
    tokens.measure_scores(model, [batch()])
    assert model.encoder is encoder and model.training and not encoder.layer[1].training
    with pytest.raises(KeyError):
        tokens.measure_scores(model, [batch(), _Broken()])
    assert model.encoder is encoder and model.training


class _Broken(dict):
    def items(self):
        raise KeyError("broken batch")


def test_a_lean_model_is_measured_without_its_rules():
    plain, lean = bert(BertForSequenceClassification), bert(BertForSequenceClassification)
    rules = {
        "tokens": {"profile": [0.5, 0.4, 0.3]},
        "exits": {"criterion": "confidence", "threshold": 0.0},
    }
    lk.convert(lean, rules)
    encoder, rule = lean.bert.encoder, lean.bert.encoder.token_rule
    inputs = batch() | {"labels": torch.zeros(3, dtype=torch.long)}
    for found, expected in zip(
        tokens.measure_scores(lean, [inputs]).scores,
        tokens.measure_scores(plain, [inputs]).scores,
        strict=True,
    ):
        assert torch.allclose(found, expected, atol=1e-6)
    assert lean.bert.encoder is encoder and encoder.token_rule is rule
    assert isinstance(encoder, LeanEncoder) and encoder.observe_scores is None


def test_batches_progress_and_limit():
    steps = []
    measured = tokens.measure_scores(
        bert(), [batch()] * 5, max_tokens=sum(LENGTHS) + 1, progress=steps.append
    )
    assert measured.lengths.tolist() == list(LENGTHS) * 2 and steps == [0, 1, 2]
    with pytest.raises(ValueError, match="no batches"):
        tokens.measure_scores(bert(), [])


def test_profile_in_one_call():
    model = bert()
    profile = tokens.measure_profile(model, [batch()], mean_kept=0.4)
    measured = tokens.measure_scores(model, [batch()])
    assert profile == tokens.derive_profile(measured, mean_kept=0.4)
    assert sum(profile) / 3 == pytest.approx(0.4)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="found 0 in Linear"):
        tokens.measure_scores(torch.nn.Linear(2, 2), [batch()])


def test_soft_thresholds_train_in_place_of_dropping():
    """LTP: gradients reach the thresholds through a lean model, and hard() makes its rule."""
    model = bert(BertForSequenceClassification, attention_probs_dropout_prob=0.0)
    measured = tokens.measure_scores(model, [batch()])
    start = tokens.calibrate_thresholds(measured, (0.9, 0.6, 0.4))
    lk.convert(model, {"tokens": {"threshold": list(start)}})
    encoder = model.bert.encoder
    encoder.soft_thresholds = soft = tokens.SoftThresholds(3, final=start, temperature=0.05)
    optimizer = torch.optim.Adam(soft.parameters(), lr=1e-2)
    model.train()
    for _ in range(3):
        loss = model(**batch(), labels=torch.tensor([0, 1, 0])).loss + 10 * soft.kept()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The classifier reads first tokens alone, so the last layer drops none.
    assert all(now > before for now, before in zip(soft.hard()[:2], start, strict=False))
    assert soft.hard()[2] == pytest.approx(start[2])
    with pytest.raises(RuntimeError, match="no layer has run"):
        soft.kept()
    encoder.soft_thresholds, encoder.token_rule = None, TokenRule(threshold=soft.hard())
    kept = []
    encoder.observe_scores = lambda layer, scores, cu: kept.append(len(scores))
    with torch.no_grad():
        model.eval()(**batch())
    assert kept[0] == sum(LENGTHS) and kept[0] > kept[1] >= len(LENGTHS)
