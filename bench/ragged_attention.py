# SPDX-License-Identifier: Apache-2.0
"""Case ragged_attention: packed sequences against what PyTorch offers for them.

Modes, all but forward_backward under torch.no_grad():

    forward            attention alone
    scores             attention and the attention each key received
    forward_backward   attention and the gradients of query, key and value

Query, key and value are views of one fused projection [T, 3, H, D], as a model has them. Padded
competitors get inputs padded beforehand, FlexAttention its block mask; neither is timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

import lean_kernels as lk
from bench import environment
from bench.registry import Case, Competitor, Options, Requirement, Workload
from lean_kernels.ops.ragged_attention import reference

OURS = {torch.float64: 1e-14, torch.float32: 1e-6}  # halves: rounded once
BROKEN, BROKEN_HALF = 1e-4, 2e-2  # no healthy competitor is this far off


@dataclass(frozen=True)
class Config:
    """One point. `lengths` is sequences x length, or x a range of lengths drawn uniformly.

    `peers`: "torch", or "all" for jagged NestedTensor and FlexAttention too, which are slow.
    """

    lengths: str = "8x64-512"
    dtype: str = "float32"
    mode: str = "forward"
    heads: int = 12
    dim: int = 64
    peers: str = "torch"


def lengths_of(text: str) -> list[int]:
    """ "8x16-128" -> eight lengths from 16 to 128; "4x512" -> four of 512."""
    count, _, span = text.partition("x")
    low, _, high = span.partition("-")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        int(low), int(high or low) + 1, (int(count),), generator=generator
    ).tolist()


class _Problem:
    def __init__(self, config: Config, options: Options) -> None:
        self.config, self.options = config, options
        self.dtype = getattr(torch, config.dtype)
        self.lengths = lengths_of(config.lengths)
        self.bounds = [0, *accumulate(self.lengths)]
        generator = torch.Generator().manual_seed(0)
        shape = (self.bounds[-1], 3, config.heads, config.dim)
        fused = torch.randn(shape, generator=generator).to(options.device, self.dtype)
        self.inputs = fused.requires_grad_(config.mode == "forward_backward").unbind(1)
        self.cu = torch.tensor(self.bounds, dtype=torch.int32, device=options.device)
        self.upstream = torch.randn(
            self.inputs[0].shape, generator=generator, dtype=torch.float32
        ).to(options.device, self.dtype)
        self.flops = 4.0 * config.heads * config.dim * sum(n * n for n in self.lengths)

    def lean(self, **scores):
        return lk.ops.ragged_attention(
            *self.inputs, self.cu, max_seqlen=max(self.lengths), impl=self.options.impl, **scores
        )

    def rows(self) -> list[slice]:
        return [slice(*pair) for pair in zip(self.bounds, self.bounds[1:], strict=False)]

    def each(self, attend: Callable) -> list:
        """`attend` on every sequence's query, key and value, [1, H, length, D] each."""
        q, k, v = (t.transpose(0, 1)[None] for t in self.inputs)
        return [attend(q[:, :, s], k[:, :, s], v[:, :, s]) for s in self.rows()]

    def sdpa_loop(self) -> Tensor:
        outs = self.each(F.scaled_dot_product_attention)
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def eager_loop(self) -> tuple[Tensor, Tensor]:
        pairs = self.each(lambda q, k, v: _eager(q, k, v, None))
        outs, scores = zip(*pairs, strict=True)
        return torch.cat([out[0].transpose(0, 1) for out in outs]), torch.cat(
            [score[0].float() for score in scores]
        )

    def padded(self) -> tuple[list[Tensor], Tensor]:
        """Inputs [B, H, S, D], zeros past a sequence's end, and where tokens are [B, S]."""
        longest = max(self.lengths)
        inputs = []
        for t in self.inputs:
            room = t.new_zeros(len(self.lengths), longest, *t.shape[1:])
            for b, s in enumerate(self.rows()):
                room[b, : self.lengths[b]] = t.detach()[s]
            inputs.append(room.transpose(1, 2))
        lengths = torch.tensor(self.lengths, device=self.cu.device)
        return inputs, torch.arange(longest, device=self.cu.device) < lengths[:, None]

    def exact(self) -> tuple[Tensor, Tensor]:
        out, _, scores = reference.forward(
            *(t.detach().double() for t in self.inputs), self.cu, None, None, None,
            self.config.dim**-0.5, -1, -1, True, False, False, False,
        )  # fmt: skip
        return out, scores

    def competitor(self, call: Callable, *expected: Tensor, ours: bool = False) -> Competitor:
        half = self.dtype in (torch.bfloat16, torch.float16)
        if ours:
            tolerance = torch.finfo(self.dtype).eps / 2 if half else OURS[self.dtype]
            tolerance *= 3 if self.config.mode == "forward_backward" else 1
        else:
            tolerance = BROKEN_HALF if half else BROKEN
        return Competitor(call, expected, tolerance)


