# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch training loop that can be stopped and taken up again."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

WARM_UP = 0.1  # of all steps
SAVE_SECONDS = 60


def train(
    model: nn.Module,
    examples: Sequence,
    loss: Callable[[nn.Module, list], Tensor],
    checkpoint: Path,
    *,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    seconds: float = float("inf"),
) -> None:
    """AdamW with linear warm-up and decay over seeded permutations of the examples.

    Word embeddings stay frozen: a few thousand sentences say little about 30,000 of them.

    Args:
        loss: called as loss(model, examples of one batch), returns a scalar.
        checkpoint: state is read from here if it exists, and written here at the end.
        seconds: stop after these, finished or not, which is printed; state is also saved every
            SAVE_SECONDS. To go on, call again with the same arguments.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embeddings" not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    per_epoch = -(-len(examples) // batch_size)
    total = epochs * per_epoch

    def factor(step: int) -> float:
        warm = max(1, round(WARM_UP * total))
        return min((step + 1) / warm, (total - step) / max(1, total - warm), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["done"]
    started, running = time.monotonic(), []
    saved = started
    model.train()
    while done < total and time.monotonic() - started < seconds:
        epoch, place = divmod(done, per_epoch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(epoch))
        chosen = order[place * batch_size : (place + 1) * batch_size].tolist()
        torch.manual_seed(done)  # dropout, alike wherever training was taken up again
        value = loss(model, [examples[index] for index in chosen])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        done += 1
        running.append(value.item())
        if done % 10 == 0 or done == total:
            mean = sum(running[-10:]) / len(running[-10:])
            speed = (time.monotonic() - started) / len(running)
            print(f"step {done} of {total}: loss {mean:.4f}, {speed:.2f} s a step", flush=True)
        if done == total or time.monotonic() - saved > SAVE_SECONDS:
            _save(model, optimizer, schedule, done, checkpoint)
            saved = time.monotonic()
    model.eval()
    print("finished" if done == total else "not finished: run this again")


def _save(model, optimizer, schedule, done: int, checkpoint: Path) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "done": done,
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    scratch = checkpoint.with_suffix(".part")
    torch.save(state, scratch)
    os.replace(scratch, checkpoint)
