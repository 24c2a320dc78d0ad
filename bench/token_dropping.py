# SPDX-License-Identifier: Apache-2.0
"""Case token_dropping: a whole BERT on padded batches, packed, and dropping tokens as layers go by.

Weights are random, with queries and keys large enough for attention to choose. Linear layers run
our kernel, at density 1 with every block kept; "torch linears" leaves them as they were. "dense" is
transformers with SDPA on the padded batch, "packed" ours with nothing dropped. Dropping is checked
against float64 attention in which dropped tokens are masked as keys instead of removed.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import lean_kernels as lk
from bench import bert_encoder, environment
from bench.registry import Case, Competitor, Options, Requirement, Workload
from bench.runner import relative_error
from lean_kernels.compress import tokens as profiles
from lean_kernels.nn.packing import kept_counts

SHARPNESS = 4.0  # on query and key weights: logits spread by about 1, as in trained models


@dataclass(frozen=True)
class Config:
    """One point. `kept`: mean over the layers of the fraction of tokens kept after each.

    Lengths are spread evenly around `fill` times `tokens`, the longest being `tokens`.
    """

    size: str = "base"
    batch: int = 8
    tokens: int = 128
    fill: float = 0.66
    kept: float = 1.0
    density: float = 1.0
    peers: str = "dense"


def lengths_of(config: Config) -> np.ndarray:
    """Tokens of each sequence, int64 [B]."""
    shortest = max(1.0, (2 * config.fill - 1) * config.tokens)
    return np.linspace(shortest, config.tokens, config.batch).round().astype(np.int64)


def profile_of(layers: int, kept: float) -> tuple[float, ...] | None:
    """A straight line from all tokens to almost none, bent until its mean is `kept`."""
    if kept == 1:
        return None
    line = [1 - (layer + 1) / (layers + 1) for layer in range(layers)]
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        above = float(np.mean(profiles.rescale(line, middle))) > kept
        low, high = (middle, high) if above else (low, middle)
    return tuple(round(value, 4) for value in profiles.rescale(line, high))


def masked_oracle(model: nn.Module, ids: Tensor, mask: Tensor, counts: np.ndarray) -> Tensor:
    """Last hidden states [B, S, D] of a BertModel that masks tokens where others drop them.

    Args:
        counts: tokens of each sequence before layer l in row l, after the last in row L.
    """
    x, alive = model.embeddings(ids), mask.bool()
    batch, length = ids.shape
    for layer, kept in zip(model.encoder.layer, counts[1:], strict=True):
        attention = layer.attention.self
        query, key, value = (
            linear(x).view(batch, length, -1, attention.attention_head_size).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        logits = query @ key.transpose(2, 3) * attention.attention_head_size**-0.5
        p = logits.masked_fill(~alive[:, None, None], -torch.inf).softmax(dim=-1)
        scores = (p * alive[:, None, :, None]).sum(dim=(1, 2))  # [B, S]
        y = layer.attention.output((p @ value).transpose(1, 2).flatten(2), x)
        y = layer.output(layer.intermediate(y), y)
        scores = scores.masked_fill(~alive, -1.0)
        scores[:, 0] = torch.inf  # the first token always stays
        order = scores.argsort(dim=1, descending=True, stable=True)
        best = torch.arange(length) < torch.from_numpy(kept)[:, None]
        alive = torch.zeros_like(alive).scatter(1, order, best)
        x = torch.where(alive[..., None], y, x)
    return x


def _models(config: Config, device: str) -> dict[str, nn.Module]:
    """Padded as "dense", ours as "lean", and variants of ours."""
    size = bert_encoder.Config(size=config.size, density=config.density)
    dense = bert_encoder.masked_model(size, (32, 32))
    for layer in dense.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.key):
            linear.weight.data.mul_(SHARPNESS)
    dense.to(device)
    profile = profile_of(dense.config.num_hidden_layers, config.kept)
    tokens = {"tokens": {"packed": True} if profile is None else {"profile": list(profile)}}
    # Without a density a rule keeps the blocks that hold a non-zero, here all or those of the mask.
    linear = {"linear": {"encoder.*": {"block_shape": [32, 32]}}}
    rules = {"lean": tokens | linear}
    if config.density == 1:
        rules["torch linears"] = tokens
    if profile is not None:
        rules["packed"] = {"tokens": {"packed": True}} | linear
    models = {name: lk.convert(copy.deepcopy(dense), rule) for name, rule in rules.items()}
    return models | {"dense": dense}


def prepare(config: Config, options: Options) -> Workload:
    """The models on one padded batch."""
    if options.impl is not None:
        raise ValueError(
            "token_dropping: times the model as users get it; it has no impl to choose"
        )
    models = _models(config, options.device)
    dense = models.pop("dense")
    settings, lengths = dense.config, lengths_of(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(settings.vocab_size, (config.batch, config.tokens), generator=generator)
    mask = (torch.arange(config.tokens) < torch.from_numpy(lengths)[:, None]).long()
    profile = profile_of(settings.num_hidden_layers, config.kept)
    counts = kept_counts(lengths, settings.num_hidden_layers, profile=profile)
    real = mask.bool()
    inputs = {
        "input_ids": ids.to(options.device),
        "attention_mask": mask.to(options.device),
    }

    def call(model: nn.Module):
        return lambda: model(**inputs).last_hidden_state

    with torch.no_grad():
        wide = copy.deepcopy(dense).cpu().double()
        everything = wide(input_ids=ids, attention_mask=mask).last_hidden_state[real]
        expected = everything
        if profile is not None:
            expected = masked_oracle(wide, ids, mask, counts)[real]
        error = relative_error(call(dense)().cpu()[real], everything)
    rows = real.to(options.device)

    def real_rows(model: nn.Module):
        forward = call(model)
        return lambda: forward()[rows]

    ours = max(bert_encoder.ABSOLUTE, 2 * error)
    competitors = {"lean": Competitor(real_rows(models["lean"]), (expected,), ours)}
    competitors["dense"] = Competitor(real_rows(dense), (everything,), bert_encoder.BROKEN)
    for name, model in models.items():
        right = everything if name == "packed" else expected
        competitors.setdefault(name, Competitor(real_rows(model), (right,), ours))
    if config.peers == "all" and environment.can_compile():
        torch.compiler.reset()
        compiled = torch.compile(dense, dynamic=False)
        competitors["compiled"] = Competitor(
            real_rows(compiled), (everything,), bert_encoder.BROKEN
        )
    density = 1.0
    if config.density < 1:
        layers = [m for m in models["lean"].modules() if isinstance(m, lk.nn.BlockSparseLinear)]
        density = float(np.mean([layer.density for layer in layers]))
    work = {"density": density}
    return Workload(
        competitors,
        flops=profiles.encoder_flops(profile, lengths, settings, **work),
        ideal=profiles.predict_speedup(profile, lengths, settings, padded=config.tokens, **work),
        facts={"filled": float(lengths.mean() / config.tokens)},
        settle=bert_encoder.SETTLE,
    )


NUMBERS = {(1.0, 1.0): 1.6, (0.53, 1.0): 2.9, (0.27, 1.0): 4.9, (0.27, 0.2): 15.0}


def _numbers() -> list[Config]:
    return [Config(kept=kept, density=density, peers="all") for kept, density in NUMBERS]


def _full() -> list[Config]:
    others = [Config(fill=1.0, kept=kept) for kept in (1.0, 0.53, 0.27)]
    return [*_numbers(), *others, Config(batch=1, tokens=25, fill=1.0), Config(batch=32, tokens=64)]


def _quick() -> list[Config]:
    return [
        Config(size="small", batch=4, tokens=64, kept=kept, density=density)
        for kept in (1.0, 0.5, 0.27)
        for density in (1.0, 0.2)
    ]


def _requirement(kept: float, density: float, least: float) -> Requirement:
    what = "nothing dropped" if kept == 1 else f"mean kept {kept:g}"
    return Requirement(
        f"BERT-base, 8 x 128, 66 % filled, {what}, density {density:g}, over padded SDPA",
        f"{least:g}",
        lambda: [Config(kept=kept, density=density, peers="all")],
        lambda record: record["ratios"]["dense"],
        lambda record: least,
    )


CASE = Case(
    name="token_dropping",
    suites={"quick": _quick, "full": _full, "numbers": _numbers},
    prepare=prepare,
    requirements=tuple(_requirement(*point, least) for point, least in NUMBERS.items()),
    budget=20.0,
)
