# SPDX-License-Identifier: Apache-2.0
"""What only ragged_attention's AMX products can get wrong: tiles that rows or keys do not fill."""

import pytest
import torch
import torch.nn.functional as F
from problems import same_bits
from ragged import SCORES, ascending, assert_exact, error, problem

from lean_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.cpu_isa() != "amx", reason="this processor, or this build, has no AMX"
)

LENGTHS = [1, 15, 16, 0, 17, 31, 33, 100, 257]


def pairs(lengths=LENGTHS, heads=4, dim=64, **options):
    return problem(lengths, heads=heads, dim=dim, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("scores", [SCORES[1], SCORES[4]], ids=str)
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window": (20, 3)}, {"window": (0, 40)}], ids=str
)
@pytest.mark.parametrize("kv_heads, dim", [(4, 64), (2, 32), (1, 96)])
def test_every_height_and_width_of_tiles(kv_heads, dim, mask, scores):
    p = pairs(kv_heads=kv_heads, dim=dim, **mask, **scores)
    results = p.run()
    assert_exact(results, p.double.run("reference"))
    assert same_bits(results[0], p.with_options(**dict.fromkeys(scores)).run()[0])
    for b in range(len(LENGTHS)):
        rows = slice(*p.cu[b : b + 2].tolist())
        for alone, together in zip(p.sequence(b).run(), results, strict=True):
            assert same_bits(alone, together[rows])


def test_keys_that_lie_elsewhere():
    keys = [33, 1, 0, 5, 64, 20, 300, 47, 16]
    at = {"positions": ascending(LENGTHS, 3), "key_positions": ascending(keys, 2)}
    for options in ({}, {"window": (9, 4), **at}):
        p = pairs(key_lengths=keys, kv_heads=2, key_scores="sum", **options)
        assert_exact(p.run(), p.double.run("reference"))


@pytest.mark.parametrize("options", [{"scale": -0.2}, {"scale": 0.0}, {"dim": 40}], ids=str)
def test_what_does_not_fit_tiles(options):
    p = pairs(key_scores="sum", **options)
    assert_exact(p.run(), p.double.run("reference"))


def test_errs_no_more_than_torch():
    p = pairs([300], dim=64)
    q, k, v = (t.transpose(0, 1)[None] for t in (p.query, p.key, p.value))
    dense = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    exact = p.double.run("reference")[0]
    assert error(p.run()[0], exact) <= 1.1 * error(dense, exact)


def test_rows_that_only_fill_a_tile_are_not_read():
    """NaN beyond a sequence's values must not meet the zero weights of a tile's last keys."""
    p = pairs([17, 3], heads=2)
    alone = p.sequence(0).run()[0]
    p.value[17:] = torch.nan
    assert same_bits(p.run()[0][:17], alone)
