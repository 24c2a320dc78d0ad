# SPDX-License-Identifier: Apache-2.0
"""Random and corrupted cu_seqlens through the raw CPU ops of ragged_attention, for a build with
sanitizers (asan.sh).

What does not rise from 0 to the number of tokens must be refused; anything else must give the
float64 answer. Run alone it is a plain test of the installed kernels.
"""

import argparse
import random
import time
from itertools import accumulate

import torch

from lean_kernels import _extension
from lean_kernels.ops.ragged_attention import reference

OPS = torch.ops.lean_kernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DIMS = [1, 3, 8, 16, 20, 64, 72, 128]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def positions(rng: random.Random, lengths: list[int]) -> torch.Tensor:
    rising = [sorted(rng.randint(-9, 3 * n) for _ in range(n)) for n in lengths]
    return torch.tensor([at for part in rising for at in part], dtype=torch.int32)


def corrupt(rng: random.Random, cu: torch.Tensor) -> torch.Tensor:
    cu = cu.clone()
    cu[rng.randrange(len(cu))] = rng.choice([-1, -(2**31), 2**31 - 1, rng.randint(-50, 500)])
    return cu


def rises(cu: torch.Tensor, total: int) -> bool:
    return bool(cu[0] == 0 and cu[-1] == total and (cu.long().diff() >= 0).all())


def view(rng: random.Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape, now and then strided, with NaN around and between its rows."""
    rows, heads, dim = shape
    if rng.random() < 0.5:
        return torch.randn(shape, dtype=dtype)
    room = torch.full((rows, heads, dim + rng.randint(0, 3)), torch.nan, dtype=dtype)
    room[:, :, :dim] = torch.randn(shape, dtype=dtype)
    return room[:, :, :dim]


def round_trip(rng: random.Random) -> bool:
    """One random problem; True if it was refused."""
    torch.manual_seed(rng.randrange(2**31))
    dtype, dim, most = rng.choice(DTYPES), rng.choice(DIMS), rng.choice([3, 30, 120])
    kv_heads, group = rng.randint(1, 3), rng.choice([1, 1, 2, 5])
    lengths = [rng.randint(0, most) for _ in range(rng.randint(0, 6))]
    apart = rng.random() < 0.4
    key_lengths = [rng.randint(0, most) for _ in lengths] if apart else lengths
    query = view(rng, sum(lengths), kv_heads * group, dim, dtype=dtype)
    key, value = (view(rng, sum(key_lengths), kv_heads, dim, dtype=dtype) for _ in range(2))
    cu, cu_k = bounds(lengths), bounds(key_lengths) if apart else None
    placed = rng.random() < 0.4
    at = positions(rng, lengths) if placed else None
    key_at = positions(rng, key_lengths) if placed and apart else None
    left, right = rng.choice([(-1, -1), (-1, 0), (4, 3), (0, 0), (2**62, 7)])
    key_scores = rng.randint(0, 2)
    per_head, exclude = (key_scores > 0 and rng.random() < 0.5 for _ in range(2))
    used, used_k = cu, cu_k
    if rng.random() < 0.3:
        used, used_k = (corrupt(rng, cu), cu_k) if not apart or rng.random() < 0.5 else (
            cu, corrupt(rng, cu_k)
        )  # fmt: skip
    layout = (used, used_k, at, key_at, -1, dim**-0.5, left, right, key_scores, per_head, exclude)
    fits = rises(used, len(query)) and (used_k is None or rises(used_k, len(key)))
    in_order = at is None or (torch.equal(used, cu) and (cu_k is None or torch.equal(used_k, cu_k)))
    grad = torch.randn(query.shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores_shape = (len(key), kv_heads * group) if per_head else (len(key),)
    grad_scores = torch.randn(scores_shape, dtype=wide) if key_scores else None
    try:
        out, lse, scores = OPS.ragged_attention(query, key, value, *layout)
        grads = OPS.ragged_attention_grad(grad, grad_scores, query, key, value, out, lse, *layout)
    except RuntimeError as problem:
        assert not (fits and in_order), problem
        return True
    assert fits
    doubles = [t.double() for t in (query, key, value)]
    flags = (key_scores == 2, per_head, exclude)
    exact = reference.forward(*doubles, *layout[:4], *layout[5:8], key_scores > 0, *flags)
    exact_grads = reference.grad(
        grad.double(), grad_scores, *doubles, *layout[:4], *layout[5:8], *flags
    )
    unit = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    # A gradient that vanishes but for rounding is judged by the size of the largest one.
    scale = max([g.norm().item() for g in exact_grads], default=0)
    for got, right_one, least in (
        (out, exact[0], 0),
        (scores, exact[2], 0),
        *((g, e, scale) for g, e in zip(grads, exact_grads, strict=True)),
    ):
        limit = 16 * unit * max(right_one.norm().item(), least) + 1e-30
        assert (got.double() - right_one).norm() <= limit, (dtype, dim, lengths, layout)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (reason := _extension.load_cpu()) is not None:
        raise SystemExit(f"the CPU kernels are not available: {reason}")
    rng = random.Random(arguments.seed)
    end, problems, refused = time.monotonic() + arguments.seconds, 0, 0
    while time.monotonic() < end:
        refused += round_trip(rng)
        problems += 1
    print(f"{problems} problems, {refused} of them corrupted and refused, seed {arguments.seed}")


if __name__ == "__main__":
    main()
