# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from lean_kernels.compress.embedding import (
    direction_loss,
    fit_autoencoder,
    fit_morphte,
    fit_svd,
)
from lean_kernels.nn.morphte_embedding import least_factor_size
from lean_kernels.ops.tensor_product_embedding import tensor_product_embedding

ROWS, COLUMNS = 300, 24


def quiet(done, total, name):
    """No bar."""


@pytest.fixture
def table():
    """Rows whose lengths differ by far more than their directions are alike."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(ROWS, 10, generator=generator)
    rows = latent @ torch.randn(10, COLUMNS, generator=generator)
    rows += 0.5 * torch.randn(ROWS, COLUMNS, generator=generator)
    return rows * torch.rand(ROWS, 1, generator=generator).add(0.05) ** 3


def cosine(output, table, weights=None):
    found = F.cosine_similarity(output, table)
    return (found if weights is None else found * weights / weights.mean()).mean().item()


def autoencoder(table, rank, **options):
    codes, decoder, bias = fit_autoencoder(table, rank, progress=quiet, **options)
    rows = codes @ decoder.t() + bias
    return F.elu(rows) if options.get("activation") else rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_svd_is_the_best_of_its_rank(table, dtype):
    codes, decoder = fit_svd(table.to(dtype), 6)
    assert codes.shape == (ROWS, 6) and decoder.shape == (COLUMNS, 6)
    assert codes.dtype == decoder.dtype == dtype
    u, s, vh = torch.linalg.svd(table.to(dtype).double(), full_matrices=False)
    best = (u[:, :6] * s[:6]) @ vh[:6]
    error = (codes.double() @ decoder.double().t() - best).norm() / best.norm()
    assert error <= {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]


def test_svd_of_full_rank_gives_the_table_back(table):
    codes, decoder = fit_svd(table, COLUMNS)
    torch.testing.assert_close(codes @ decoder.t(), table, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder.t() @ decoder, torch.eye(COLUMNS), rtol=0, atol=1e-5)
    wide = fit_svd(table[:20], 20)  # fewer rows than columns
    torch.testing.assert_close(wide[0] @ wide[1].t(), table[:20], rtol=1e-4, atol=1e-5)


def test_direction_loss_is_the_papers(table):
    target, output = table[:8].double(), table[8:16].double()
    error = output - target
    cos = F.cosine_similarity(output, target)
    expected = 0.9975 / 5 * (1 - cos).mean() + 0.0025 * (error.abs() + 1e-10).pow(0.3).mean()
    torch.testing.assert_close(direction_loss(output, target, alpha=0.3), expected)
    rmse = direction_loss(output, target, cosine=0, magnitude=0, rmse=2)
    torch.testing.assert_close(rmse, 2 * error.square().mean().sqrt())
    weights = torch.tensor([1.0, 3, 0, 0, 0, 0, 0, 0])
    weighted = direction_loss(output, target, cosine=1, magnitude=0, row_weights=weights)
    torch.testing.assert_close(weighted, 1 - (cos[0] + 3 * cos[1]) / 4)


@pytest.mark.parametrize("rank", [3, 6])
def test_the_autoencoder_keeps_directions_better_than_svd(table, rank):
    codes, decoder = fit_svd(table, rank)
    svd = cosine(codes @ decoder.t(), table)
    start, trained = (autoencoder(table, rank, epochs=epochs) for epochs in (0, 60))
    assert svd < cosine(start, table) < cosine(trained, table)


def test_elu_starts_where_the_linear_one_does(table):
    table = 0.9 * F.normalize(table, dim=1)  # an ELU cannot go below -1
    linear = autoencoder(table, 8, epochs=0)
    elu = autoencoder(table, 8, epochs=0, activation="elu")
    assert cosine(linear, table) - 0.01 < cosine(elu, table) < cosine(linear, table)
    options = {"activation": "elu", "magnitude": 0.0}
    assert cosine(autoencoder(table, 8, epochs=60, **options), table) > cosine(elu, table)


def test_frequent_rows_are_kept_better(table):
    frequencies = torch.ones(ROWS)
    frequencies[:30] = 100
    plain = autoencoder(table, 4, epochs=20)
    weighted = autoencoder(table, 4, epochs=20, frequencies=frequencies)
    assert cosine(weighted[:30], table[:30]) > cosine(plain[:30], table[:30]) + 0.02
    assert cosine(weighted[30:], table[30:]) < cosine(plain[30:], table[30:])


def test_a_seed_fixes_every_bit(table):
    one, same, other = (
        fit_autoencoder(table, 4, epochs=2, batch_size=64, seed=seed, progress=quiet)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    state = torch.get_rng_state()
    fit_autoencoder(table, 4, epochs=1, progress=quiet)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fits_take_the_tables_dtype_and_no_gradient(table, dtype):
    weight = torch.nn.Parameter(table.to(dtype))
    morphemes = torch.arange(ROWS)[:, None] // torch.tensor([1, 20])
    for found in (
        fit_autoencoder(weight, 4, epochs=1, progress=quiet),
        fit_morphte(weight, morphemes, 2, epochs=1, progress=quiet),
    ):
        assert all(t.dtype == dtype and not t.requires_grad for t in found)
    assert weight.grad is None


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(("order", "least"), [(2, 0.98), (3, 0.8)])  # 3 gets stuck more often
def test_morphte_finds_a_table_that_is_one(order, least, layer_norm):
    generator = torch.Generator().manual_seed(2)
    morphemes = torch.randint(12, (ROWS, order), generator=generator)
    size = least_factor_size(COLUMNS, order)
    factors = torch.randn(12, 2, size, generator=generator)
    ids = torch.arange(ROWS)
    options = {"embedding_dim": COLUMNS}
    table = tensor_product_embedding(ids, morphemes, factors, **options)
    if layer_norm:
        table = F.layer_norm(table, (COLUMNS,))
    found, scale, shift = fit_morphte(
        table,
        morphemes,
        4,
        layer_norm=layer_norm,
        epochs=100,
        batch_size=100,
        learning_rate=0.1,
        progress=quiet,
    )
    assert found.shape == (int(morphemes.max()) + 1, 4, size)
    rows = tensor_product_embedding(ids, morphemes, found, **options)
    if layer_norm:
        rows = F.layer_norm(rows, (COLUMNS,), scale, shift)
    else:
        assert scale is None and shift is None
    assert cosine(rows, table) > least


def test_progress_counts_steps(table):
    steps = []
    fit_autoencoder(table, 4, epochs=2, batch_size=100, progress=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == list(range(7))
    assert {total for _, total, _ in steps} == {6}
    assert steps[4][2] == "fit autoencoder, epoch 2 of 2"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: fit_svd(t, 0), r"fit_svd: rank must lie in \[1, 24\].*got 0"),
        (lambda t: fit_svd(t, 25), r"rank must lie in \[1, 24\]"),
        (lambda t: fit_svd(t[0], 1), r"weight must be \[V, D\].*got torch.float32 \[24\]"),
        (lambda t: fit_svd(t.int(), 1), "weight must be .* floating point"),
        (lambda t: fit_svd(t[:0], 1), "not empty"),
        (lambda t: fit_svd(t / 0, 1), "NaN or infinite"),
        (lambda t: fit_autoencoder(t, 4, activation="tanh"), "unknown activation 'tanh'"),
        (lambda t: fit_autoencoder(t, 4, frequencies=t[0]), "frequencies must be 300 numbers"),
        (lambda t: fit_autoencoder(t, 4, frequencies=-t[:, 0].abs()), "0 or more"),
        (lambda t: fit_autoencoder(t, 4, epochs=-1), "expected epochs >= 0"),
        (lambda t: fit_autoencoder(t, 4, batch_size=0), "batch_size >= 1"),
        (lambda t: fit_morphte(t, t, 2), r"morphemes must be integers \[300, order\]"),
        (lambda t: fit_morphte(t, torch.zeros(3, 3, dtype=int), 2), r"got torch.int64 \[3, 3\]"),
        (lambda t: fit_morphte(t, torch.zeros(300, 5, dtype=int), 2), "order 2 to 4"),
        (lambda t: fit_morphte(t, -torch.ones(300, 3, dtype=int), 2), "must not be negative"),
        (lambda t: fit_morphte(t, torch.zeros(300, 3, dtype=int), 0), "rank must be 1 or more"),
    ],
)
def test_mistakes_are_named(table, call, message):
    with pytest.raises(ValueError, match=message):
        call(table)
