# SPDX-License-Identifier: Apache-2.0
"""Case bert_encoder: a whole BERT with random weights and masks, converted, against dense runtimes.

"lean" is what a recipe of `[linear]` and an empty `[tokens]` makes: block-sparse linears, and the
encoder without padding (there is none here) on our attention and norms, exact. "lean linears" has
the former alone. The dense model carries the same masked weights and the attention that
transformers picks for it (SDPA). "compiled", ONNX Runtime and OpenVINO run that dense model in
float32 on as many threads, where their packages are installed. With int8 weights the others are our
float32, dense float32 and the dense model as ONNX Runtime quantises it dynamically. All under
torch.no_grad().
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import lean_kernels as lk
from bench import environment, masks
from bench.registry import Case, Competitor, Options, Requirement, Workload
from bench.runner import relative_error
from lean_kernels.ops.block_sparse_linear import bsr

SIZES = {
    "base": {},  # BertConfig's defaults are BERT-base
    "small": {
        "vocab_size": 1000,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
}
ABSOLUTE, BROKEN = 1e-6, 1e-4  # relative RMS allowed to us at least, and to the others
# Rounding to 1 / 127 of the largest of some 1000 normal numbers, 3.3 standard deviations, puts an
# error of 3.3 / 127 / sqrt(12) on x, as much on W, and so 1.1 % on their product. The sums that
# layers add their products to are the larger part of them: no more of it arrives at the end.
ROUNDED = 0.011
BROKEN_INT8 = 5e-2  # ONNX Runtime has one scale for all rows of x, and one for all of W
SETTLE = 0.02  # seconds until the idle threads of the other runtimes have gone to sleep


@dataclass(frozen=True)
class Config:
    """One point. `weight_dtype`: "float32", or "int8" for ours to hold and multiply. `peers`:
    "dense", or "all" for compilation and the other runtimes too.
    """

    size: str = "base"
    batch: int = 8
    tokens: int = 128
    density: float = 0.2
    block: str = "32x32"
    mask: str = "uniform"
    weight_dtype: str = "float32"
    peers: str = "dense"


class _LastHidden(nn.Module):
    """The encoder as a function of two tensors, for exporters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def encoder_linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]


