# SPDX-License-Identifier: Apache-2.0
"""Put a LeanEncoder into a model, take it out again, and say in a file that it is there."""

from torch import nn

from lean_kernels.architectures import ENCODER_FAMILIES, Encoder, find_encoders
from lean_kernels.nn import LeanEncoder, exits
from lean_kernels.recipe import ExitRule, TokenRule, rule_of

_KEYS = ("tokens", "exits")
_OURS = ("exits", "soft_thresholds")  # what a lean encoder has on top of the one it replaced


def lean_encoders(model: nn.Module) -> dict[str, LeanEncoder]:
    """The lean encoders of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LeanEncoder)}


def check_rules(model: nn.Module, tokens: TokenRule | None, exit_rule: ExitRule | None) -> None:
    """Raise ValueError, which says why, where `install` would not work. Changes nothing."""
    found = find_encoders(model)
    if not found:
        raise ValueError(
            f"convert: [tokens] and [exits] need an encoder that LeanEncoder can replace; found "
            f"none in {type(model).__name__}. It knows those of {ENCODER_FAMILIES}, within a model"
        )
    for place in found:
        encoder = model.get_submodule(place.name)
        if not isinstance(encoder, LeanEncoder):
            encoder = LeanEncoder(encoder, place.layout)  # says why where it cannot
        count = len(encoder.layers)
        if tokens is not None and tokens.layers not in (None, count):
            raise ValueError(
                f"convert: [tokens] is for {tokens.layers} layers, {place.name} has {count}"
            )
        if exit_rule is not None:
            _check_exits(model, place, exit_rule, count)


def _check_exits(model: nn.Module, place: Encoder, rule: ExitRule, layers: int) -> None:
    if place.classifier is None:
        raise ValueError(
            f"convert: [exits] cannot be used for {place.name} of {type(model).__name__}: "
            f"{place.why_no_exits}"
        )
    if layers < 2:
        raise ValueError(f"convert: [exits] needs two layers or more, {place.name} has {layers}")
    out = model.get_submodule(place.classifier_name).get_submodule(place.classifier.last)
    if out.out_features == 1 and (rule.criterion != "patience" or rule.threshold is None):
        raise ValueError(
            f"convert: {place.name} predicts one number, which has no entropy or confidence; use "
            "criterion 'patience' with a threshold for how close two exits must be"
        )


def install(
    model: nn.Module, place: Encoder, tokens: TokenRule | None, exit_rule: ExitRule | None
) -> LeanEncoder:
    """Replace an encoder, or give a lean one the rules that are not None. Returns the lean one."""
    encoder = model.get_submodule(place.name)
    if isinstance(encoder, LeanEncoder):
        lean = encoder
    else:
        lean = LeanEncoder(encoder, place.layout)
        _set(model, place.name, lean)
        owner = _owner(model, place.name)
        if owner is not None:
            # Spares the model [B, 1, S, S] masks that we would have to read back.
            lean.attention_before = owner.config._attn_implementation
            owner.set_attn_implementation("lean_ragged")
    if tokens is not None or lean.token_rule is None:
        lean.token_rule = tokens or TokenRule()
    wanted = lean.token_rule.first_only
    lean.first_only = place.first_only if wanted is None else wanted
    if exit_rule is not None:
        lean.exit_rule = exit_rule
        if not hasattr(lean, "exits"):
            classifier = model.get_submodule(place.classifier_name)
            lean.exits = nn.ModuleList(
                place.classifier.head(classifier) for _ in range(len(lean.layers) - 1)
            )
            lean.exits.train(lean.training)
    return lean


def attach_exits(model: nn.Module) -> None:
    """Have the classifiers around lean encoders return the logits of samples that left early."""
    for place in find_encoders(model):
        lean = model.get_submodule(place.name)
        if isinstance(lean, LeanEncoder) and lean.exit_rule is not None and place.classifier:
            classifier = model.get_submodule(place.classifier_name)
            exits.attach(lean, classifier, classifier.get_submodule(place.classifier.last))


def remove(model: nn.Module) -> None:
    """Put every replaced encoder back, with the layers the lean one has now."""
    for name, lean in lean_encoders(model).items():
        exits.detach(model, lean)
        (encoder,) = lean.replaced
        kept = {key: module for key, module in lean._modules.items() if key not in _OURS}
        encoder._modules.clear()
        encoder._modules.update(kept)
        encoder.train(lean.training)
        _set(model, name, encoder)
        owner = _owner(model, name)
        if owner is not None and (before := getattr(lean, "attention_before", None)) is not None:
            owner.set_attn_implementation(before)


def describe_encoders(model: nn.Module) -> dict[str, dict]:
    """The saved description of the lean encoders: plain lists, dicts, numbers, strings. Exits go
    with the classifier: a base model saved out of one has none."""
    rules = {}
    for place in find_encoders(model):
        lean = model.get_submodule(place.name)
        if isinstance(lean, LeanEncoder):
            exits_here = place.classifier is not None and lean.exit_rule is not None
            rules[place.name] = {
                "tokens": {} if lean.token_rule is None else lean.token_rule.to_dict(),
                "exits": lean.exit_rule.to_dict() if exits_here else None,
            }
    return rules


def read_rules(encoders: dict) -> dict[str, tuple[TokenRule, ExitRule | None]]:
    """The rules of each encoder. Raises ValueError unless `encoders`, of unknown origin, is well
    formed."""
    if not isinstance(encoders, dict):
        raise ValueError(f"lean model: encoders must be a table, got {encoders!r}")
    rules = {}
    for name, entry in encoders.items():
        where = f"lean model: encoder {name!r}"
        if not isinstance(name, str) or not isinstance(entry, dict) or set(entry) != set(_KEYS):
            raise ValueError(f"{where} must have exactly the keys {list(_KEYS)}, got {entry!r}")
        tokens = rule_of(TokenRule, entry["tokens"], f"{where}: tokens")
        exit_rule = entry["exits"]
        if exit_rule is not None:
            exit_rule = rule_of(ExitRule, exit_rule, f"{where}: exits")
        rules[name] = (tokens, exit_rule)
    return rules


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """The outermost module around `name` that chooses how its attention is computed."""
    parents = name.split(".")[:-1]
    for depth in range(len(parents) + 1):
        module = model.get_submodule(".".join(parents[:depth]))
        if hasattr(module, "set_attn_implementation"):
            return module
    return None
