# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from encoder_oracle import keep_above, keep_all, keep_highest, layers_of, trace  # noqa: E402
from hf_models import CONFIGS, ENCODERS, dense  # noqa: E402

import lean_kernels as lk  # noqa: E402
from lean_kernels.convert import to_dense  # noqa: E402
from lean_kernels.encoders import lean_encoders  # noqa: E402
from lean_kernels.nn.packing import kept_counts  # noqa: E402

LENGTHS = (17, 9, 0, 1, 12)
PROFILE = (0.7, 0.4)
CLASSIFY = "AutoModelForSequenceClassification"


def batch(side="right", lengths=LENGTHS):
    """Token ids and mask [B, S]."""
    torch.manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(3, 90, (len(lengths), longest))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(longest - length, longest)] = 1
    return ids, mask


def encoder_of(model):
    (encoder,) = lean_encoders(model).values()
    return encoder


@torch.no_grad()
def hidden(model, ids, mask=None):
    return model(ids, attention_mask=mask)[0]


def rms(error):
    return error.square().mean().sqrt().item()


def assert_rms(actual, expected, bound):
    error = actual.double() - expected.double()
    assert rms(error) <= bound * rms(expected.double()), rms(error)


@pytest.mark.parametrize(
    ("mask_kind", "side"), [("lean_ragged", "right"), ("sdpa", "left"), ("eager", "right")]
)
@pytest.mark.parametrize("family", ENCODERS)
def test_packed_equals_padded(family, side, mask_kind):
    model = dense(family)
    ids, mask = batch(side)
    expected = hidden(model, ids, mask)
    names = list(model.state_dict())
    lk.convert(model, {"tokens": {}})
    model.set_attn_implementation(mask_kind)
    found = hidden(model, ids, mask)
    tokens = mask.bool()
    assert_rms(found[tokens], expected[tokens], 1e-6)
    assert not found[2].isnan().any() and found[2].abs().max() <= 0.0 + (family == "modernbert")
    assert list(model.state_dict()) == names
    for no_padding in (None, torch.ones_like(mask)):
        assert_rms(hidden(model, ids, no_padding), hidden(dense(family), ids), 1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_sequence_is_computed_the_same_in_any_batch(family):
    model = lk.convert(dense(family), {"tokens": {"profile": PROFILE}})
    ids, mask = batch()
    together = hidden(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        if length:
            alone = hidden(model, ids[row : row + 1, :length])
            assert_rms(together[row, :length], alone[0], 1e-6)


def traced(dense_model, choose, ids, **options):
    base = copy.deepcopy(dense_model).double()
    return trace(base, ids, choose, **options)


RULES = {
    "profile": ({"profile": PROFILE}, {}),
    "speed": ({"profile": PROFILE, "speed": 2.0}, {}),
    "sum": ({"profile": PROFILE, "reduction": "sum"}, {"mean": False}),
    "diagonal": ({"profile": PROFILE, "exclude_diagonal": True}, {"exclude_diagonal": True}),
    "ends": ({"profile": (0.3, 0.1), "protect": "ends"}, {}),
    "counts": ({"counts": (10, 3)}, {}),
    "threshold": ({"threshold": (0.07, 0.12)}, {}),
}


@pytest.mark.parametrize("kind", list(RULES))
@pytest.mark.parametrize("family", ENCODERS)
def test_dropping_equals_masking(family, kind):
    rule, options = RULES[kind]
    original = dense(family)
    model = lk.convert(copy.deepcopy(original), {"tokens": rule})
    ids, mask = batch()
    found, dropped = hidden(model, ids, mask), 0
    for row, length in enumerate(LENGTHS):
        if not length:
            assert torch.equal(found[row], hidden(model, ids[:1], mask[2:3])[0])
            continue
        if kind == "threshold":
            choose = keep_above(rule["threshold"])
        else:
            profile = rule.get("profile")
            profile = profile and [f ** rule.get("speed", 1) for f in profile]
            ends = {0, length - 1} if kind == "ends" else {0}
            counts = kept_counts(
                torch.tensor([length]).numpy(),
                2,
                profile=profile,
                counts=rule.get("counts"),
                protected=len(ends),
            )[1:, 0]
            choose = keep_highest(counts.tolist(), ends)
        oracle = traced(original, choose, ids[row, :length], **options)
        expected = oracle.states[-1]
        if family == "modernbert":
            expected = copy.deepcopy(original).double().final_norm(expected)
        assert_rms(found[row, :length], expected, 1e-5)
        dropped += int((~oracle.alive[-1]).sum())
    assert dropped > 5


@pytest.mark.parametrize("family", ENCODERS)
def test_dropped_tokens_as_zeros(family):
    rule = {"profile": PROFILE, "dropped": "zeros"}
    last, zeros = (
        hidden(lk.convert(dense(family), {"tokens": rule | extra}), *batch())
        for extra in ({"dropped": "last"}, {})
    )
    kept = zeros.ne(0).any(-1)
    assert kept.sum() == sum(math.ceil(0.4 * n - 1e-6) for n in LENGTHS)
    assert torch.equal(last[kept], zeros[kept])


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("profile", [None, PROFILE])
def test_classifiers_compute_one_token_in_the_last_layer(family, profile):
    model = dense(family, CLASSIFY)
    ids, mask = batch(lengths=(17, 9, 1, 12))
    expected = hidden(model, ids, mask)
    rule = {} if profile is None else {"profile": profile}
    short = lk.convert(copy.deepcopy(model), {"tokens": rule})
    whole = lk.convert(copy.deepcopy(model), {"tokens": rule | {"first_only": False}})
    assert encoder_of(short).first_only and not encoder_of(whole).first_only
    if profile is None:
        assert_rms(hidden(short, ids, mask), expected, 1e-6)
    assert_rms(hidden(short, ids, mask), hidden(whole, ids, mask), 1e-6)
    states = hidden(getattr(short, short.base_model_prefix), ids, mask)
    assert states[:, 1:].abs().max() == 0 < states[:, 0].abs().max()
    with torch.no_grad():  # asking for states switches the short cut off
        states = short(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert states[-1][0, 1:].abs().min() > 0


@pytest.mark.parametrize("family", ENCODERS)
def test_classifiers_refuse_padding_where_they_read(family):
    model = lk.convert(dense(family, CLASSIFY), {"tokens": {}})
    with pytest.raises(ValueError, match=r"begins with padding.*pad on the right"):
        hidden(model, *batch("left", lengths=(17, 9)))
    assert hidden(model, *batch("left", lengths=(17, 17))).isfinite().all()
    assert hidden(model, *batch(lengths=(17, 9, 0))).isfinite().all()


def test_models_that_read_more_than_the_first_token_get_it():
    config = CONFIGS["modernbert"]()
    config.classifier_pooling = "mean"
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = batch(lengths=(17, 9, 1))
    expected = hidden(model, ids, mask)
    lk.convert(model, {"tokens": {}})
    assert not encoder_of(model).first_only
    assert_rms(hidden(model, ids, mask), expected, 1e-5)
    for auto in ("AutoModel", "AutoModelForTokenClassification", "AutoModelForMaskedLM"):
        assert not encoder_of(lk.convert(dense("bert", auto), {"tokens": {}})).first_only


@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_are_those_of_the_dense_model(family):
    model = dense(family)
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        lk.convert(model, {"tokens": {}})
        found = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert_rms(one[mask.bool()], other[mask.bool()], 1e-6)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("attention_dropout", [0.0, 1e-12])
def test_training_gradients_are_those_of_the_dense_model(family, attention_dropout):
    """Once through the kernels, once through attention that has dropout, of next to nothing."""
    model = dense(family, CLASSIFY).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = batch(lengths=(17, 9, 1, 12))
    labels = torch.tensor([0, 1, 1, 0])
    grads = []
    for lean in (False, True):
        if lean:
            lk.convert(model, {"tokens": {}})
            layout = encoder_of(model).layout
            for layer in encoder_of(model).layers:
                place = layout.number(layer, "attention_dropout")
                if isinstance(place, nn.Module):
                    place.p = attention_dropout
                else:
                    layer.attn.attention_dropout = attention_dropout
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ENCODERS)
def test_dropout_in_training_acts(family):
    model = lk.convert(dense(family), {"tokens": {}}).train()
    encoder = encoder_of(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    if family == "modernbert":
        for layer in encoder.layers:
            layer.attn.attention_dropout = 0.3
    ids, mask = batch()
    one, other = hidden(model, ids, mask), hidden(model, ids, mask)
    assert not torch.equal(one, other) and one.isfinite().all()
    model.eval()
    assert torch.equal(hidden(model, ids, mask), hidden(model, ids, mask))


def test_training_with_dropping_reaches_all_that_is_used():
    model = lk.convert(dense("bert", CLASSIFY), {"tokens": {"profile": PROFILE}}).train()
    ids, mask = batch(lengths=(17, 9, 1, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[4:]) < losses[0]
    assert all(p.grad is not None for p in model.bert.encoder.layer.parameters())


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing(family):
    model = lk.convert(dense(family), {"tokens": {"profile": PROFILE}}).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = batch()
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=mask)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in layers_of(model)[0].parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_key_scores_can_be_observed():
    original = dense("bert")
    model = lk.convert(copy.deepcopy(original), {"tokens": {}})
    seen = {}
    encoder_of(model).observe_scores = lambda layer, scores, cu: seen.update({layer: (scores, cu)})
    ids, mask = batch()
    hidden(model, ids, mask)
    assert list(seen) == [0, 1]
    oracle = traced(original, keep_all, ids[1, :9])
    for layer, (scores, cu) in seen.items():
        assert cu.tolist() == [0, 17, 26, 26, 27, 39]
        assert_rms(scores[17:26], oracle.scores[layer], 1e-6)


def test_soft_thresholds_weigh_tokens_while_training():
    from lean_kernels.compress.tokens import SoftThresholds

    model = lk.convert(dense("bert"), {"tokens": {"threshold": (0.05, 0.05)}}).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder = encoder_of(model)
    soft = encoder.soft_thresholds = SoftThresholds(2, final=0.05, temperature=1e-2)
    ids, mask = batch()
    found = model(ids, attention_mask=mask)[0]
    found.square().mean().backward()
    assert soft.threshold.grad.ne(0).all()
    kept = found.detach().abs().amax(-1)
    assert (kept[mask.bool()] > 0).all()  # nothing is dropped, only weighed
    with torch.no_grad():
        soft.threshold.fill_(-1e3)  # everything stays whole
    encoder.token_rule = None
    expected = hidden(lk.convert(dense("bert"), {"tokens": {}}), ids, mask)
    assert_rms(model(ids, attention_mask=mask)[0].detach(), expected, 1e-6)
    encoder.soft_thresholds = None
    assert not any("soft" in name for name in model.state_dict())


@pytest.mark.parametrize("family", ENCODERS)
def test_copies_and_casts(family):
    model = lk.convert(dense(family), {"tokens": {"profile": PROFILE}})
    ids, mask = batch()
    expected = hidden(model, ids, mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hidden(twin, ids, mask), expected)
        nn.init.zeros_(next(iter(encoder_of(twin).layers[0].parameters())))
        assert torch.equal(hidden(model, ids, mask), expected)
    assert_rms(hidden(copy.deepcopy(model).bfloat16(), ids, mask), expected, 0.2)
    names = {name for name, _ in to_dense(model).named_modules()}
    assert names == {name for name, _ in dense(family).named_modules()}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(model, ids, mask), hidden(dense(family), ids, mask))


def test_block_sparse_linears_within():
    recipe = {"linear": {"encoder.*": {"density": 0.5, "block_shape": [16, 16]}}}
    model = lk.convert(dense("bert"), recipe)
    ids, mask = batch()
    expected = hidden(model, ids, mask)
    lk.convert(model, {"tokens": {}})
    assert_rms(hidden(model, ids, mask)[mask.bool()], expected[mask.bool()], 1e-6)
    both = lk.convert(dense("bert"), recipe | {"tokens": {}})
    assert torch.equal(hidden(both, ids, mask), hidden(model, ids, mask))
    assert [entry.name for entry in both.lean_report().encoders] == ["encoder"]
    assert "LeanEncoder" in str(both.lean_report()) and "no padding" in str(both.lean_report())


# Every block, so that nothing changes.
SPARSE = {"linear": {"*": {"block_shape": [16, 16], "fuse_activation": False}}}


@pytest.mark.parametrize("recipe", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ENCODERS)
def test_hooks_within_a_layer_see_what_they_see_in_the_dense_model(family, recipe):
    ids, mask = batch()
    packed = lk.convert(dense(family), recipe | {"tokens": {}})
    hidden(packed, ids, mask)  # whatever is kept from pass to pass is there
    seen = {}
    for which, model in (("dense", dense(family)), ("packed", packed)):
        for name, module in layers_of(model)[1].named_modules():
            if not list(module.children()) and not isinstance(module, nn.Dropout | nn.Identity):

                def hook(module, args, output, key=(which, name)):
                    seen[key] = output

                module.register_forward_hook(hook)
        hidden(model, ids, mask)
    names = {name for which, name in seen if which == "packed"}
    assert len(names) >= 5  # the linears, and more
    for name in names:
        expected, found = seen["dense", name], seen["packed", name]
        assert_rms(found, expected[mask.bool()], 1e-5)


@pytest.mark.parametrize("recipe", [{}, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ENCODERS)
def test_autocast_is_as_exact_as_in_the_dense_model(family, recipe):
    ids, mask = batch()
    tokens = mask.bool()
    packed = lk.convert(dense(family), recipe | {"tokens": {}})
    expected = hidden(dense(family).double(), ids, mask)[tokens]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (hidden(m, ids, mask)[tokens] for m in (dense(family), packed))
    assert ours.dtype == theirs.dtype
    assert rms(ours.double() - expected) <= 2 * rms(theirs.double() - expected)


def test_weights_are_not_read_while_they_move():
    model = lk.convert(dense("bert", CLASSIFY), SPARSE | {"tokens": {}})
    layer, read = layers_of(model.bert)[-1], []
    query = layer.attention.self.query
    call = query.forward
    query.forward = lambda x: (read.append(query.weight.data_ptr()), call(x))[1]
    hidden(model, *batch())
    assert read == [query.weight.data_ptr()]  # another thread that moves them frees the old ones


@pytest.mark.parametrize(
    ("family", "recipe", "message"),
    [
        ("gpt2", {"tokens": {}}, "found none in GPT2Model"),
        ("bert", {"tokens": {"profile": [0.5]}}, "for 1 layers, encoder has 2"),
        ("bert", {"exits": {"threshold": 0.5}}, "no sequence classifier around it"),
    ],
)
def test_what_cannot_be_converted(family, recipe, message):
    model = dense(family)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lk.convert(model, recipe)
    assert kinds == [type(module) for module in model.modules()]


def test_decoders_are_refused():
    config = CONFIGS["bert"]()
    config.is_decoder = True
    with pytest.raises(ValueError, match="it is a decoder"):
        lk.convert(transformers.BertModel(config), {"tokens": {}})


def test_what_a_forward_pass_cannot_honour():
    model = lk.convert(dense("bert"), {"tokens": {}})
    ids, mask = batch()
    with pytest.raises(ValueError, match="attention probabilities"):
        model(ids, attention_mask=mask, output_attentions=True)
    square = torch.ones(5, 1, 17, 17, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="only which tokens are padding"):
        model(ids, attention_mask=square)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model.encoder(torch.zeros(2, 3, 64), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="for 3 layers, the encoder has 2"):
        encoder_of(model).token_rule = lk.recipe.TokenRule(counts=(3, 2, 1))
    model.encoder.layer[0].register_forward_hook(lambda *args: args[2] + 1)
    with pytest.raises(ValueError, match="an output to take instead"):
        model(ids, attention_mask=mask)


def test_an_empty_batch():
    model = lk.convert(dense("bert"), {"tokens": {"profile": PROFILE}})
    ids, mask = batch(lengths=(4, 2))
    assert hidden(model, ids[:0], mask[:0]).shape == (0, 4, 64)
    assert hidden(model, ids, torch.zeros_like(mask)).abs().max() == 0
