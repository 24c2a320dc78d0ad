# SPDX-License-Identifier: Apache-2.0
"""A text classifier of n-gram embeddings and two linear layers, as Sparse Distillation trains."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean_kernels._files import write_file
from lean_kernels.nn.ngram_embedding_bag import NGramEmbeddingBag
from lean_kernels.nn.ngram_vocabulary import NGramVocabulary, read_safetensors
from lean_kernels.ops.ngram_embedding_bag import op

FORMAT = "lean_kernels.ngram_classifier"
VERSION = "1"


class NGramClassifier(nn.Module):
    """logits = output(relu(hidden(mean of the n-gram embeddings of a text))).

    Args:
        vocabulary: what numbers the n-grams; the table has as many rows.
        num_labels: logits per text.
        embedding_dim, hidden_features: sizes; 1000 in the paper.
        mode: "mean" or "sum".
        dropout: of the pooled embeddings and the hidden layer, in training.
        sparse: sparse gradients of the table, for lk.optim.LazyAdam.

    `fold` and `to_int8` make it smaller for inference. Sparse Distillation: arXiv 2110.08536.
    """

    def __init__(
        self,
        vocabulary: NGramVocabulary,
        num_labels: int,
        *,
        embedding_dim: int = 1000,
        hidden_features: int = 1000,
        mode: str = "mean",
        dropout: float = 0.0,
        sparse: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_labels < 1 or hidden_features < 1:
            raise ValueError(
                f"NGramClassifier: num_labels and hidden_features must be positive, got "
                f"{num_labels} and {hidden_features}"
            )
        options = {"device": device, "dtype": dtype}
        self.vocabulary = vocabulary
        self.bag = NGramEmbeddingBag(
            len(vocabulary),
            embedding_dim,
            mode=mode,
            sparse=sparse,
            include_last_offset=True,
            **options,
        )
        self.hidden = nn.Linear(embedding_dim, hidden_features, **options)
        self.output = nn.Linear(hidden_features, num_labels, **options)
        self.dropout = nn.Dropout(dropout)
        # Small, so that n-grams that training sees rarely add little noise.
        nn.init.normal_(self.bag.weight, std=embedding_dim**-0.5)

    @property
    def num_labels(self) -> int:
        return self.output.out_features

    @property
    def folded(self) -> bool:
        """Whether the hidden layer's weight is part of the table."""
        return not isinstance(self.hidden, nn.Linear)

    def forward(
        self,
        texts: Sequence[str | bytes] | Tensor,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, num_labels] of B texts.

        Args:
            texts: str or bytes; or the ids [N] that the vocabulary gave, with offsets [B + 1].
            weights: [N], of ids only: what each n-gram counts.
        """
        if isinstance(texts, Tensor):
            if offsets is None:
                raise ValueError("NGramClassifier: ids come with offsets [B + 1], got none")
            ids = texts
        elif offsets is not None or weights is not None:
            raise ValueError(
                "NGramClassifier: offsets and weights go with ids, got them with texts"
            )
        else:
            device = self.bag.weight.device
            ids, offsets = (t.to(device) for t in self.vocabulary(texts))
        pooled = self.dropout(self.bag(ids, offsets, weights))
        pooled = pooled.to(self.output.weight.dtype)  # of int8 rows the sums are float32
        return self.output(self.dropout(F.relu(self.hidden(pooled))))

    @torch.no_grad()
    def fold(self) -> "NGramClassifier":
        """A copy for inference whose table holds hidden(row): what follows a mean is linear.

        One product less, and a table smaller by embedding_dim / hidden_features. The same up to
        rounding; ValueError where the table is folded or int8 already.
        """
        if self.folded or self.bag.scales is not None:
            raise ValueError("NGramClassifier: fold comes once, and before to_int8")
        tensors = self.state_dict()
        tensors["bag.weight"] = F.linear(self.bag.weight, tensors.pop("hidden.weight"))
        return self._like(tensors)

    @torch.no_grad()
    def to_int8(self) -> "NGramClassifier":
        """A copy for inference with int8 rows, a quarter of the bytes."""
        bag = self.bag.to_int8()
        tensors = {"bag.weight": bag.weight.detach(), "bag.scales": bag.scales}
        return self._like(self.state_dict() | tensors)

    def _like(self, tensors: dict[str, Tensor]) -> "NGramClassifier":
        copy = {key: tensor.clone() for key, tensor in tensors.items() if key[:4] != "bag."}
        return self._from_tensors(self.vocabulary, tensors | copy, self.bag.mode).requires_grad_(
            False
        )

    @classmethod
    def _from_tensors(
        cls, vocabulary: NGramVocabulary, tensors: dict[str, Tensor], mode: str, **options
    ) -> "NGramClassifier":
        table, output = tensors.get("bag.weight"), tensors.get("output.weight")
        if table is None or output is None or table.dim() != 2 or output.dim() != 2:
            raise ValueError("bag.weight and output.weight must be matrices")
        if table.dtype not in (*op.DTYPES, torch.int8) or output.dtype not in op.DTYPES:
            raise ValueError(f"parameters of {table.dtype} and {output.dtype} are not supported")
        model = cls(
            vocabulary,
            output.shape[0],
            embedding_dim=table.shape[1],
            hidden_features=output.shape[1],
            mode=mode,
            device="meta",
            **options,
        )
        if "hidden.weight" not in tensors:
            model.hidden = _Shift(model.hidden.bias)
        if table.dtype == torch.int8:
            model.bag.weight.requires_grad_(False)
            model.bag.scales = torch.empty(len(vocabulary), device="meta")
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write parameters and vocabulary into one safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors, metadata = self.vocabulary.state()
        tensors = {f"vocabulary.{key}": tensor for key, tensor in tensors.items()}
        tensors |= {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items()}
        metadata |= {"format": FORMAT, "version": VERSION, "mode": self.bag.mode}
        write_file(Path(path), save(tensors, metadata), overwrite)

    @classmethod
    def load(cls, path: str | Path, *, sparse: bool = True) -> "NGramClassifier":
        """Read a file of `save`; ValueError says what is wrong with any other."""
        tensors, metadata = read_safetensors(path, FORMAT, VERSION)
        hashes = tensors.pop("vocabulary.hashes", None)
        vocabulary = NGramVocabulary.from_state({"hashes": hashes}, metadata, path)
        try:
            return cls._from_tensors(vocabulary, tensors, metadata.get("mode", ""), sparse=sparse)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {error}") from None


class _Shift(nn.Module):
    """x + bias: what is left of a linear layer whose weight went elsewhere."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias
