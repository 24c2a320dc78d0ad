# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from tiny_bert import save_tiny_bert

from lean_kernels import evaluation

TEXTS = ["the dog sleeps .", "the cat sleeps on a house", "rain falls", "a dog runs", "the cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


def test_embeddings_do_not_depend_on_batching(model):
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(model).eval()
    tokenizer = evaluation.load_tokenizer(model)
    together, alone = (
        evaluation.embed(bert, evaluation.make_batches(tokenizer, TEXTS, size, 16, "cpu"))
        for size in (5, 1)
    )
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(5))


def test_spearman():
    x = np.arange(50.0)
    assert evaluation.spearman(x, np.exp(x / 10)) == pytest.approx(1)
    assert evaluation.spearman(x, -x) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with ranks 1 3 2 4
    assert evaluation.spearman(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])) == pytest.approx(
        0.8
    )
    # ties take the mean rank: ranks 1.5 1.5 3 against 1 2 3
    expected = np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1]
    assert evaluation.spearman(np.array([5, 5, 6]), np.array([1, 2, 3])) == pytest.approx(expected)


def test_texts(tmp_path):
    shipped = evaluation.read_texts()
    assert len(shipped) >= 200 and len(set(shipped)) == len(shipped)
    (tmp_path / "few.txt").write_text("one\n\n two \n")
    with pytest.raises(ValueError, match="need at least 3 lines"):
        evaluation.read_texts(tmp_path / "few.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"image.png: not a text in UTF-8"):
        evaluation.read_texts(tmp_path / "image.png")
