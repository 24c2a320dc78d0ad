# SPDX-License-Identifier: Apache-2.0
"""Which row of a table each n-gram of a text has."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lean_kernels._files import write_file
from lean_kernels.ops.ngram_lookup import ngram_lookup, ngram_slots

FORMAT = "lean_kernels.ngram_vocabulary"
VERSION = "1"


def check_texts(texts) -> None:
    """Raise TypeError for a single text, whose letters would pass for texts."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"n-grams: texts must be a sequence of str or bytes, got one {type(texts)}")


def pack(texts: Sequence[str | bytes]) -> tuple[Tensor, Tensor]:
    """Texts as one uint8 tensor and int64 offsets [B + 1]. Lone surrogates are kept as they are."""
    check_texts(texts)
    parts = [t.encode("utf-8", "surrogatepass") if isinstance(t, str) else t for t in texts]
    joined = bytearray().join(parts)
    text = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()
    return text, torch.tensor([0, *map(len, parts)]).cumsum(0)


class NGramVocabulary:
    """Numbers the n-grams of texts: the rows of an `NGramEmbeddingBag`.

    Words are those of `ops.ngram_lookup`. An n-gram is known by a hash of 64 bits alone, so one
    that the vocabulary lacks is taken for one it has with probability len(self) / 2^64.

    Args:
        hashes: int64 [V], the hash of each row's n-gram; others have no number. None: any n-gram
            has one, its hash modulo `buckets`.
        buckets: the number of rows without hashes.
        min_n, max_n: lengths of n-grams, from 1 to 8.

    Raises:
        ValueError: arguments that do not fit, or hashes that repeat.
    """

    def __init__(
        self, hashes: Tensor | None = None, *, buckets: int = 0, min_n: int = 1, max_n: int = 4
    ) -> None:
        if (hashes is None) != (buckets > 0):
            raise ValueError(
                f"NGramVocabulary: expected hashes or a positive number of buckets, got "
                f"{'no hashes' if hashes is None else 'hashes'} and buckets={buckets}"
            )
        if not 1 <= min_n <= max_n <= 8:
            raise ValueError(f"NGramVocabulary: n must rise within [1, 8], got {min_n} to {max_n}")
        self.hashes, self.buckets, self.min_n, self.max_n = hashes, buckets, min_n, max_n
        try:
            self._slots = None if hashes is None else ngram_slots(hashes)
        except RuntimeError as error:  # of the compiled op
            raise ValueError(f"NGramVocabulary: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return self.buckets if self.hashes is None else len(self.hashes)

    def __call__(self, texts: Sequence[str | bytes]) -> tuple[Tensor, Tensor]:
        """Texts -> ids int64 [N] and offsets int64 [B + 1]."""
        return self.of_tokens(*pack(texts))

    def of_tokens(self, tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The same of int64 [T] tokens of another tokenizer, or of the bytes of texts."""
        return ngram_lookup(
            tokens,
            offsets,
            slots=self._slots,
            buckets=self.buckets,
            min_n=self.min_n,
            max_n=self.max_n,
        )

    def __repr__(self) -> str:
        kind = "hashed, " if self.hashes is None else ""
        return f"NGramVocabulary({kind}{len(self):,} rows, n={self.min_n}..{self.max_n})"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file; FileExistsError unless it is new or may be replaced."""
        from safetensors.torch import save

        tensors, metadata = self.state()
        metadata |= {"format": FORMAT, "version": VERSION}
        write_file(Path(path), save(tensors, metadata), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "NGramVocabulary":
        """Read a file of `save`; ValueError says what is wrong with any other."""
        return cls.from_state(*read_safetensors(path, FORMAT, VERSION), path)

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for a safetensors file."""
        tensors = {} if self.hashes is None else {"hashes": self.hashes}
        numbers = {"buckets": self.buckets, "min_n": self.min_n, "max_n": self.max_n}
        return tensors, {key: str(value) for key, value in numbers.items()}

    @classmethod
    def from_state(
        cls, tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path
    ) -> "NGramVocabulary":
        numbers = {k: number_of(metadata, k, path) for k in ("buckets", "min_n", "max_n")}
        try:
            return cls(tensors.get("hashes"), **numbers)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def number_of(metadata: dict[str, str], key: str, path: str | Path) -> int:
    """An integer of a file's metadata; ValueError where there is none."""
    value = metadata.get(key, "")
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        raise ValueError(f"{path}: {key} must be a number, got {value!r}; the file is damaged")
    return int(value)


def read_safetensors(
    path: str | Path, format: str, version: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of this format and version, else ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format"), metadata.get("version")
            if found != (format, version):
                raise ValueError(
                    f"{path}: expected format {format!r} version {version!r}, got {found[0]!r} "
                    f"version {found[1]!r}"
                )
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