def _eager(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, S, D] and the sums over heads and real query rows [B, S]."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], -torch.inf)
    p = logits.softmax(-1)
    weighed = p if real is None else p * real[:, None, :, None]
    return p @ v, weighed.sum((1, 2))


def _jagged(p: _Problem) -> Competitor:
    offsets = p.cu.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(t.contiguous(), offsets).transpose(1, 2)
        for t in p.inputs
    )
    call = F.scaled_dot_product_attention
    return p.competitor(lambda: call(q, k, v).transpose(1, 2).values(), p.exact()[0])


def _flex(p: _Problem) -> Competitor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(p.lengths, device=p.cu.device)
    document = torch.repeat_interleave(torch.arange(len(p.lengths), device=p.cu.device), lengths)
    total = len(document)
    mask = create_block_mask(
        lambda b, h, i, j: document[i] == document[j], 1, 1, total, total, device=p.options.device
    )
    torch.compiler.reset()  # past eight recompiles of one code object dynamo falls back to eager
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q, k, v = (t.transpose(0, 1)[None].contiguous() for t in p.inputs)
    return p.competitor(lambda: compiled(q, k, v, block_mask=mask)[0].transpose(0, 1), p.exact()[0])


def _forward(p: _Problem) -> dict[str, Competitor]:
    exact = p.exact()[0]
    (q, k, v), real = p.padded()
    mask = real[:, None, None]
    attend = F.scaled_dot_product_attention
    right = attend(q.double(), k.double(), v.double(), attn_mask=mask)
    competitors = {
        "lean": p.competitor(p.lean, exact, ours=True),
        "SDPA loop": p.competitor(p.sdpa_loop, exact),
        "padded SDPA": p.competitor(lambda: attend(q, k, v, attn_mask=mask), right),
    }
    if p.config.peers == "all":
        competitors["jagged SDPA"] = _jagged(p)
        if environment.can_compile():
            competitors["flex"] = _flex(p)
    return competitors


def _scores(p: _Problem) -> dict[str, Competitor]:
    exact = p.exact()
    (q, k, v), real = p.padded()
    right = _eager(q.double(), k.double(), v.double(), real)
    return {
        "lean": p.competitor(lambda: p.lean(key_scores="sum"), *exact, ours=True),
        "without scores": p.competitor(p.lean, exact[0], ours=True),
        "eager loop": p.competitor(p.eager_loop, *exact),
        "padded eager": p.competitor(lambda: _eager(q, k, v, real), *right),
    }


