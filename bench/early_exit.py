# SPDX-License-Identifier: Apache-2.0
"""Case early_exit: a BERT classifier whose samples leave the batch layer by layer.

Weights are random. Every exit head is scaled until its share of the samples is sure enough to
leave, the same number after each layer. "live work" is what exits could at best come to: the same
layers on the samples that are still there, prepared outside of the timing, no heads and no
decisions. "packed" runs every sample through every layer, "dense" is transformers with SDPA.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import lean_kernels as lk
from bench import bert_encoder
from bench.registry import Case, Competitor, Options, Requirement, Workload
from bench.runner import relative_error
from lean_kernels.nn.packed_pass import PackedPass

THRESHOLD = 0.3  # nats


@dataclass(frozen=True)
class Config:
    """One point. `fill`: mean length over `tokens`, lengths spread evenly, as in token_dropping."""

    size: str = "base"
    batch: int = 32
    tokens: int = 64
    fill: float = 1.0


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def _scale_for(logits: Tensor, count: int) -> float:
    """A factor on the logits that takes `count` rows below the threshold, the others above.

    A row's entropy falls as its logits grow: the factor lies between where the last one that may go
    crosses the threshold and where the next one does.
    """
    crossings = []
    for row in logits.double():
        low, high = 0.0, 1e9
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if _entropy(middle * row) < THRESHOLD else (middle, high)
        crossings.append(high)
    crossings.sort()
    if count == 0:
        return crossings[0] / 2
    if count == len(crossings):
        return 2 * crossings[-1]
    return (crossings[count - 1] + crossings[count]) / 2


@torch.no_grad()
def _calibrate(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """Scale the exit heads so that as many samples leave after every layer; live ones per layer."""
    encoder = model.bert.encoder
    rule, layers, batch = encoder.exit_rule, len(encoder.layers), len(inputs["input_ids"])
    seen: dict[int, Tensor] = {}
    for place, head in enumerate(encoder.exits):
        head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.out.bias.zero_()
        head.register_forward_hook(lambda m, a, y, place=place: seen.__setitem__(place, y))
    encoder.exit_rule = replace(rule, threshold=0.0)  # nobody leaves, every head is asked
    model(**inputs)
    encoder.exit_rule = rule
    there, live = torch.arange(batch), [batch]
    for index, head in enumerate(encoder.exits):
        head._forward_hooks.clear()
        count = round(batch * (layers - 1 - index) / layers)
        scale = _scale_for(seen[index][there], len(there) - count)
        head.out.weight.mul_(scale)
        there = there[_entropy(scale * seen[index][there].double()) >= THRESHOLD]
        live.append(count)
    left = torch.bincount(_exit_layers(model, inputs), minlength=layers)
    found = [batch - int(left[:layer].sum()) for layer in range(layers)]
    if found != live:
        raise RuntimeError(f"early_exit: heads were to leave {live} samples per layer, got {found}")
    return live


@torch.no_grad()
def _live_work(model: nn.Module, inputs: dict[str, Tensor], live: list[int]):
    """A call that runs each layer on the first live[layer] samples, from states prepared here."""
    encoder = copy.deepcopy(model.bert.encoder)
    encoder.exit_rule, encoder.first_only = None, False
    hidden, mask = model.bert.embeddings(inputs["input_ids"]), inputs["attention_mask"]
    everybody, steps = PackedPass(encoder, hidden, mask, {}), []
    for index, count in enumerate(live):
        run = PackedPass(encoder, hidden[:count], mask[:count], {})
        steps.append((run, everybody.x[: len(run.x)]))
        everybody.layer(index)

    def call() -> Tensor:
        for index, (run, x) in enumerate(steps):
            run.x = x
            run.layer(index)
        return run.x

    return call


@torch.no_grad()
def _exit_layers(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """After which layer each sample leaves, int64 [B]."""
    model(**inputs)
    return model.bert.encoder.exit_layers


def prepare(config: Config, options: Options) -> Workload:
    """The classifiers on one padded batch."""
    from transformers import BertConfig, BertForSequenceClassification

    if options.impl is not None:
        raise ValueError("early_exit: times the model as users get it; it has no impl to choose")
    torch.manual_seed(0)
    settings = BertConfig(**bert_encoder.SIZES[config.size], attn_implementation="sdpa")
    settings.num_labels = 3
    dense = BertForSequenceClassification(settings).eval().to(options.device)
    shortest = max(1.0, (2 * config.fill - 1) * config.tokens)
    lengths = torch.linspace(shortest, config.tokens, config.batch).round()
    lengths = lengths[torch.randperm(config.batch)]
    ids = torch.randint(settings.vocab_size, (config.batch, config.tokens))
    mask = (torch.arange(config.tokens) < lengths[:, None]).long()
    inputs = {"input_ids": ids.to(options.device), "attention_mask": mask.to(options.device)}
    packed = lk.convert(copy.deepcopy(dense), {"tokens": {"packed": True}})
    rules = {"exits": {"criterion": "entropy", "threshold": THRESHOLD}}
    lean = lk.convert(copy.deepcopy(dense), rules)
    live = _calibrate(lean, inputs)

    def call(model: nn.Module):
        return lambda: model(**inputs).logits

    with torch.no_grad():
        wide = copy.deepcopy(lean).double()
        early = call(wide)()
        wide_layers = wide.bert.encoder.exit_layers
        everything = call(copy.deepcopy(dense).double())()
        work = _live_work(lean, inputs, live)
        of_work = _live_work(wide, inputs, live)()
        error = relative_error(call(dense)(), everything)
    if not torch.equal(wide_layers, _exit_layers(lean, inputs)):
        raise RuntimeError("early_exit: float32 and float64 leave after different layers")
    ours, others = max(bert_encoder.ABSOLUTE, 4 * error), bert_encoder.BROKEN
    return Workload(
        {
            "lean": Competitor(call(lean), (early,), ours),
            "live work": Competitor(work, (of_work,), others),
            "packed": Competitor(call(packed), (everything,), others),
            "dense": Competitor(call(dense), (everything,), others),
        },
        ideal=len(live) * config.batch / sum(live),
        facts={"layers run": sum(live) / len(live) / config.batch},
        settle=bert_encoder.SETTLE,
    )


def _numbers() -> list[Config]:
    return [Config()]


def _full() -> list[Config]:
    return [*_numbers(), Config(fill=0.66), Config(tokens=128), Config(batch=8)]


def _quick() -> list[Config]:
    return [Config(size="small", tokens=32), Config(size="small", batch=8, tokens=32, fill=0.7)]


CASE = Case(
    name="early_exit",
    suites={"quick": _quick, "full": _full, "numbers": _numbers},
    prepare=prepare,
    requirements=(
        Requirement(
            "BERT-base, 32 x 64, as many leave after each layer: time over the live work's",
            "<= 1.1",
            _numbers,
            lambda record: 1 / record["ratios"]["live work"],
            lambda record: 1.1,
            at_most=True,
        ),
    ),
    budget=20.0,
)
