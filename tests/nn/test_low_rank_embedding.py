# SPDX-License-Identifier: Apache-2.0
"""LowRankEmbedding, AutoencoderEmbedding, their heads and LeanEmbeddings as drop-ins."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lean_kernels.nn import AutoencoderEmbedding, LeanEmbeddings, LowRankEmbedding
from lean_kernels.nn.compressed_embedding import TiledHead
from lean_kernels.nn.low_rank_embedding import LowRankHead

V, D, R = 1500, 24, 5
KINDS = {
    "low rank": lambda **o: LowRankEmbedding(V, D, R, **o),
    "autoencoder": lambda **o: AutoencoderEmbedding(V, D, R, **o),
    "elu": lambda **o: AutoencoderEmbedding(V, D, R, activation="elu", **o),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind, **options):
    torch.manual_seed(0)
    layer = KINDS[kind](**options)
    if layer.bias is not None:
        layer.bias.data.normal_()
    return layer


def table(layer):
    """All rows, in float64, with gradients."""
    rows = layer.codes.double() @ layer.decoder.double().t()
    rows = rows if layer.bias is None else rows + layer.bias.double()
    return F.elu(rows) if layer.activation else rows


@kinds
def test_forward_and_gradients(kind):
    layer, ids = layer_of(kind), torch.randint(V, (3, 40))
    grad = torch.randn(3, 40, D)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(layer(ids), parameters, grad)
    exact = torch.autograd.grad(table(layer)[ids], parameters, grad.double())
    torch.testing.assert_close(layer(ids), table(layer)[ids].float())
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.to_embedding()(ids), layer(ids), rtol=0, atol=0)


@kinds
def test_state_survives(kind, tmp_path):
    layer, ids = layer_of(kind), torch.randint(V, (40,))
    expected = layer(ids)
    file = tmp_path / "layer.safetensors"
    save_file(layer.state_dict(), file)
    loaded = KINDS[kind]()
    loaded.load_state_dict(load_file(file))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for other in (loaded, again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(ids), expected)
        assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(kind, dtype):
    layer, ids = layer_of(kind).to(dtype), torch.randint(V, (40,))
    assert layer(ids).dtype == dtype
    torch.testing.assert_close(layer(ids), table(layer)[ids].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_codes(dtype):
    full = layer_of("elu")
    factors = full.codes, full.decoder, full.bias
    layer = AutoencoderEmbedding.from_factors(*factors, activation="elu", int8=True).to(dtype)
    assert layer.codes.dtype == torch.int8
    assert {name for name, _ in layer.named_parameters()} == {"decoder", "bias"}
    ids = torch.randint(V, (40,))
    rows = table(full)[ids]
    assert (layer(ids).double() - rows).norm() <= 2e-2 * rows.norm()
    layer(ids).sum().backward()
    assert layer.decoder.grad.abs().sum() > 0
    head = layer.tied_head()
    assert isinstance(head, TiledHead)
    assert head(torch.randn(2, D, dtype=dtype)).shape == (2, V)
    linear = AutoencoderEmbedding.from_factors(*factors, int8=True).to(dtype)
    head, hidden = linear.tied_head(), torch.randn(2, D, dtype=dtype)
    assert isinstance(head, LowRankHead)
    logits = hidden.double() @ (factors[0] @ factors[1].t() + factors[2]).double().t()
    assert (head(hidden).double() - logits).norm() <= 2e-2 * logits.norm()
    parts = (layer.codes, layer.scales, layer.decoder, layer.bias)
    assert layer.nbytes == sum(t.numel() * t.element_size() for t in parts)


def test_sizes():
    layer = layer_of("autoencoder")
    assert layer.nbytes == 4 * (V * R + D * R + D)
    assert layer.compression == pytest.approx(V * D / (V * R + D * R + D))
    layer = LowRankEmbedding(V, D, R, padding_idx=-1, sparse=True)
    assert repr(layer) == (
        f"LowRankEmbedding({V}, {D}, padding_idx={V - 1}, sparse=True, "
        f"compression={layer.compression:.3g}x, rank={R})"
    )


def test_padding_idx_does_not_train():
    layer, ids = layer_of("elu", padding_idx=3), torch.tensor([3, 3, 5])
    layer(ids).sum().backward()
    assert layer.codes.grad[3].abs().sum() == 0
    assert layer.codes.grad[5].abs().sum() > 0
    alone = layer_of("elu")
    alone(ids[2:]).sum().backward()
    torch.testing.assert_close(layer.decoder.grad, alone.decoder.grad)


@pytest.mark.parametrize("sparse", [False, True])
def test_training(sparse):
    layer = layer_of("low rank", sparse=sparse)
    ids, target = torch.randint(V, (400,)), torch.randn(400, D)
    codes = (torch.optim.SparseAdam if sparse else torch.optim.Adam)([layer.codes], lr=0.05)
    rest = torch.optim.Adam([layer.decoder], lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(ids), target)
        codes.zero_grad()
        rest.zero_grad()
        loss.backward()
        codes.step()
        rest.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, D, R), {}, "num_embeddings and embedding_dim must be positive, got 0"),
        ((V, D, 0), {}, "rank must be positive, got 0"),
        ((V, D, R), {"activation": "tanh"}, "unknown activation 'tanh'"),
        ((V, D, R), {"padding_idx": V}, rf"padding_idx must lie in \[-{V}, {V}\), got {V}"),
        ((V, D, R), {"max_norm": 1.0}, "max_norm=1.0 rescales stored rows"),
    ],
)
def test_the_constructor_says_what_is_wrong(arguments, options, message):
    with pytest.raises(ValueError, match=f"LowRankEmbedding: {message}"):
        LowRankEmbedding(*arguments, **options)


@kinds
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_tied_head(kind, with_bias):
    layer = layer_of(kind)
    bias = nn.Parameter(torch.randn(V)) if with_bias else None
    head = layer.tied_head(bias)
    assert isinstance(head, TiledHead)
    assert isinstance(head, LowRankHead) == (kind != "elu")
    hidden = torch.randn(2, 3, D, requires_grad=True)
    logits = hidden.double() @ table(layer).t() + (0 if bias is None else bias.double())
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), logits.float(), rtol=1e-4, atol=1e-4)
    grad = torch.randn(2, 3, V)
    inputs = [hidden, *head.parameters()]
    assert {id(p) for p in layer.parameters()} < {id(p) for p in inputs}
    ours = torch.autograd.grad(head(hidden), inputs, grad)
    exact = torch.autograd.grad(logits, inputs, grad.double())
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=rf"hidden must be \[..., {D}\], got \[2, {D + 1}\]"):
        head(torch.randn(2, D + 1))
    with pytest.raises(ValueError, match=rf"bias must be \[{V}\], got \[{V + 1}\]"):
        layer.tied_head(torch.zeros(V + 1))


@kinds
def test_ties_survive(kind, tmp_path):
    layer = layer_of(kind)
    model = nn.ModuleDict({"embedding": layer, "head": layer.tied_head()})
    other = copy.deepcopy(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    loaded = nn.ModuleDict({"embedding": KINDS[kind]()})
    loaded["head"] = loaded["embedding"].tied_head()
    loaded.load_state_dict(state)
    for found in (other, loaded):
        assert found["head"].embedding is found["embedding"]
        assert found["embedding"].codes is not layer.codes
        hidden = torch.randn(2, D)
        assert torch.equal(found["head"](hidden), model["head"](hidden))


@kinds
def test_compile_and_export(kind):
    layer = layer_of(kind)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9, 33):
        ids = torch.randint(V, (n,))
        parameters = list(layer.parameters())
        for eager, ours in zip(
            torch.autograd.grad(layer(ids).sum(), parameters),
            torch.autograd.grad(compiled(ids).sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager)
    batch = {"ids": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(layer, (torch.randint(V, (4, 3)),), dynamic_shapes=batch)
    ids = torch.randint(V, (7, 3))
    torch.testing.assert_close(program.module()(ids), layer(ids))


def test_from_embedding_takes_over():
    pytest.importorskip("lean_kernels.compress.embedding")
    torch.manual_seed(0)
    weight = torch.randn(200, 6) @ torch.randn(6, D)
    dense = nn.Embedding.from_pretrained(weight, padding_idx=2, sparse=True).eval()
    layer = LowRankEmbedding.from_embedding(dense, 6)
    torch.testing.assert_close(layer(torch.arange(200)), weight, rtol=1e-3, atol=1e-3)
    assert (layer.padding_idx, layer.sparse, layer.training) == (2, True, False)
    assert not layer.codes.requires_grad
    with pytest.raises(TypeError, match=r"LowRankEmbedding replaces nn\.Embedding, got Linear"):
        LowRankEmbedding.from_embedding(nn.Linear(3, 3), 2)
    layer = AutoencoderEmbedding.from_embedding(dense, 6, epochs=2)
    assert layer.bias.shape == (D,)


class Embeddings(nn.Module):
    """As transformers' BertEmbeddings."""

    def __init__(self, word):
        super().__init__()
        self.word_embeddings = word
        self.position_embeddings = nn.Embedding(64, D)
        self.token_type_embeddings = nn.Embedding(2, D)
        self.LayerNorm = nn.LayerNorm(D, eps=1e-12)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("position_ids", torch.arange(64)[None], persistent=False)

    def forward(self, input_ids, token_type_ids=None, position_ids=None):
        position_ids = (
            self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids
        )
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(rows + self.position_embeddings(position_ids)))


