# SPDX-License-Identifier: Apache-2.0
"""Every op called once, with its gradients: what a CUDA graph must be able to hold."""

from collections.abc import Callable

import torch

from lean_kernels import ops
from lean_kernels.nn import BlockSparseLinear

Call = Callable[[], tuple[torch.Tensor, ...]]
CALLS: dict[str, Callable[[torch.device], Call]] = {}


def call(make):
    CALLS[make.__name__] = make
    return make


def _with_gradients(function, *inputs) -> Call:
    def run():
        out = function(*inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    return run


def _normal(device, *shape, grad=True):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)


def _lengths(device):
    return torch.tensor([0, 40, 40, 100, 356], dtype=torch.int32, device=device)


@call
def block_sparse_linear(device):
    x, weight = _normal(device, 300, 256), _normal(device, 512, 256, grad=False)
    linear = torch.nn.Linear(256, 512, device=device, dtype=x.dtype)
    linear.weight.data.copy_(weight)
    layer = BlockSparseLinear.from_linear(linear, block_shape=(32, 32), density=0.3)
    return _with_gradients(lambda x, w: layer(x), x, layer.weight)


@call
def add_layer_norm(device):
    x, residual, weight = (_normal(device, *shape) for shape in ((356, 64), (356, 64), (64,)))
    return _with_gradients(lambda *t: ops.add_layer_norm(*t, None), x, residual, weight)


@call
def ragged_attention(device):
    query, key, value = (_normal(device, 356, 4, 64) for _ in range(3))
    cu = _lengths(device)
    return _with_gradients(
        lambda *t: ops.ragged_attention(*t, cu, max_seqlen=256), query, key, value
    )


@call
def ragged_attention_with_scores(device):
    query, key, value = (_normal(device, 356, 4, 64) for _ in range(3))
    cu = _lengths(device)
    return _with_gradients(
        lambda *t: ops.ragged_attention(*t, cu, max_seqlen=256, key_scores="sum")[1],
        query, key, value,
    )  # fmt: skip


@call
def compact_tokens(device):
    scores, hidden = (_normal(device, *shape) for shape in ((356,), (356, 64)))
    counts = torch.tensor([20, 0, 30, 128], dtype=torch.int32, device=device)
    cu = _lengths(device)

    def compacted(rows):
        return ops.compact_tokens(scores.detach().float(), cu, rows, keep=counts, total=178)[2]

    return _with_gradients(compacted, hidden)


@call
def lazy_adam(device):
    rows = torch.tensor([5, 90, 2], device=device)
    values = _normal(device, 3, 64, grad=False)
    table = _normal(device, 100, 64, grad=False)
    grad = torch.sparse_coo_tensor(
        rows[None], values, table.shape, is_coalesced=True, check_invariants=False
    )
    step = torch.ones((), device=device)

    def run():
        tables = table.clone(), torch.zeros_like(table), torch.zeros_like(table)
        ops.lazy_adam_(tables[0], grad, *tables[1:], step, lr=1e-3)
        return tables

    return run
