# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of tensor_product_embedding. A program holds a row as [first digit, the others],
in registers, each digit padded to a power of two.

Nothing here waits for the device. An id or morpheme out of bounds gives a row of NaN, and no
gradient. Positions are sorted by what they add to (a morpheme's factors, an added row) and summed
in that order, a block of them by one program; sums that span blocks are joined block by block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels.ops._triton import check_device

NAME = "tensor_product_embedding"
_MOST_NUMBERS = 1 << 14  # of a padded row: beyond, it no longer fits the registers of a program
BLOCK = 64  # sorted positions that one program sums


@triton.jit
def _digits(t, j, q, ORDER: tl.constexpr, DIGIT: tl.constexpr):
    """Digit j >= 1 of the padded places t of a row's other digits."""
    place = t
    for _ in tl.static_range(ORDER - 1 - j):
        place = place // DIGIT
    return place % DIGIT


@triton.jit
def _places(t, q, ORDER: tl.constexpr, DIGIT: tl.constexpr):
    """Of padded places t: where they lie in q^(n-1) numbers, and whether they do."""
    at, valid = t * 0, t >= 0
    for j in tl.static_range(1, ORDER):
        digit = _digits(t, j, q, ORDER, DIGIT)
        at = at * q + digit
        valid = valid & (digit < q)
    return at, valid


@triton.jit
def _tail(
    factors_ptr, morphemes_ptr, row, i, t, valid, rank, q,
    SKIP: tl.constexpr, ORDER: tl.constexpr, DIGIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The product of rank i of all factors but the first and SKIP, at the padded places t."""
    product = tl.where(valid, 1.0, 0.0).to(ACC)
    for j in tl.static_range(1, ORDER):
        if j != SKIP:
            morpheme = tl.load(morphemes_ptr + row * ORDER + j).to(tl.int64)
            digit = _digits(t, j, q, ORDER, DIGIT)
            at = (morpheme * rank + i) * q + digit
            product *= tl.load(factors_ptr + at, mask=valid, other=0.0).to(ACC)
    return product


@triton.jit
def _first(factors_ptr, morphemes_ptr, row, i, a, rank, q, ORDER: tl.constexpr, ACC: tl.constexpr):
    morpheme = tl.load(morphemes_ptr + row * ORDER).to(tl.int64)
    at = (morpheme * rank + i) * q + a
    return tl.load(factors_ptr + at, mask=a < q, other=0.0).to(ACC)


@triton.jit
def _inside(morphemes_ptr, ids_ptr, position, words, count, ORDER: tl.constexpr):
    """The id at a position, 0 where it or a morpheme of it is out of bounds; and whether not."""
    row = tl.load(ids_ptr + position).to(tl.int64)
    inside = (row >= 0) & (row < words)
    row = tl.where(inside, row, 0)
    for j in tl.static_range(ORDER):
        morpheme = tl.load(morphemes_ptr + row * ORDER + j).to(tl.int64)
        inside = inside & (morpheme >= 0) & (morpheme < count)
    return tl.where(inside, row, 0), inside


@triton.jit
def _made(
    factors_ptr, morphemes_ptr, row, inside, a, t, valid, rank, q,
    ORDER: tl.constexpr, DIGIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    made = tl.zeros((a.shape[0], t.shape[0]), ACC)
    for i in range(tl.where(inside, rank, 0)):
        first = _first(factors_ptr, morphemes_ptr, row, i, a, rank, q, ORDER, ACC)
        tail = _tail(factors_ptr, morphemes_ptr, row, i, t, valid, rank, q, -1, ORDER, DIGIT, ACC)
        made += first[:, None] * tail[None, :]
    return made


@triton.jit
def _added(made, ids_ptr, table_ptr, position, rows, inside, k, mask, features, ACC: tl.constexpr):
    """made plus a row of an added table; and whether that lies within it."""
    if ids_ptr is None:
        return made, inside
    else:
        row = tl.load(ids_ptr + position).to(tl.int64)
        inside = inside & (row >= 0) & (row < rows)
        row = tl.where(inside, row, 0)
        table = tl.load(table_ptr + row * features + k, mask=mask & inside, other=0.0)
        return made + table.to(ACC), inside


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _normal(x, mask, features, eps, LAYER: tl.constexpr):
    """The rows x without mean (RMSNorm: with), scaled to variance 1; and the scale."""
    center = _total(x) / features if LAYER else 0.0
    x = tl.where(mask, x - center, 0.0)
    scale = 1.0 / tl.sqrt(_total(x * x) / features + eps)
    return x * scale, scale


@triton.jit(do_not_specialize=["words", "count", "rows0", "rows1"])
def _rows_kernel(
    ids_ptr,  # [positions]
    morphemes_ptr,  # [words, ORDER]
    factors_ptr,  # [count, rank, q]
    ids0_ptr, table0_ptr, ids1_ptr, table1_ptr,  # [positions] and [rows, features], or None
    weight_ptr, bias_ptr,  # [features] or None
    y_ptr,  # [positions, features]
    words, count, rank, q, features, rows0, rows1,
    EPS: tl.constexpr,
    NORM: tl.constexpr,  # 0: none, 1: LayerNorm, 2: RMSNorm
    ORDER: tl.constexpr,
    DIGIT: tl.constexpr,  # q, padded
    TAIL: tl.constexpr,  # DIGIT ** (ORDER - 1)
    ACC: tl.constexpr,
):  # fmt: skip
    position = tl.cast(tl.program_id(0), tl.int64)
    a, t = tl.arange(0, DIGIT), tl.arange(0, TAIL)
    at, valid = _places(t, q, ORDER, DIGIT)
    tail = q
    for _ in tl.static_range(ORDER - 2):
        tail = tail * q
    k = a[:, None] * tail + at[None, :]
    mask = (a < q)[:, None] & valid[None, :] & (k < features)
    row, inside = _inside(morphemes_ptr, ids_ptr, position, words, count, ORDER)
    x = _made(factors_ptr, morphemes_ptr, row, inside, a, t, valid, rank, q, ORDER, DIGIT, ACC)
    x, inside = _added(x, ids0_ptr, table0_ptr, position, rows0, inside, k, mask, features, ACC)
    x, inside = _added(x, ids1_ptr, table1_ptr, position, rows1, inside, k, mask, features, ACC)
    if NORM != 0:
        x, _scale = _normal(tl.where(mask, x, 0.0), mask, features, EPS, NORM == 1)
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + k, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + k, mask=mask, other=0.0).to(ACC)
    x = tl.where(inside, x, float("nan"))
    tl.store(y_ptr + position * features + k, x, mask=mask)


@triton.jit
def _before_norm(
    grad_ptr, ids_ptr, morphemes_ptr, factors_ptr, ids0_ptr, table0_ptr, ids1_ptr, table1_ptr,
    weight_ptr, position, words, count, rank, q, features, rows0, rows1, a, t, valid, k, mask,
    EPS: tl.constexpr, NORM: tl.constexpr, ORDER: tl.constexpr, DIGIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of a row before its norm, that after it, the row normalised; and its id."""
    row, inside = _inside(morphemes_ptr, ids_ptr, position, words, count, ORDER)
    g = tl.load(grad_ptr + position * features + k, mask=mask & inside, other=0.0).to(ACC)
    if NORM == 0:
        return g, g, g, row
    else:
        x = _made(factors_ptr, morphemes_ptr, row, inside, a, t, valid, rank, q, ORDER, DIGIT, ACC)
        x, inside = _added(x, ids0_ptr, table0_ptr, position, rows0, inside, k, mask, features, ACC)
        x, inside = _added(x, ids1_ptr, table1_ptr, position, rows1, inside, k, mask, features, ACC)
        normal, scale = _normal(tl.where(mask, x, 0.0), mask, features, EPS, NORM == 1)
        g = tl.where(inside, g, 0.0)
        scaled = g
        if weight_ptr is not None:
            scaled = g * tl.load(weight_ptr + k, mask=mask, other=0.0).to(ACC)
        dx = scaled - normal * (_total(scaled * normal) / features)
        if NORM == 1:
            dx -= _total(scaled) / features
        return tl.where(mask, dx * scale, 0.0), g, normal, row


@triton.jit(do_not_specialize=["positions", "words", "count", "targets", "rows0", "rows1"])
def _shares_kernel(
    keys_ptr,  # [positions], ascending: which row of `out` a position adds to; `targets`: to none
    order_ptr,  # [positions]: the position
    grad_ptr,  # [all positions, features]
    ids_ptr, morphemes_ptr, factors_ptr, ids0_ptr, table0_ptr, ids1_ptr, table1_ptr, weight_ptr,
    out_ptr,  # [targets, size]; sums whose positions all lie in one block are added here,
    heads_ptr,  # [blocks, size]; those that go on from the block before are left here,
    tails_ptr,  # [blocks, size]; and those that begin in a block and go on after it, here
    positions, targets,
    words, count, rank, q, features, rows0, rows1,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    J: tl.constexpr,  # the factor whose gradient is asked for; -1: that of the row
    ORDER: tl.constexpr,
    DIGIT: tl.constexpr,
    TAIL: tl.constexpr,
    RANKS: tl.constexpr,  # rank, padded
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    block = tl.cast(tl.program_id(0), tl.int64)
    start = block * BLOCK
    a, t, ranks = tl.arange(0, DIGIT), tl.arange(0, TAIL), tl.arange(0, RANKS)
    at, valid = _places(t, q, ORDER, DIGIT)
    tail = q
    for _ in tl.static_range(ORDER - 2):
        tail = tail * q
    k = a[:, None] * tail + at[None, :]
    mask = (a < q)[:, None] & valid[None, :] & (k < features)
    if J < 0:
        size = features
        to, kept = k, mask
        share = tl.zeros((DIGIT, TAIL), ACC)
    else:
        size = rank * q
        to = ranks[:, None] * q + a[None, :]
        kept = (ranks < rank)[:, None] & (a < q)[None, :]
        share = tl.zeros((RANKS, DIGIT), ACC)
    end = tl.minimum(start + BLOCK, positions)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1)
    goes_on = before == tl.load(keys_ptr + start)
    for p in range(start, end):
        key = tl.load(keys_ptr + p).to(tl.int64)
        if key < targets:
            position = tl.load(order_ptr + p).to(tl.int64)
            dx, _g, _normed, row = _before_norm(
                grad_ptr, ids_ptr, morphemes_ptr, factors_ptr, ids0_ptr, table0_ptr, ids1_ptr,
                table1_ptr, weight_ptr, position, words, count, rank, q, features, rows0, rows1,
                a, t, valid, k, mask, EPS, NORM, ORDER, DIGIT, ACC,
            )  # fmt: skip
            if J < 0:
                share += dx
            else:
                for i in range(rank):
                    product = _tail(
                        factors_ptr, morphemes_ptr, row, i, t, valid, rank, q, J, ORDER, DIGIT, ACC
                    )
                    if J == 0:
                        mine = tl.sum(dx * product[None, :], axis=1)
                    else:
                        first = _first(factors_ptr, morphemes_ptr, row, i, a, rank, q, ORDER, ACC)
                        left = tl.sum(dx * first[:, None], axis=0) * product
                        inner: tl.constexpr = DIGIT ** (ORDER - 1 - J)
                        outer: tl.constexpr = TAIL // (inner * DIGIT)
                        cube = tl.reshape(left, (outer, DIGIT, inner))
                        mine = tl.sum(tl.sum(cube, axis=2), axis=0)
                    share += tl.where((ranks == i)[:, None], mine[None, :], 0.0)
            following = tl.load(keys_ptr + p + 1, mask=p + 1 < positions, other=-1).to(tl.int64)
            ends = (following != key) | (p + 1 == end)
            head, tail_of = ends & goes_on, ends & (following == key) & (not goes_on)
            whole = ends & (not head) & (not tail_of)
            tl.store(heads_ptr + block * size + to, share, mask=kept & head)
            tl.store(tails_ptr + block * size + to, share, mask=kept & tail_of)
            sums = out_ptr + key * size + to
            sum_so_far = tl.load(sums, mask=kept & whole, other=0.0)
            tl.store(sums, sum_so_far + share, mask=kept & whole)
            share = tl.where(ends, 0.0, share)
            goes_on = goes_on & (not ends)


@triton.jit(do_not_specialize=["positions", "targets"])
def _join_kernel(
    keys_ptr,  # [positions], ascending
    ends_ptr,  # [blocks]: the position after the last that has a block's last key
    out_ptr, heads_ptr, tails_ptr,  # as in _shares_kernel
    positions, targets, size,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the sum that begins in a block and goes on after it, in the order of the blocks."""
    block = tl.cast(tl.program_id(0), tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    last = tl.minimum((block + 1) * BLOCK, positions) - 1
    key = tl.load(keys_ptr + last).to(tl.int64)
    begun_before = tl.load(keys_ptr + block * BLOCK - 1, mask=block > 0, other=-1) == key
    end_block = (tl.load(ends_ptr + block).to(tl.int64) - 1) // BLOCK
    mask = (k < size) & (key < targets) & (end_block > block) & (not begun_before)
    total = tl.load(tails_ptr + block * size + k, mask=mask, other=0.0)
    for b in range(block + 1, tl.where(begun_before, block, end_block) + 1):
        total += tl.load(heads_ptr + b * size + k, mask=mask, other=0.0)
    sums = out_ptr + key * size + k
    tl.store(sums, tl.load(sums, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["positions", "words", "count", "rows0", "rows1"])
def _norm_kernel(
    grad_ptr, ids_ptr, morphemes_ptr, factors_ptr, ids0_ptr, table0_ptr, ids1_ptr, table1_ptr,
    weight_ptr,
    sums_ptr,  # [programs, 2, features]: the gradients of weight and bias
    positions, padding_idx,
    words, count, rank, q, features, rows0, rows1,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ORDER: tl.constexpr,
    DIGIT: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    program = tl.cast(tl.program_id(0), tl.int64)
    a, t = tl.arange(0, DIGIT), tl.arange(0, TAIL)
    at, valid = _places(t, q, ORDER, DIGIT)
    tail = q
    for _ in tl.static_range(ORDER - 2):
        tail = tail * q
    k = a[:, None] * tail + at[None, :]
    mask = (a < q)[:, None] & valid[None, :] & (k < features)
    dweight, dbias = tl.zeros((DIGIT, TAIL), ACC), tl.zeros((DIGIT, TAIL), ACC)
    for position in range(program, positions, tl.num_programs(0)):
        if tl.load(ids_ptr + position) != padding_idx:
            _dx, g, normal, _row = _before_norm(
                grad_ptr, ids_ptr, morphemes_ptr, factors_ptr, ids0_ptr, table0_ptr, ids1_ptr,
                table1_ptr, weight_ptr, position, words, count, rank, q, features, rows0, rows1,
                a, t, valid, k, mask, EPS, NORM, ORDER, DIGIT, ACC,
            )  # fmt: skip
            dweight += g * normal
            dbias += g
    tl.store(sums_ptr + program * 2 * features + k, dweight, mask=mask)
    tl.store(sums_ptr + (program * 2 + 1) * features + k, dbias, mask=mask)


def config(order: int, size: int) -> dict[str, int]:
    """The padded digits and launch options; not tuned on hardware."""
    digit = triton.next_power_of_2(size)
    numbers = digit**order
    if numbers > _MOST_NUMBERS:
        raise ValueError(
            f"{NAME}: impl 'triton' takes rows of at most {_MOST_NUMBERS} numbers, their {order} "
            f"digits of q = {size} padded to {digit}, got {numbers}; use impl 'reference'"
        )
    warps = min(max(numbers // 256, 1), 8)
    return {"ORDER": order, "DIGIT": digit, "TAIL": numbers // digit, "num_warps": warps}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def forward(
    ids, morphemes, factors, embedding_dim, ids0, table0, ids1, table1, norm, weight, bias, eps
) -> Tensor:
    """See `op.tensor_product_embedding`."""
    check_device(NAME, factors)
    y = torch.empty(*ids.shape, embedding_dim, dtype=factors.dtype, device=factors.device)
    tiles = config(morphemes.shape[1], factors.shape[2])
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(factors):
        _rows_kernel[(ids.numel(),)](
            *_contiguous(ids, morphemes, factors, ids0, table0, ids1, table1, weight, bias),
            y,
            morphemes.shape[0],
            *factors.shape,
            embedding_dim,
            *(0 if table is None else table.shape[0] for table in (table0, table1)),
            EPS=eps,
            NORM=norm,
            ACC=tl.float64 if factors.dtype == torch.float64 else tl.float32,
            **tiles,
        )
    return y


def grad(
    grad, ids, morphemes, factors, ids0, table0, ids1, table1, norm, weight, eps, padding_idx
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.grad`."""
    check_device(NAME, factors)
    double = factors.dtype == torch.float64
    options = {"dtype": torch.float64 if double else torch.float32, "device": factors.device}
    features, positions, words = grad.shape[-1], ids.numel(), morphemes.shape[0]
    count, rank, size = factors.shape
    tiles = config(morphemes.shape[1], size)
    constants = {"EPS": eps, "NORM": norm, "ACC": tl.float64 if double else tl.float32, **tiles}
    inputs = _contiguous(
        grad, ids, morphemes, factors, ids0, table0, ids1, table1, weight if norm else None
    )
    heights = [0 if table is None else table.shape[0] for table in (table0, table1)]
    sizes = words, count, rank, size, features, *heights
    flat = inputs[1].view(-1)
    unused = (flat == padding_idx) | (flat < 0) | (flat >= words)

    def summed(keys: Tensor, targets: int, length: int, j: int, out: Tensor) -> None:
        """Adds to row key of out [targets, length] what each position has for it."""
        keys = keys.masked_fill(unused | (keys < 0) | (keys >= targets), targets)
        keys, order = keys.sort(stable=True)
        blocks = triton.cdiv(positions, BLOCK)
        heads, tails = (torch.empty(blocks, length, **options) for _ in range(2))
        with torch.cuda.device_of(factors):
            _shares_kernel[(blocks,)](
                *(keys, order), *inputs, *(out, heads, tails), *(positions, targets), *sizes,
                J=j, RANKS=triton.next_power_of_2(rank), BLOCK=BLOCK, **constants,
            )  # fmt: skip
            width = min(triton.next_power_of_2(length), 256)
            lasts = keys[BLOCK - 1 :: BLOCK]
            lasts = torch.cat([lasts, keys[-1:]]) if positions % BLOCK else lasts
            ends = torch.searchsorted(keys, lasts, right=True)
            _join_kernel[(blocks, triton.cdiv(length, width))](
                *(keys, ends, out, heads, tails, positions, targets, length),
                BLOCK=BLOCK,
                WIDTH=width,
            )

    dfactors = torch.zeros(count, rank, size, **options)
    dtables = [torch.zeros(0 if t is None else t.shape, **options) for t in (table0, table1)]
    dnorm = torch.zeros(2, features if norm else 0, **options)
    if positions:
        rows = inputs[2].index_select(0, flat.clamp(0, words - 1).long())
        for j in range(tiles["ORDER"]):
            summed(rows[:, j], count, rank * size, j, dfactors)
        for at, dtable in zip((ids0, ids1), dtables, strict=True):
            if at is not None:
                summed(at.reshape(-1), dtable.shape[0], features, -1, dtable)
        if norm:
            programs = min(positions, 128)
            sums = torch.empty(programs, 2, features, **options)
            with torch.cuda.device_of(factors):
                _norm_kernel[(programs,)](
                    *inputs, sums, positions, padding_idx, *sizes, **constants
                )
            dnorm = sums.sum(0)
    return dfactors, *dtables, dnorm[0].clone(), dnorm[1].clone()
