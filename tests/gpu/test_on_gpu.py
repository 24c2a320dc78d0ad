# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, the absence of host syncs, tensors of more than 2^31 elements.

The calls themselves also run on the CPU, so that nothing here breaks unnoticed.
"""

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lean_kernels.nn import BlockSparseLinear
from lean_kernels.ops import ragged_attention

sys.path.insert(0, str(Path(__file__).parent))
from calls import CALLS

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GIB = 1 << 30


@pytest.mark.parametrize("name", CALLS)
def test_calls_run_and_repeat(name):
    run = CALLS[name](torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    first, second = run(), run()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and bool(a.isfinite().all())


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_graph_replays_what_ran_eagerly(name):
    run = CALLS[name](torch.device("cuda"))
    expected = [result.clone() for result in run()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for result in captured:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for result, wanted in zip(captured, expected, strict=True):
        assert torch.equal(result, wanted)


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name):
    run = CALLS[name](torch.device("cuda"))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_an_encoder_with_a_profile_is_right():
    from transformers import BertConfig, BertModel

    import lean_kernels as lk

    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
        vocab_size=100,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval().cuda().bfloat16()
    lean = lk.convert(copy.deepcopy(model), {"tokens": {"profile": [1.0, 0.6, 0.4]}})
    ids = torch.randint(100, (4, 32), device="cuda")
    mask = torch.arange(32, device="cuda") < torch.tensor([32, 7, 20, 1], device="cuda")[:, None]
    with torch.no_grad():
        expected = lean(ids, attention_mask=mask.long()).last_hidden_state
        reference = lk.convert(
            copy.deepcopy(model).float().cpu(), {"tokens": {"profile": [1.0, 0.6, 0.4]}}
        )(ids.cpu(), attention_mask=mask.long().cpu()).last_hidden_state
    error = (expected.float().cpu() - reference).square().mean().sqrt()
    assert error <= 3e-2 * reference.square().mean().sqrt()


@on_gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 40 * GIB, reason="40 GiB"
)
def test_products_of_more_than_two_to_the_31_elements():
    tokens, features = (1 << 31) // 1024 + 640, 1024
    linear = torch.nn.Linear(features, features, device="cuda", dtype=torch.bfloat16)
    layer = BlockSparseLinear.from_linear(linear, block_shape=(64, 64), density=0.1)
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, tail = layer(x), layer(x[-640:].clone())
    assert torch.equal(y[-640:], tail)


@on_gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 40 * GIB, reason="40 GiB"
)
def test_attention_over_more_than_two_to_the_31_elements():
    heads, dim, length = 16, 64, 64
    sequences = (1 << 31) // (heads * dim * length) + 10
    cu = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * length
    qkv = torch.randn(sequences * length, heads, dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        out = ragged_attention(qkv, qkv, qkv, cu, max_seqlen=length)
        last = qkv[-length:].clone()
        tail = ragged_attention(last, last, last, cu[:2], max_seqlen=length)
    assert torch.equal(out[-length:], tail)