def _forward_backward(p: _Problem) -> dict[str, Competitor]:
    def step(attend: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run():
            out = attend()
            return out, *torch.autograd.grad(out, p.inputs, p.upstream)

        return run

    exact = p.exact()[0]
    grads = reference.grad(
        p.upstream.double(), None, *(t.detach().double() for t in p.inputs), p.cu, None, None,
        None, p.config.dim**-0.5, -1, -1, False, False, False,
    )  # fmt: skip
    return {
        "lean": p.competitor(step(p.lean), exact, *grads, ours=True),
        "SDPA loop": p.competitor(step(p.sdpa_loop), exact, *grads),
    }


MODES = {"forward": _forward, "scores": _scores, "forward_backward": _forward_backward}


def prepare(config: Config, options: Options) -> Workload:
    """The tensors and competitors of one configuration."""
    if config.mode not in MODES:
        raise ValueError(f"unknown mode {config.mode!r}; expected one of {', '.join(MODES)}")
    backward = config.mode == "forward_backward"
    problem = _Problem(config, options)
    with torch.set_grad_enabled(backward):
        competitors = MODES[config.mode](problem)
    return Workload(
        competitors,
        flops=problem.flops * (3.5 if backward else 1),
        dtype=config.dtype,
        grad=backward,
    )


SETTINGS = {"8x16-128": 2.2, "32x8-64": 3.0, "8x64-512": 1.5}  # promised over a loop of SDPA
EQUAL = ("64x32", "32x64", "16x128", "8x256", "4x512", "2x1024")


def _configs(*modes: str, lengths=tuple(SETTINGS), **fields) -> list[Config]:
    return [Config(lengths=text, mode=mode, **fields) for mode in modes for text in lengths]


def _settings() -> list[Config]:
    return _configs("forward", peers="all")


def _ratio(name: str) -> Callable[[Mapping], float]:
    return lambda record: record["ratios"][name]


def _at(bound: float) -> Callable[[Mapping], float]:
    return lambda record: bound


REQUIREMENTS = (
    Requirement(
        "float32, 8 of 16-128 / 32 of 8-64 / 8 of 64-512, over a loop of SDPA",
        "2.2 / 3 / 1.5",
        _settings,
        _ratio("SDPA loop"),
        lambda record: SETTINGS[record["config"]["lengths"]],
    ),
    Requirement(
        "time with key scores over time without",
        "<= 1.10",
        lambda: _configs("scores"),
        lambda record: 1 / record["ratios"]["without scores"],
        _at(1.10),
        at_most=True,
    ),
    Requirement(
        "with key scores, 8 of 64-512, over padded eager that returns them",
        "14",
        lambda: _configs("scores", lengths=("8x64-512",)),
        _ratio("padded eager"),
        _at(14),
    ),
    Requirement("over jagged NestedTensor SDPA", "25", _settings, _ratio("jagged SDPA"), _at(25)),
    Requirement("over compiled FlexAttention", "6", _settings, _ratio("flex"), _at(6)),
    Requirement(
        "bfloat16, over a loop of bfloat16 SDPA",
        "2",
        lambda: _configs("forward", dtype="bfloat16"),
        _ratio("SDPA loop"),
        _at(2),
    ),
    Requirement(
        "forward + backward over a loop of SDPA",
        "1",
        lambda: _configs("forward_backward"),
        _ratio("SDPA loop"),
        _at(1),
    ),
)


def _numbers() -> list[Config]:
    return [config for requirement in REQUIREMENTS for config in requirement.configs()]


def _full() -> list[Config]:
    equal = _configs("forward", "scores", lengths=EQUAL)
    return (
        _numbers()
        + equal
        + [replace(config, dtype="bfloat16") for config in equal]
        + _configs("forward", lengths=EQUAL, heads=8, dim=128)
        + _configs("forward_backward", lengths=EQUAL)
    )


def _quick() -> list[Config]:
    return _configs("forward", "scores") + _configs("forward", dtype="bfloat16")


CASE = Case(
    name="ragged_attention",
    suites={"quick": _quick, "full": _full, "numbers": _numbers},
    prepare=prepare,
    requirements=REQUIREMENTS,
    table="mode",
    budget=2.0,
)