@kinds
def test_embeddings_of_a_bert(kind):
    dense = Embeddings(layer_of(kind, padding_idx=0)).eval()
    dense.LayerNorm.weight.data.normal_()
    lean = LeanEmbeddings(dense)
    assert lean.state_dict().keys() == dense.state_dict().keys()
    ids, types = torch.randint(V, (3, 17)), torch.randint(2, (3, 17))
    ids[:, 12:] = 0
    places = torch.randint(64, (3, 17))
    for arguments in ((ids,), (ids, types), (ids, types, places), (ids, None, places[:1])):
        expected, got = dense(*arguments), lean(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        parameters, grad = list(dense.parameters()), torch.randn(3, 17, D)
        for ours, theirs in zip(
            torch.autograd.grad(got, parameters, grad),
            torch.autograd.grad(expected, parameters, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    rows = dense.word_embeddings(ids)
    torch.testing.assert_close(lean(inputs_embeds=rows), dense(ids), rtol=1e-5, atol=1e-5)
    assert (lean.train()(ids) == 0).float().mean() > 0.3
    with pytest.raises(ValueError, match=r"SimpleNamespace\.word_embeddings must be a LowRank"):
        LeanEmbeddings(SimpleNamespace(word_embeddings=nn.Embedding(3, 3)))
