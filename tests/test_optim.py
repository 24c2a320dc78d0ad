# SPDX-License-Identifier: Apache-2.0
"""LazyAdam against torch's own Adam and SparseAdam."""

import copy

import pytest
import torch
from torch import nn

import lean_kernels as lk
from lean_kernels.optim import LazyAdam

V, D = 50, 12


def model(sparse, dtype=torch.float64):
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D, sparse=sparse)
    return nn.Sequential(embedding, nn.Linear(D, 3)).to(dtype)


def train(module, optimizers, batches):
    for ids in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        module(ids).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in module.parameters()]


def batches(count=4, size=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (size,), generator=generator) for _ in range(count)]


def test_where_every_row_occurs_it_is_adam():
    every = [torch.randperm(V, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    ours, theirs = model(True), model(False)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5}
    found = train(ours, [LazyAdam(ours.parameters(), **options)], every)
    expected = train(theirs, [torch.optim.Adam(theirs.parameters(), **options)], every)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_dense_gradients_take_adamw():
    ours, theirs = model(False), model(False)
    found = train(ours, [LazyAdam(ours.parameters(), 0.01, weight_decay=0.1)], batches())
    adamw = torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.1)
    torch.testing.assert_close(found, train(theirs, [adamw], batches()), rtol=1e-12, atol=1e-14)


def test_beside_eps_it_is_sparse_adam():
    ours, theirs = model(True), model(True)
    found = train(ours, [LazyAdam(ours.parameters(), eps=1e-20)], batches())
    expected = train(
        theirs,
        [
            torch.optim.SparseAdam(theirs[0].parameters(), eps=1e-20),
            torch.optim.Adam(theirs[1].parameters(), eps=1e-20),
        ],
        batches(),
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_rows_that_do_not_occur_stay():
    module = model(True)
    optimizer = LazyAdam(module.parameters(), lr=0.1)
    before = module[0].weight.detach().clone()
    train(module, [optimizer], [torch.tensor([1, 1, 7])] * 3)
    moved = (module[0].weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 7]
    assert (optimizer.state[module[0].weight]["exp_avg"] != 0).any(1).equal(moved)


def test_states_are_those_of_adam_and_go_on_where_they_were_saved():
    whole, parted = model(True), model(True)
    expected = train(whole, [LazyAdam(whole.parameters())], batches(6))
    first = LazyAdam(parted.parameters())
    train(parted, [first], batches(6)[:3])
    second = LazyAdam(parted.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(train(parted, [second], batches(6)[3:]), expected, rtol=0, atol=0)
    dense = model(False)
    adam = torch.optim.Adam(dense.parameters())
    train(dense, [adam], batches(1))
    assert {k: {*v} for k, v in adam.state_dict()["state"].items()} == {
        k: {*v} for k, v in first.state_dict()["state"].items()
    }
    adam.load_state_dict(first.state_dict())
    first.load_state_dict(adam.state_dict())


def test_schedules_and_groups_set_the_rate():
    module = model(True)
    groups = [{"params": module[0].parameters(), "lr": 0.0}, {"params": module[1].parameters()}]
    optimizer = LazyAdam(groups, lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    train(module, [optimizer], batches(2))
    changed = [not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]
    assert changed == [False, True, True]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in module.parameters()]
    train(module, [optimizer], batches(1))
    schedule.step()
    torch.testing.assert_close([p.detach() for p in module.parameters()], before, rtol=0, atol=0)


def test_hooks_and_closures_run_once():
    module = model(True)
    torch.optim.Adam(module.parameters())  # patches Adam's step
    optimizer, calls = LazyAdam(module.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = module(batches()[0]).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == ["before", "closure", "after"]


def test_a_scaler_skips_what_overflows_and_unscales_the_rest():
    results = []
    for scaled in (False, True):
        module = model(True, torch.float32)
        optimizer = LazyAdam(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for factor in (1.0, float("inf") if scaled else 0.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(module(batches()[0]).square().sum() * factor).backward()
            if factor or scaled:
                scaler.step(optimizer)
                scaler.update()
        results.append([p.detach() for p in module.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_layers_train_with_it(dtype):
    torch.manual_seed(0)
    layer = lk.nn.LowRankEmbedding(V, D, 4, sparse=True).to(dtype)
    ids, target = torch.randint(V, (400,)), torch.randn(400, D, dtype=dtype)
    optimizer, losses = lk.optim.LazyAdam(layer.parameters(), lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(ids), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_compiled_step_is_the_eager_one():
    results = []
    for compiled in (False, True):
        module = model(True)
        optimizer = LazyAdam(module.parameters(), lr=0.1)
        if compiled:
            optimizer.step = torch.compile(optimizer.step)
        results.append(train(module, [optimizer], batches(3)))
        assert optimizer.state[module[0].weight]["step"] == 3
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_state_of_adam_goes_on_as_one_of_this():
    torch.set_default_dtype(torch.float64)  # in which Adam counts its steps
    try:
        dense, ours = model(False), model(True)
        options = {"weight_decay": 0.1, "amsgrad": True}
        groups = [{"params": dense[0].parameters()}, {"params": dense[1].parameters(), **options}]
        adam = torch.optim.Adam(groups, lr=0.01)
        train(dense, [adam], batches(1))
        assert adam.state[dense[0].weight]["step"].dtype == torch.float64
        ours.load_state_dict(dense.state_dict())
        optimizer = LazyAdam([{"params": part.parameters()} for part in ours])
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
        adamw = torch.optim.AdamW(groups, lr=0.01)
        adamw.load_state_dict(copy.deepcopy(adam.state_dict()))
        every = [torch.randperm(V)]
        torch.testing.assert_close(
            train(ours, [optimizer], every), train(dense, [adamw], every), rtol=1e-6, atol=1e-7
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_backward_that_needs_what_was_before_the_step_is_refused():
    layer = lk.nn.LowRankEmbedding(V, D, 4, sparse=True)
    optimizer = LazyAdam(layer.parameters())
    late, early = layer(torch.tensor([1])).sum(), layer(torch.tensor([2])).sum()
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_of_adam_that_rows_do_not_have_are_refused(option):
    module = model(True)
    optimizer = LazyAdam([{"params": module.parameters(), option: True}])
    with pytest.raises(ValueError, match=f"{option} must be False where gradients are sparse"):
        train(module, [optimizer], batches(1))


def test_what_does_not_fit_is_refused():
    module = model(True)
    optimizer = LazyAdam(module.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay must be 0 where gradients are sparse, got"):
        train(module, [optimizer], batches(1))
    for options in ({"lr": torch.tensor(0.1)}, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}):
        with pytest.raises(ValueError, match="lr and betas must be numbers"):
            LazyAdam(module.parameters(), **options)
        with pytest.raises(ValueError, match="lr and betas must be numbers"):
            LazyAdam([{"params": module.parameters(), **options}])
