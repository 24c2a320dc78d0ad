# SPDX-License-Identifier: Apache-2.0
"""Tensor trains for the tests of tensor_train_embedding, and the tables they stand for."""

import math

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
# Row factors, column factors, ranks: of each order, with widths on either side of the vectors.
ORDERS = [
    ((3, 4), (2, 5), (3,)),
    ((7, 5), (8, 16), (17,)),
    ((3, 4, 5), (2, 3, 3), (2, 5)),
    ((6, 5, 9), (4, 8, 16), (32, 20)),
    ((2, 3, 2), (5, 1, 7), (1, 33)),
    ((2, 3, 4, 2), (3, 2, 2, 3), (4, 3, 2)),
    ((3, 2, 3, 5), (2, 4, 2, 8), (5, 16, 9)),
]


def train(rows, cols, ranks, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Random cores whose table has entries near 1."""
    generator = torch.Generator().manual_seed(seed)
    around = 1, *ranks, 1
    std = math.prod(ranks) ** (-0.5 / len(rows))
    shapes = [(v, around[k], cols[k], around[k + 1]) for k, v in enumerate(rows)]
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)
        for shape in shapes
    ]


def table_of(cores) -> Tensor:
    """All rows, in float64, by the definition: a sum over the ranks of products of entries."""
    letters = [("abcd"[k], "pqrs"[k], "wxyz"[k]) for k in range(len(cores))]
    terms, before = [], "e"
    for v, d, r in letters:
        terms.append(v + before + d + r)
        before = r
    out = "".join(v for v, _, _ in letters) + "".join(d for _, d, _ in letters)
    table = torch.einsum(f"{','.join(terms)}->{out}", *(core.double() for core in cores))
    return table.reshape(math.prod(core.shape[0] for core in cores), -1)


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected values."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = actual.detach().double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())
