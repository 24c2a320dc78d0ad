# SPDX-License-Identifier: Apache-2.0
"""Random and corrupted patterns through the raw CPU ops, for a build with sanitizers (asan.sh).

A corrupted pattern must be refused; anything else must give the float64 answer. Run alone it is a
plain test of the installed kernels.
"""

import argparse
import random
import time

import torch

from lean_kernels import _extension
from lean_kernels.ops.block_sparse_linear import bsr, reference

OPS = torch.ops.lean_kernels
BLOCKS = [
    (16, 16),
    (32, 32),
    (64, 32),
    (16, 64),
    (1, 16),
    (16, 1),
    (4, 16),
    (2, 48),
    (3, 5),
    (8, 8),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def corrupt(rng: random.Random, crow: torch.Tensor, col: torch.Tensor):
    """The indices with one value, or the length, of one of them changed."""
    crow, col = crow.clone(), col.clone()
    victim = rng.choice([crow, col] if col.numel() else [crow])
    wild = rng.choice([-1, -(2**31), 2**31 - 1, 2**30, rng.randint(-50, 500)])
    if rng.random() < 0.2:
        return (crow[:-1], col) if victim is crow else (crow, col[:-1])
    victim[rng.randrange(victim.numel())] = wild
    return crow, col


def well_formed(crow: torch.Tensor, col: torch.Tensor, rows: int, cols: int) -> bool:
    """Whether the kernels may take it: bounds only, not the order of columns."""
    return (
        crow.numel() == rows + 1
        and crow[0] == 0
        and crow[-1] == col.numel()
        and bool((crow[1:] >= crow[:-1]).all())
        and bool(((col >= 0) & (col < cols)).all())
    )


def round_trip(rng: random.Random) -> bool:
    """One random problem; True if its pattern was refused."""
    block, dtype = rng.choice(BLOCKS), rng.choice(DTYPES)
    m, n, k = (rng.randint(low, 130) for low in (0, 1, 1))
    rows, cols = bsr.grid(n, k, block)
    mask = torch.rand(rows, cols) < rng.random()
    weight, crow, col = bsr.from_dense(torch.randn(n, k, dtype=dtype), mask, block)
    x, grad = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
    if rng.random() < 0.5:
        weight = weight.contiguous()
    bad = rng.random() < 0.4
    used_crow, used_col = corrupt(rng, crow, col) if bad else (crow, col)
    fits = weight.shape[0] == used_col.numel() and well_formed(used_crow, used_col, rows, cols)
    bias = torch.randn(n, dtype=dtype) if rng.random() < 0.5 else None
    calls = (
        lambda: OPS.block_sparse_linear(
            x, weight, used_crow, used_col, bias, grad, n, rng.randrange(5)
        ),
        lambda: OPS.block_sparse_linear_grad(
            grad, x, weight, used_crow, used_col, k, *(rng.random() < 0.7 for _ in range(3))
        ),
    )
    refusals = []
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            refusals.append(error)
    if fits:
        assert not refusals, (block, dtype, m, n, k, refusals)
    elif weight.shape[0] == used_col.numel():
        assert len(refusals) == len(calls), (block, dtype, m, n, k, used_crow, used_col)
    if not bad and m:
        exact = reference.forward(x.double(), weight.double(), crow, col, None, None, n, None)
        got = OPS.block_sparse_linear(x, weight, crow, col, None, None, n, 0).double()
        unit = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        assert (got - exact).norm() <= 4 * unit * exact.norm() + 1e-30, (block, dtype, m, n, k)
    return not fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (reason := _extension.load_cpu()) is not None:
        raise SystemExit(f"the CPU kernels are not available: {reason}")
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    end, problems, refused = time.monotonic() + arguments.seconds, 0, 0
    while time.monotonic() < end:
        refused += round_trip(rng)
        problems += 1
    print(f"{problems} problems, {refused} of them corrupted and refused, seed {arguments.seed}")


if __name__ == "__main__":
    main()
