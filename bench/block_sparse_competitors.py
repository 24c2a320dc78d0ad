# SPDX-License-Identifier: Apache-2.0
"""What case block_sparse_linear compares: our layer and PyTorch's ways to apply the same weight.

Layers are called as users call them. Modes, all but forward_backward under torch.no_grad():

    forward              x Wᵀ
    bias_residual        x Wᵀ + b + r
    bias_gelu_residual   gelu(x Wᵀ + b) + r, exact GELU
    forward_backward     x Wᵀ + b and the gradients of x, the weight and the bias
    epilogue             ours only: what the fused epilogues add to the bare product
    scaling              ours and dense, on one thread and on all threads of the run
    int8                 forward with int8 weights: ours unrounded, dense, and dense int8 layers
    few_rows             forward, torch.sparse, and torch summing as many bytes as the kept blocks
    few_rows_int8        the same with int8 weights

Ideal is 1 / density, with the density the rounded mask has.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lean_kernels as lk
from bench import environment, masks
from bench.registry import Competitor, Options, Workload
from bench.runner import relative_error
from lean_kernels.ops.block_sparse_linear import bsr

# A float32 result is as good as the task asks, or as dense torch is where that is worse.
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 1e-6}
BROKEN = {torch.float64: 1e-10, torch.float32: 1e-4}  # no healthy competitor is this far off
BROKEN_HALF = 2e-2
BROKEN_INT8 = 5e-2  # torch rounds x and the weight with one scale for all rows


@dataclass(frozen=True)
class Config:
    """One point. `shape` is out_features x in_features, `m` the rows of x.

    `peers`: "dense", or "all" for torch.compile and torch.sparse too, which cost far more time.
    """

    shape: str = "3072x768"
    m: int = 128
    density: float = 0.2
    block: str = "32x32"
    dtype: str = "float32"
    mask: str = "uniform"
    mode: str = "forward"
    peers: str = "dense"


def pair(text: str) -> tuple[int, int]:
    """ "3072x768" -> (3072, 768)."""
    first, second = text.split("x")
    return int(first), int(second)


class _Problem:
    """The tensors and layers of a configuration, and its float64 results."""

    def __init__(self, config: Config, options: Options) -> None:
        self.config, self.options = config, options
        rows, cols = pair(config.shape)
        self.block_shape = pair(config.block)
        self.dtype = getattr(torch, config.dtype)
        generator = torch.Generator().manual_seed(0)
        grid = bsr.grid(rows, cols, self.block_shape)
        mask = masks.block_mask(config.mask, *grid, config.density, generator)
        self.density = int(mask.sum()) / mask.numel()
        kept = mask.repeat_interleave(self.block_shape[0], 0)[:rows]
        kept = kept.repeat_interleave(self.block_shape[1], 1)[:, :cols]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(options.device, self.dtype)

        self.dense = nn.Linear(cols, rows, device=options.device, dtype=self.dtype)
        with torch.no_grad():
            self.dense.weight.copy_(normal(rows, cols) * kept.to(options.device))
            self.dense.weight.mul_((cols * self.density) ** -0.5)
            self.dense.bias.copy_(normal(rows))
        self.mask = mask.to(options.device)
        self.x, self.residual = normal(config.m, cols), normal(config.m, rows)
        self.grad = normal(config.m, rows)
        self.flops = 2.0 * config.m * int(kept.sum())

    def linear(self, bias: bool) -> nn.Linear:
        layer = nn.Linear(*self.dense.weight.shape[::-1], bias=False, device="meta")
        layer.weight, layer.bias = self.dense.weight, self.dense.bias if bias else None
        return layer

    def lean(
        self, *, bias: bool, activation: str | None = None, weight_dtype: str | None = None
    ) -> Callable[..., Tensor]:
        """Our layer, or with a named `impl` the op behind it, as a function of x and residual."""
        layer = lk.nn.BlockSparseLinear.from_linear(
            self.linear(bias),
            block_shape=self.block_shape,
            mask=self.mask,
            activation=activation,
            weight_dtype=weight_dtype,
        )
        self.trained = [layer.weight, layer.bias]
        if self.options.impl is None:
            return layer
        return lambda x, residual=None: lk.ops.block_sparse_linear(
            x,
            layer.weight,
            layer.crow_indices,
            layer.col_indices,
            layer.bias,
            out_features=layer.out_features,
            activation=activation,
            residual=residual,
            weight_scales=layer.weight_scales,
            impl=self.options.impl,
        )

    def expected(self, *, bias=False, gelu=False, residual=False) -> tuple[Tensor]:
        y = self.x.detach().double() @ self.dense.weight.detach().double().t()
        y = y + self.dense.bias.detach().double() if bias else y
        y = F.gelu(y) if gelu else y
        return (y + self.residual.double() if residual else y,)

    def tolerances(self, call: Callable, expected: Sequence[Tensor]) -> tuple[float, float]:
        """Allowed to us, from the error of dense torch, whose `call` this is; and to others."""
        actual = call()
        actual = (actual,) if isinstance(actual, Tensor) else actual
        error = max(relative_error(*both) for both in zip(actual, expected, strict=True))
        ours = max(ABSOLUTE.get(self.dtype, 0.0), 2 * error)
        return ours, BROKEN.get(self.dtype, BROKEN_HALF)

    def rounding_error(self) -> float:
        """RMS over that of x Wᵀ that rounding to int8 should cost.

        Steps are 1 / 127 of the largest number of a row, of x or of W. An error within half a step
        either way has the variance step² / 12, and that of a product is
        sum_k (step_x² w_k² + step_w² x_k²) / 12.
        """
        x, w = self.x.detach().double(), self.dense.weight.detach().double()
        steps_x, steps_w = (t.abs().amax(1).square() / 127**2 for t in (x, w))
        of_x = steps_x.sum() * w.square().sum()
        of_w = (x.square() @ (w != 0).double().t() @ steps_w).sum()
        return float(((of_x + of_w) / 12 / (x @ w.t()).square().sum()).sqrt())

    def int8_tolerance(self, unrounded: float) -> float:
        # Errors of one row of x or of W go together, so that a few rows scatter about their mean.
        return 1.5 * self.rounding_error() + unrounded


def _compiled(function: Callable, *arguments: Tensor) -> Callable[[], Tensor]:
    torch.compiler.reset()  # past eight recompiles of one code object dynamo falls back to eager
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda: compiled(*arguments)


def _torch_bsr(p: _Problem) -> dict[str, Callable[[], Tensor]]:
    """torch.sparse BSR, for the blocks, types and shapes it takes.

    Users come by F.linear; torch.mm with the sparse matrix on the left is several times faster.
    """
    block_out, block_in = p.block_shape
    rows, cols = p.dense.weight.shape
    if block_out != block_in or rows % block_out or cols % block_in:
        return {}
    if p.options.device == "cpu" and p.dtype not in (torch.float32, torch.float64):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "beta state"
        weight = p.dense.weight.detach().to_sparse_bsr(p.block_shape)
    transposed = p.x.t()
    return {
        "BSR F.linear": lambda: F.linear(p.x, weight),
        "BSR mm": lambda: torch.mm(weight, transposed).t(),
    }


def _forward(p: _Problem) -> dict[str, Competitor]:
    mode = p.config.mode
    epilogue = mode != "forward"
    gelu = mode == "bias_gelu_residual"
    expected = p.expected(bias=epilogue, gelu=gelu, residual=epilogue)
    lean = p.lean(bias=epilogue, activation="gelu" if gelu else None)
    dense = p.linear(epilogue)

    def composed(x: Tensor) -> Tensor:
        y = F.gelu(dense(x)) if gelu else dense(x)
        return y + p.residual if epilogue else y

    arguments = (p.x, p.residual) if epilogue else (p.x,)
    calls = {"lean": lambda: lean(*arguments), "dense": lambda: composed(p.x)}
    ours, theirs = p.tolerances(calls["dense"], expected)
    if mode == "forward" and p.dtype in (torch.bfloat16, torch.float16):
        wide, wide_x = p.dense.weight.float(), p.x.float()
        calls["float32 dense"] = lambda: F.linear(wide_x, wide)
    if p.config.peers == "all":
        if environment.can_compile():
            calls["compiled"] = _compiled(composed, p.x)
        if mode == "forward":
            calls |= _torch_bsr(p)
    return {
        name: Competitor(call, expected, ours if name == "lean" else theirs)
        for name, call in calls.items()
    }


def _forward_backward(p: _Problem) -> dict[str, Competitor]:
    x = p.x.requires_grad_()
    dense, lean = p.dense, p.lean(bias=True)
    weight, bias = p.trained

    def step(layer: Callable, *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        def run():
            y = layer(x)
            return y, *torch.autograd.grad(y, inputs, p.grad)

        return run

    grad = p.grad.double()
    dx, dw = grad @ dense.weight.detach().double(), grad.t() @ x.detach().double()
    full = (*p.expected(bias=True), dx, dw, grad.sum(0))
    kept = (full[0], dx, bsr.block_view(dw, p.block_shape)[p.mask], grad.sum(0))
    dense_step = step(dense, x, dense.weight, dense.bias)
    ours, theirs = p.tolerances(dense_step, full)
    return {
        "lean": Competitor(step(lean, x, weight, bias), kept, ours),
        "dense": Competitor(dense_step, full, theirs),
    }


def _epilogue(p: _Problem) -> dict[str, Competitor]:
    bare = p.lean(bias=False)
    biased = p.lean(bias=True)
    gelu = p.lean(bias=True, activation="gelu")
    dense = p.dense
    x, r, b = p.x, p.residual, p.dense.bias
    product, sum_ = p.expected(), p.expected(bias=True, residual=True)
    all_ = p.expected(bias=True, gelu=True, residual=True)
    ours, theirs = p.tolerances(lambda: F.linear(x, dense.weight), product)
    calls = {
        "lean": (lambda: bare(x), product),
        "+ bias, residual": (lambda: biased(x, r), sum_),
        "+ bias, gelu, residual": (lambda: gelu(x, r), all_),
        "torch bias, residual": (lambda: bare(x) + b + r, sum_),
        "torch bias, gelu, residual": (lambda: F.gelu(bare(x) + b) + r, all_),
    }
    return {
        name: Competitor(call, expected, theirs if name.startswith("torch") else ours)
        for name, (call, expected) in calls.items()
    }


def _scaling(p: _Problem) -> dict[str, Competitor]:
    lean, dense = p.lean(bias=False), p.linear(False)
    expected = p.expected()
    calls = {"lean": lambda: lean(p.x), "dense": lambda: dense(p.x)}
    ours, theirs = p.tolerances(calls["dense"], expected)
    return {
        "lean": Competitor(calls["lean"], expected, ours),
        "lean 1 thread": Competitor(calls["lean"], expected, ours, threads=1),
        "dense": Competitor(calls["dense"], expected, theirs),
        "dense 1 thread": Competitor(calls["dense"], expected, theirs, threads=1),
    }


def _dense_int8(p: _Problem) -> dict[str, Callable[[], Tensor]]:
    """Dense layers with int8 weights that round x as it comes: torch's own, while torch still has
    it, and torchao's where that is installed."""
    calls = {}
    old = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if old is not None and p.options.device == "cpu" and p.dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "is deprecated"
            layer = old(nn.Sequential(p.linear(False)), {nn.Linear}, dtype=torch.qint8)
        calls["torch int8"] = lambda: layer(p.x)
    if find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(copy.deepcopy(p.linear(False)))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        calls["torchao int8"] = lambda: model(p.x)
    return calls


