# SPDX-License-Identifier: Apache-2.0
"""Lean models in Hugging Face transformers: `save_pretrained` and `from_pretrained` as ever.

Importing this module registers the quantization method "lean"; `import lean_kernels` arranges for
that by itself. The format is specified in the README, section "File format".
"""

import copy
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import nn

try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(f'{error}; install it with pip install "lean_kernels[hf]"') from None

if not Version("5.17") <= Version(transformers.__version__) < Version("6"):
    raise ImportError(
        f"lean_kernels works with transformers>=5.17,<6, found {transformers.__version__}; "
        'pip install "lean_kernels[hf]"'
    )

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lean_kernels import __version__, embeddings
from lean_kernels._files import atomic_directory
from lean_kernels.convert import store_description, to_dense
from lean_kernels.integrations.model_card import MARKER, model_card
from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops.block_sparse_linear import bsr
from lean_kernels.report import LeanReport, attached
from lean_kernels.spec import FLOATS, FORMAT_VERSION, check, rebuild, tensors_of, version_of

_WORDS = {("I32",): "int32", ("I8",): "int8", FLOATS: "a floating point tensor"}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@register_quantization_config("lean")
class LeanConfig(QuantizationConfigMixin):
    """The `quantization_config` of a lean model; see `lean_kernels.spec`."""

    def __init__(
        self,
        modules=None,
        format_version=None,
        quant_method="lean",
        encoders=None,
        **unknown,
    ) -> None:
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"lean model: format_version must be 1 or up, got {format_version!r}")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"lean model: written in format version {format_version}; lean_kernels "
                f"{__version__} reads up to {FORMAT_VERSION}: upgrade lean_kernels"
            )
        if unknown:
            raise ValueError(
                f"lean model: unknown keys in quantization_config: {', '.join(sorted(unknown))}"
            )
        if encoders is not None and format_version < 2:
            raise ValueError("lean model: encoders came with format version 2, not with 1")
        check(modules, encoders)
        if version_of(modules, encoders) > format_version:
            raise ValueError(
                f"lean model: embeddings came with format version 3, not with {format_version}"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = modules
        if encoders is not None:
            self.encoders = encoders


@register_quantizer("lean")
class LeanQuantizer(HfQuantizer):
    """Puts lean encoders and layers into the empty model, and checks what was loaded into them."""

    requires_calibration = True  # weights become lean in `convert`, never while loading
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        modules = self.quantization_config.modules
        for file in checkpoint_files or ():
            _check_file(file, modules)
        saved_as = getattr(model.config, "architectures", None) or ()
        self._same_class = type(model).__name__ in saved_as
        encoders = getattr(self.quantization_config, "encoders", None)
        self._built = rebuild(model, modules, encoders, partial=not self._same_class)
        if any("int8" in entry for entry in modules.values()):
            kept = model._keep_in_fp32_modules_strict or ()
            model._keep_in_fp32_modules_strict = {*kept, "weight_scales"}
        # With a quantizer, transformers takes whatever shape a file has: remember what is right.
        self._expected = {
            name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
        }
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._check_loaded(model)
        for name in self._built:
            layer = model.get_submodule(name)
            if not isinstance(layer, BlockSparseLinear):
                check = getattr(embeddings.table_of(layer), "validate", None)
                if check is not None:
                    check(name)
                continue
            layer.validate(name)
            if layer.weight_scales is not None:
                continue
            weight = bsr.blocks_empty(
                layer.nnz, layer.block_shape, dtype=layer.weight.dtype, device=layer.weight.device
            )
            # Files are row-major, kernels read the order of blocks_empty.
            weight.copy_(layer.weight.detach())
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        embeddings.fuse_blocks(model)  # not before: transformers fills buffers by class
        del self._built, self._expected, self._same_class
        model.lean_report = partial(attached, LeanReport.of(model))
        model.is_quantized = False  # parameters are plain floats: .half(), .float(), training work
        return model

    def _check_loaded(self, model) -> None:
        problems = []
        kept_in_fp32 = model._get_dtype_plan(model.config.dtype)
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape, dtype = self._expected[name]
            lean = any(name.startswith(f"{built}.") for built in self._built)
            if tensor.is_meta:
                problems.append(f"{name} is offloaded to disk, which lean models do not support")
            elif tensor.shape != shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
            elif not getattr(tensor, "_is_hf_initialized", False):
                if lean or (self._same_class and not _is_optional(model, name)):
                    problems.append(f"{name} is missing")
            elif tensor.is_floating_point() and not any(part in name for part in kept_in_fp32):
                # A tensor whose name gained or lost the base model's prefix skips the cast.
                tensor.data = tensor.data.to(dtype)
        if problems:
            raise ValueError(_listed("the checkpoint does not fit its description", problems))

    def get_state_dict_and_metadata(self, model):
        """Before save_pretrained writes the config: describe the model as it now is."""
        store_description(model)
        return None, {}

    def _dequantize(self, model, dtype=None):
        return to_dense(model)


def load(directory: str | os.PathLike, **kwargs) -> "transformers.PreTrainedModel":
    """Load a saved model, lean or not, as the class it was saved from.

    Args:
        directory: a directory, or the name of a repository on the Hugging Face hub.
        kwargs: as for `AutoModel.from_pretrained`. Weights are always read from safetensors.

    Raises:
        ValueError: a malformed description, or weights that do not fit it.
        OSError: nothing to load there, or no safetensors.
    """
    hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    names = getattr(
        transformers.AutoConfig.from_pretrained(directory, **hub), "architectures", None
    )
    saved_as = getattr(transformers, names[0], None) if names else None
    known = isinstance(saved_as, type) and issubclass(saved_as, transformers.PreTrainedModel)
    chosen = saved_as if known else transformers.AutoModel
    return chosen.from_pretrained(directory, **{**kwargs, "use_safetensors": True})


def save(
    model: "transformers.PreTrainedModel",
    directory: str | os.PathLike,
    tokenizer=None,
    *,
    overwrite: bool = False,
) -> None:
    """Save a lean model with its tokenizer and a model card that says how to load it.

    The directory appears whole or not at all. Weights and config are what
    `model.save_pretrained(directory)` writes; the model and its config stay as they are.

    Args:
        model: a Hugging Face model that `convert` made lean.
        directory: must not exist, unless `overwrite` is set and it holds an earlier saved model.
        tokenizer: anything with a `save_pretrained`.

    Raises:
        FileExistsError: `directory` is taken.
        TypeError: not a Hugging Face model.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"save: expected a transformers model, got {type(model).__name__}; save the state_dict "
            "of a plain nn.Module instead"
        )
    directory = Path(directory)
    report = model.lean_report() if hasattr(model, "lean_report") else LeanReport.of(model)
    with atomic_directory(directory, MARKER, overwrite) as scratch:
        with _config_of_its_own(model):
            version = store_description(model)["format_version"]
            model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        card = model_card(directory.resolve().name, type(model).__name__, report, version)
        (scratch / MARKER.file).write_text(card, encoding="utf-8")


@contextmanager
def _config_of_its_own(model):
    """A base model shares its config with the model around it, which saving must not describe."""
    shared, model.config = model.config, copy.deepcopy(model.config)
    try:
        yield
    finally:
        model.config = shared


def _check_file(file: str, modules: dict) -> None:
    """Only safetensors, no tensor beyond those a lean layer has, and no cast indices."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(f"lean model: {file}: only safetensors are read, never pickled weights")
    problems = []
    known = {name: tensors_of(entry) for name, entry in modules.items()}
    with safe_open(file, framework="pt") as content:
        for key in content.keys():  # noqa: SIM118 (no dict: it has no other iterator)
            owner = key
            while owner and owner not in known:
                owner = owner.rpartition(".")[0]
            if not owner:
                continue
            dtypes = known[owner].get(key.removeprefix(f"{owner}."))
            if dtypes is None:
                problems.append(f"{key} is no tensor of the layer described")
            elif (dtype := content.get_slice(key).get_dtype()) not in dtypes:
                problems.append(f"{key} must be {_WORDS.get(dtypes, dtypes)}, got {dtype}")
    if problems:
        raise ValueError(_listed(str(file), problems))


def _is_optional(model, name: str) -> bool:
    """Whether transformers itself leaves this tensor out of its checkpoints."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return name in (model._keys_to_ignore_on_save or ()) or any(
        re.search(pattern, name) for pattern in patterns
    )


def _listed(what: str, items: list[str]) -> str:
    more = f", and {len(items) - 5} more" if len(items) > 5 else ""
    return f"lean model: {what}: {'; '.join(items[:5])}{more}"
