# SPDX-License-Identifier: Apache-2.0
"""A random two-layer BERT with a tokenizer of its own, saved like any other model."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ("the", "dog", "cat", "sleeps", "runs", "rain", "falls", "on", "house", "a", ".")


def save_tiny_bert(directory: Path, **settings) -> Path:
    """Write the model, with these settings of BertConfig too, and return its directory."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {token: index for index, token in enumerate((*specials, *WORDS))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=16)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
        **settings,
    )
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
