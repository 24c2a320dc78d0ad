# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from encoder_oracle import keep_all, keep_highest, trace  # noqa: E402
from hf_models import CONFIGS, ENCODERS, SIZES  # noqa: E402
from test_lean_encoder import assert_rms, batch, encoder_of, hidden  # noqa: E402

import lean_kernels as lk  # noqa: E402
from lean_kernels.convert import to_dense  # noqa: E402
from lean_kernels.nn.packing import kept_counts  # noqa: E402
from lean_kernels.recipe import ExitRule  # noqa: E402

LAYERS = 4
LENGTHS = (17, 9, 1, 12, 5, 14, 3, 8)
PROFILE = (1.0, 0.7, 0.5, 0.3)


def classifier(family="bert", labels=3):
    """A model of LAYERS layers whose exits predict differently sure, and differently."""
    config = CONFIGS[family]()
    setattr(config, "n_layers" if family == "distilbert" else "num_hidden_layers", LAYERS)
    if family == "modernbert":
        config.layer_types = ["full_attention", "sliding_attention"] * 2
    config.num_labels = labels
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # inputs that matter: no two samples alike
            spread = 1.0 if "embedding" in name else 1.5 * parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=spread)
    return model


def with_exits(model, rule, tokens=None):
    model = lk.convert(model, {"exits": rule} | ({} if tokens is None else {"tokens": tokens}))
    for head in encoder_of(model).exits:
        torch.manual_seed(2)
        nn.init.normal_(head.out.weight, std=0.25)
    return model


def alone(model, original, rule, ids, profile):
    """(layer, logits) of one sequence, exit by exit; the criteria as they are defined."""
    base = copy.deepcopy(getattr(original, original.base_model_prefix)).double()
    heads = copy.deepcopy(encoder_of(model).exits).double()
    if profile is None:
        choose = keep_all
    else:
        counts = kept_counts(torch.tensor([len(ids)]).numpy(), LAYERS, profile=profile)[1:, 0]
        choose = keep_highest(counts.tolist())
    states = trace(base, ids, choose).states
    logits = [head(state[:1])[0].detach() for head, state in zip(heads, states[:-1], strict=True)]
    agreed = 0
    for layer, found in enumerate(logits):
        p = found.softmax(-1)
        if rule["criterion"] == "entropy":
            done = -(p * p.log()).sum() < rule["threshold"]
        elif rule["criterion"] == "confidence":
            done = p.max() >= rule["threshold"]
        else:
            before = logits[layer - 1]
            same = found.argmax() == before.argmax()
            if len(found) == 1:
                same = (found - before).abs().item() < rule["threshold"]
            agreed = agreed + 1 if layer and same else 0
            done = agreed >= rule["patience"]
        if done:
            return layer, found
    return LAYERS - 1, None


RULES = {
    "entropy": {"criterion": "entropy", "threshold": 0.9},
    "confidence": {"criterion": "confidence", "threshold": 0.55},
    "patience": {"criterion": "patience", "patience": 1},
    "patient": {"criterion": "patience", "patience": 2},
}