def _int8(p: _Problem) -> dict[str, Competitor]:
    expected = p.expected()
    lean, wide, dense = p.lean(bias=False, weight_dtype="int8"), p.lean(bias=False), p.linear(False)
    unrounded, theirs = p.tolerances(lambda: dense(p.x), expected)
    return {
        "lean": Competitor(lambda: lean(p.x), expected, p.int8_tolerance(unrounded)),
        f"lean {p.config.dtype}": Competitor(lambda: wide(p.x), expected, unrounded),
        "dense": Competitor(lambda: dense(p.x), expected, theirs),
    } | {name: Competitor(call, expected, BROKEN_INT8) for name, call in _dense_int8(p).items()}


def _few_rows(p: _Problem) -> dict[str, Competitor]:
    expected, dense, is_int8 = p.expected(), p.linear(False), p.config.mode == "few_rows_int8"
    lean = p.lean(bias=False, weight_dtype="int8" if is_int8 else None)
    unrounded, theirs = p.tolerances(lambda: dense(p.x), expected)
    ours = p.int8_tolerance(unrounded) if is_int8 else unrounded
    weight = p.trained[0]
    array = torch.ones(weight.numel() * weight.element_size() // 4, device=p.options.device)
    total = (torch.tensor(float(array.numel())),)
    return {
        "lean": Competitor(lambda: lean(p.x), expected, ours),
        "reading": Competitor(array.sum, total, BROKEN[torch.float32]),
    } | {name: Competitor(call, expected, theirs) for name, call in _torch_bsr(p).items()}


MODES = {
    "forward": _forward,
    "bias_residual": _forward,
    "bias_gelu_residual": _forward,
    "forward_backward": _forward_backward,
    "epilogue": _epilogue,
    "scaling": _scaling,
    "int8": _int8,
    "few_rows": _few_rows,
    "few_rows_int8": _few_rows,
}


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
        flops=problem.flops * (3 if backward else 1),
        dtype="int8" if "int8" in config.mode else config.dtype,
        ideal=1 / problem.density,
        facts={"density": problem.density},
        grad=backward,
    )