def masked_model(config: Config, block_shape: tuple[int, int]) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    settings = BertConfig(**SIZES[config.size], attn_implementation="sdpa")
    model = BertModel(settings, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(0)
    for linear in encoder_linears(model):
        rows, cols = linear.weight.shape
        grid = bsr.grid(rows, cols, block_shape)
        mask = masks.block_mask(config.mask, *grid, config.density, generator)
        kept = mask.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
        linear.weight.data.mul_(kept[:rows, :cols])
    return model


def stored_bytes(modules: Sequence[nn.Module]) -> int:
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _onnx_runtimes(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, int8: bool):
    """ONNX Runtime and OpenVINO on one export, whichever are installed; int8: the former alone."""
    if find_spec("onnxscript") is None:
        return {}
    names = ("input_ids", "attention_mask")
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    calls: dict[str, Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
            torch.onnx.export(
                _LastHidden(model).eval(),
                inputs,
                path,
                input_names=list(names),
                dynamo=True,
                verbose=False,
            )
        if find_spec("onnxruntime") is not None and int8:
            calls["ONNX Runtime int8"] = _onnxruntime(_quantised(path), feed, threads)
        elif find_spec("onnxruntime") is not None:
            calls["ONNX Runtime"] = _onnxruntime(path, feed, threads)
        if find_spec("openvino") is not None and not int8:
            calls["OpenVINO"] = _openvino(path, feed, threads)
    return calls


def _quantised(path: str) -> str:
    """The file beside it with weights in int8, and products that round x as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path + ".int8", weight_type=QuantType.QInt8)
    return path + ".int8"


def _onnxruntime(path: str, feed: dict, threads: int) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its idle threads would spin on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(path: str, feed: dict, threads: int) -> Callable[[], Tensor]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # it would pick bfloat16 by itself where that is fast
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda: torch.from_numpy(compiled(feed)[0])


def prepare(config: Config, options: Options) -> Workload:
    """The dense and the converted model on one batch of full-length sequences."""
    if options.impl is not None:
        raise ValueError("bert_encoder: times the model as users get it; it has no impl to choose")
    block_shape = tuple(int(size) for size in config.block.split("x"))
    dense = masked_model(config, block_shape).to(options.device)
    count = (config.batch, config.tokens)
    ids = torch.randint(dense.config.vocab_size, count, device=options.device)
    inputs = (ids, torch.ones_like(ids))
    linears = encoder_linears(dense)
    rule, int8 = {"block_shape": list(block_shape)}, config.weight_dtype == "int8"

    def converted(dtype: dict, **rest) -> nn.Module:
        recipe = {"linear": {"encoder.*": rule | dtype}, **rest}
        return lk.convert(copy.deepcopy(dense), recipe)

    dtype = {"dtype": "int8"} if int8 else {}
    lean, lean_linears = converted(dtype, tokens={}), converted(dtype)
    layers = [m for m in lean.modules() if isinstance(m, lk.nn.BlockSparseLinear)]
    kept = sum(int(linear.weight.count_nonzero()) for linear in linears)
    density = kept / sum(linear.weight.numel() for linear in linears)

    def call(model: nn.Module) -> Callable[[], Tensor]:
        function = _LastHidden(model)
        return lambda: function(*inputs)

    with torch.no_grad():
        expected = (call(copy.deepcopy(dense).double())(),)
        error = relative_error(call(dense)(), *expected)
        calls = {"lean": call(lean), "lean linears": call(lean_linears), "dense": call(dense)}
        if int8:
            calls["lean float32"] = call(converted({}, tokens={}))
        if config.peers == "all":
            if environment.can_compile() and not int8:
                torch.compiler.reset()
                calls["compiled"] = call(torch.compile(dense, dynamic=False))
                calls["lean linears compiled"] = call(torch.compile(lean_linears, dynamic=False))
            if options.device == "cpu":
                calls |= _onnx_runtimes(dense, inputs, options.threads, int8)
    ours = max(ABSOLUTE, 2 * error)

    def tolerance(name: str) -> float:
        if "lean" not in name:
            return BROKEN_INT8 if name == "ONNX Runtime int8" else BROKEN
        return ROUNDED if int8 and name != "lean float32" else ours

    return Workload(
        {name: Competitor(function, expected, tolerance(name)) for name, function in calls.items()},
        flops=2.0 * config.batch * config.tokens * kept,
        dtype=config.weight_dtype,
        facts={
            "density": density,
            "linears replaced": len(layers) / len(linears),
            "bytes of dense": stored_bytes(layers + encoder_linears(lean)) / stored_bytes(linears),
        },
        settle=SETTLE,
    )


def _float32() -> list[Config]:
    return [Config(peers="all"), Config(mask="skewed")]


def _int8() -> list[Config]:
    return [Config(mask=mask, weight_dtype="int8", peers="all") for mask in masks.MASKS]


def _numbers() -> list[Config]:
    return [*_float32(), *_int8()]


def _full() -> list[Config]:
    others = [Config(density=d, mask=m) for d in (0.5, 0.1) for m in masks.MASKS]
    return [*_numbers(), *others]


def _quick() -> list[Config]:
    return [
        Config(size="small", batch=4, tokens=64, density=density, mask=mask)
        for density in (0.5, 0.2)
        for mask in masks.MASKS
    ] + [Config(size="small", batch=4, tokens=64, weight_dtype="int8")]


CASE = Case(
    name="bert_encoder",
    suites={"quick": _quick, "full": _full, "numbers": _numbers},
    prepare=prepare,
    requirements=(
        Requirement(
            "BERT-base, 8 x 128 tokens, density 0.2, packed, over dense eager (SDPA)",
            "3.7",
            _float32,
            lambda record: record["ratios"]["dense"],
            lambda record: 3.7,
        ),
        Requirement(
            "same, over dense ONNX Runtime",
            "2.5",
            _float32,
            lambda record: record["ratios"]["ONNX Runtime"],
            lambda record: 2.5,
        ),
        Requirement(
            "bytes of the converted linears over the dense ones",
            "<= density + 0.02",
            _float32,
            lambda record: record["facts"]["bytes of dense"],
            lambda record: record["facts"]["density"] + 0.02,
            at_most=True,
        ),
        Requirement(
            "int8, BERT-base, density 0.2, over dense eager float32 (SDPA)",
            "5",
            _int8,
            lambda record: record["ratios"]["dense"],
            lambda record: 5.0,
        ),
        Requirement(
            "same, over ONNX Runtime's dynamic int8 of the dense model",
            "2",
            _int8,
            lambda record: record["ratios"]["ONNX Runtime int8"],
            lambda record: 2.0,
        ),
    ),
    budget=20.0,
)