@pytest.mark.parametrize(
    ("family", "kind", "profile"),
    [("bert", kind, None) for kind in RULES]
    + [(family, kind, PROFILE) for family in ENCODERS for kind in ("entropy", "patient")],
)
def test_samples_leave_where_they_would_alone(family, kind, profile):
    rule = RULES[kind]
    original = classifier(family, labels=2 if rule["criterion"] == "patience" else 3)
    tokens = None if profile is None else {"profile": profile}
    model = with_exits(copy.deepcopy(original), rule, tokens)
    ids, mask = batch(lengths=LENGTHS)
    logits = hidden(model, ids, mask)
    layers = encoder_of(model).exit_layers
    encoder_of(model).exit_rule = None
    to_the_end = hidden(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        layer, expected = alone(model, original, rule, ids[row, :length], profile)
        assert layers[row] == layer
        assert_rms(logits[row], to_the_end[row] if expected is None else expected, 1e-5)
    assert len(layers.unique()) > 1  # the test means something


@pytest.mark.parametrize("family", ENCODERS)
def test_exits_combine_with_thresholds(family):
    tokens = {"threshold": [0.02, 0.05, 0.08, 0.1]}
    model = with_exits(classifier(family), RULES["entropy"], tokens)
    ids, mask = batch(lengths=LENGTHS)
    logits = hidden(model, ids, mask)
    layers = encoder_of(model).exit_layers
    for row, length in enumerate(LENGTHS):
        expected = hidden(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert encoder_of(model).exit_layers == layers[row]
        # Two float32 results, each within 1e-6 of the exact one.
        assert_rms(logits[row], expected[0], 2e-6)
    assert len(layers.unique()) > 1


def test_one_output_exits_by_patience():
    original = classifier(labels=1)
    rule = {"criterion": "patience", "patience": 1, "threshold": 0.6}
    model = with_exits(copy.deepcopy(original), rule)
    ids, mask = batch(lengths=LENGTHS)
    logits, layers = hidden(model, ids, mask), encoder_of(model).exit_layers
    for row, length in enumerate(LENGTHS):
        layer, expected = alone(model, original, rule, ids[row, :length], None)
        assert layers[row] == layer
        assert expected is None or abs(logits[row] - expected) < 1e-5
    assert len(layers.unique()) > 1
    with pytest.raises(ValueError, match="predicts one number"):
        lk.convert(classifier(labels=1), {"exits": {"threshold": 0.5}})


def test_everything_leaves_or_nothing_does():
    model = with_exits(classifier(), {"threshold": 100.0})
    ids, mask = batch(lengths=LENGTHS)
    runs = []
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *args: runs.append(1))
    hidden(model, ids, mask)
    assert encoder_of(model).exit_layers.eq(0).all() and not runs
    encoder_of(model).exit_rule = ExitRule(threshold=0.0)
    expected = to_dense(copy.deepcopy(model))
    # Two float32 results, each within 1e-6 of the exact one.
    assert_rms(hidden(model, ids, mask), hidden(expected, ids, mask), 2e-6)
    assert encoder_of(model).exit_layers.eq(LAYERS - 1).all() and runs


def test_a_sequence_of_padding_alone():
    model = with_exits(classifier(), {"threshold": 100.0})
    ids, mask = batch(lengths=(4, 0, 3))
    assert hidden(model, ids, mask).isfinite().all()
    encoder_of(model).exit_rule = ExitRule(threshold=0.0)
    assert hidden(model, ids, mask).isfinite().all()
    assert hidden(model, ids[:0], mask[:0]).shape == (0, 3)


def test_the_loss_is_that_of_the_logits_returned():
    model = with_exits(classifier(), RULES["entropy"])
    ids, mask = batch(lengths=LENGTHS)
    labels = torch.arange(len(LENGTHS)) % 3
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
    assert (encoder_of(model).exit_layers < LAYERS - 1).any()
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("family", ENCODERS)
def test_training_sees_every_exit(family):
    from lean_kernels.compress.exits import joint_loss

    model = with_exits(classifier(family), RULES["entropy"], {"profile": PROFILE}).train()
    ids, mask = batch(lengths=LENGTHS)
    labels = torch.arange(len(LENGTHS)) % 3
    logits = model(ids, attention_mask=mask).logits
    exits = encoder_of(model).exit_logits
    assert [list(t.shape) for t in exits] == [[len(LENGTHS), 3]] * (LAYERS - 1)
    joint_loss([*exits, logits], labels, distillation=0.5).backward()
    for name, parameter in encoder_of(model).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    hidden(model, ids, mask)
    assert encoder_of(model).exit_layers is not None


@pytest.mark.parametrize("family", ENCODERS)
def test_exit_heads_start_as_the_models_own(family):
    original = classifier(family)
    base = copy.deepcopy(getattr(original, original.base_model_prefix))
    model = lk.convert(copy.deepcopy(original), {"exits": RULES["entropy"]})
    ids, _ = batch(lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        state = trace(base, ids[row, :length], keep_all).states[-1][:1]
        with torch.no_grad():
            for head in encoder_of(model).exits:
                assert_rms(head(state), hidden(original, ids[row : row + 1, :length]), 1e-5)


def test_copies_point_at_their_own_encoder():
    model = with_exits(classifier(), RULES["entropy"])
    ids, mask = batch(lengths=LENGTHS)
    expected = hidden(model, ids, mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hidden(twin, ids, mask), expected)
        assert encoder_of(twin) is not encoder_of(model)
        encoder_of(twin).exit_rule = None
        assert not torch.equal(hidden(twin, ids, mask), expected)


def test_threads_do_not_mix_their_exits():
    model = with_exits(classifier(), RULES["entropy"])
    ids, mask = batch(lengths=LENGTHS)
    expected = {row: hidden(model, ids[row:], mask[row:]) for row in range(4)}
    wrong = []

    def serve(row):
        for _ in range(20):
            if not torch.equal(hidden(model, ids[row:], mask[row:]), expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=serve, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_classifier_that_was_replaced_is_noticed():
    model = with_exits(classifier(), {"threshold": 100.0})
    ids, mask = batch(lengths=LENGTHS)
    expected = hidden(model, ids, mask)
    model.classifier = copy.deepcopy(model.classifier)
    model.classifier._forward_hooks.clear()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no classifier took their logits"):
            hidden(model, ids, mask)
    lk.convert(model, {"exits": {"threshold": 100.0}})
    assert torch.equal(hidden(model, ids, mask), expected)
    linear = {"linear": {"classifier": {"density": 1.0, "dense_above": 1.0}}}
    assert torch.equal(hidden(lk.convert(model, linear), ids, mask), expected)


def test_a_base_model_alone_runs_all_layers():
    model = with_exits(classifier(), {"threshold": 100.0})
    ids, mask = batch(lengths=LENGTHS)
    expected = hidden(model, ids, mask)
    states = hidden(model.bert, ids, mask)
    assert encoder_of(model).exit_layers is None
    assert torch.equal(hidden(model, ids, mask), expected)
    assert encoder_of(model).exit_layers.eq(0).all()
    encoder_of(model).exit_rule = None
    assert torch.equal(hidden(model.bert, ids, mask), states)


def test_an_error_within_a_call_leaves_nothing_behind():
    model = with_exits(classifier(), {"threshold": 100.0})
    ids, mask = batch(lengths=LENGTHS)
    expected = hidden(model, ids, mask)
    with pytest.raises(IndexError):
        hidden(model, ids + 10**6, mask)
    encoder_of(model).exit_rule, rule = None, encoder_of(model).exit_rule
    states = hidden(model.bert, ids, mask)
    encoder_of(model).exit_rule = rule
    assert torch.equal(hidden(model.bert, ids, mask), states)
    assert torch.equal(hidden(model, ids, mask), expected)


def test_compile_computes_the_same():
    model = with_exits(classifier(), RULES["entropy"])
    ids, mask = batch(lengths=LENGTHS)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(hidden(compiled, ids, mask), hidden(model, ids, mask))
    torch.compiler.reset()


def test_electra_exits():
    torch.manual_seed(0)
    config = transformers.ElectraConfig(**SIZES | {"num_hidden_layers": LAYERS}, num_labels=3)
    original = transformers.ElectraForSequenceClassification(config).eval()
    model = with_exits(copy.deepcopy(original), RULES["entropy"])
    ids, mask = batch(lengths=LENGTHS)
    logits, layers = hidden(model, ids, mask), encoder_of(model).exit_layers
    for row, length in enumerate(LENGTHS):
        expected = hidden(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert encoder_of(model).exit_layers == layers[row]
        # Two float32 results, each within 1e-6 of the exact one.
        assert_rms(logits[row], expected[0], 2e-6)
    encoder_of(model).exit_rule = ExitRule(threshold=0.0)
    assert_rms(hidden(model, ids, mask), hidden(original, ids, mask), 2e-6)
    for head in lk.convert(
        copy.deepcopy(original), {"exits": RULES["entropy"]}
    ).electra.encoder.exits:
        with torch.no_grad():  # starts as the model's own
            state = original.electra(ids[:1, :5])[0]
            assert_rms(head(state[:, 0]), original.classifier(state), 1e-6)


def test_what_cannot_exit():
    config = CONFIGS["modernbert"]()
    config.classifier_pooling = "mean"
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="it pools by 'mean'"):
        lk.convert(model, {"exits": {"threshold": 0.5}})
    config = CONFIGS["bert"]()
    config.num_hidden_layers = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="needs two layers or more"):
        lk.convert(model, {"exits": {"threshold": 0.5}})
