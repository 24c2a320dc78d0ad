# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from lean_kernels.compress.exits import joint_loss, losses


def logits(exits=3, batch=5, classes=4):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, classes, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(exits)
    ]


LABELS = torch.tensor([0, 3, 1, 2, 2])


def test_without_distillation_it_is_the_sum_of_cross_entropies():
    found = logits()
    each = torch.stack([F.cross_entropy(exit_logits, LABELS) for exit_logits in found])
    assert torch.equal(losses(found, LABELS), each)
    assert torch.equal(joint_loss(found, LABELS), each.sum())
    weighted = joint_loss(found, LABELS, weights=[1, 2, 0])
    assert weighted.item() == pytest.approx((each[0] + 2 * each[1]).item())


def test_soft_labels_come_from_the_last_exit():
    found, temperature = logits(), 2.0
    target = F.softmax(found[-1] / temperature, dim=-1)
    expected = []
    for exit_logits in found[:-1]:
        student = F.softmax(exit_logits / temperature, dim=-1)
        divergence = (target * (target / student).log()).sum(-1).mean()
        hard = F.cross_entropy(exit_logits, LABELS)
        expected.append((0.1 * hard + 0.9 * temperature**2 * divergence).item())
    expected.append(F.cross_entropy(found[-1], LABELS).item())
    got = losses(found, LABELS, distillation=0.9, temperature=temperature)
    assert got.tolist() == pytest.approx(expected)


def test_the_teacher_is_not_taught_by_its_pupils():
    found = logits()
    losses(found, LABELS, distillation=0.5)[:-1].sum().backward()
    assert not found[-1].grad.any()
    assert all(exit_logits.grad.abs().sum() > 0 for exit_logits in found[:-1])


def test_another_model_may_teach_all():
    found, teacher = logits(), (logits(1)[0] * 3).detach().requires_grad_()
    got = losses(found, LABELS, distillation=1.0, teacher=teacher)
    same = losses([teacher] * 2, LABELS, distillation=1.0, teacher=teacher)
    assert same.tolist() == pytest.approx([0, 0], abs=1e-12) and got[-1] > 0.01
    got.sum().backward()
    assert teacher.grad is None and found[-1].grad is not None


def test_ignored_labels_count_nowhere():
    found, some = logits(), LABELS.clone()
    some[[1, 4]] = -100
    kept = [exit_logits[[0, 2, 3]] for exit_logits in found]
    options = {"distillation": 0.5, "temperature": 3.0}
    expected = losses(kept, LABELS[[0, 2, 3]], **options)
    assert torch.allclose(losses(found, some, **options), expected)


def test_one_output_is_regression():
    found = logits(classes=1)
    labels = torch.linspace(0, 1, 5)
    got = losses(found, labels, distillation=0.25)
    hard = [F.mse_loss(exit_logits[:, 0], labels.double()).item() for exit_logits in found]
    soft = [F.mse_loss(exit_logits, found[-1]).item() for exit_logits in found]
    expected = [0.75 * hard[0] + 0.25 * soft[0], 0.75 * hard[1] + 0.25 * soft[1], hard[2]]
    assert got.tolist() == pytest.approx(expected)


def test_gradients():
    found = logits(exits=2, batch=3)
    target = found[-1].detach().clone()  # gradcheck would move a teacher that is an input

    def both(first, second):
        return joint_loss([first, second], LABELS[:3], distillation=0.7, teacher=target)

    assert torch.autograd.gradcheck(both, found)


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        (([], LABELS), {}, "at least one exit"),
        ((logits()[:1] + logits(classes=3), LABELS), {}, "alike for all exits"),
        ((logits(), LABELS[:4]), {}, r"labels must be \[5\]"),
        ((logits(), LABELS), {"distillation": 1.5}, "distillation"),
        ((logits(), LABELS), {"temperature": 0.0}, "temperature"),
        ((logits(), LABELS), {"weights": [1, 2]}, "weights must be 3 numbers"),
        ((logits(), LABELS), {"weights": [1, 2, -1]}, "not negative"),
    ],
)
def test_bad_arguments(arguments, options, problem):
    with pytest.raises(ValueError, match=problem):
        joint_loss(*arguments, **options)
