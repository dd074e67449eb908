"""The row functions by themselves: values, slopes, limits."""

import math

import pytest
import torch
from vocabulary_reference import divergence64

from largekd.objectives.divergences import (
    JSD,
    LOG_FLOOR,
    DistributionPair,
    cross_entropy,
    entropy,
    forward_kl,
    log_probabilities,
    logit_gradient,
    reverse_kl,
)

DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": JSD(mix=0.2)}
INF = float("inf")


def logits(rows: int = 5, ids: int = 17, *, std: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(rows, ids, generator=g) * std).double() for _ in range(2))


def gradient(name: str, teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pair = DistributionPair.of_logits(teacher_RV=teacher, student_RV=student)
    value, slope = DIVERGENCES[name](pair)
    return value, logit_gradient(pair.student_q_RV, slope, slope.sum(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient(name) -> None:
    teacher, student = logits()
    student.requires_grad_()
    expected = divergence64(name, teacher.softmax(-1), student.softmax(-1), 0.2)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    value, actual = gradient(name, teacher, student.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_column_that_both_lack_does_not_exist(name) -> None:
    teacher, student = logits()
    teacher[:, [2, 9]] = student[:, [2, 9]] = -INF
    kept = [i for i in range(17) if i not in (2, 9)]
    value, slope = gradient(name, teacher.float(), student.float())
    expected_value, expected_slope = gradient(name, teacher[:, kept].float(), student[:, kept].float())
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(slope[:, kept], expected_slope)
    assert not slope[:, [2, 9]].any()


@pytest.mark.parametrize("std", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_both_sides_may_underflow(name, std) -> None:
    teacher, student = (x.float() for x in logits(std=std))
    value, slope = gradient(name, teacher, student)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert (value >= -1e-6).all()
    torch.testing.assert_close(slope.sum(-1), torch.zeros(5), atol=1e-2 * std, rtol=0)


@pytest.mark.parametrize("zero", [-INF, -1e4, -200.0])
def test_one_hot_teacher_is_cross_entropy(zero) -> None:
    _, student = (x.float() for x in logits())
    label = torch.tensor([3, 0, 16, 5, 5])
    teacher = torch.full((5, 17), zero)
    teacher[torch.arange(5), label] = 0.0
    value, slope = gradient("forward_kl", teacher, student)
    torch.testing.assert_close(value, cross_entropy(log_probabilities(student), label))
    torch.testing.assert_close(slope, student.softmax(-1) - torch.nn.functional.one_hot(label, 17))


def test_teacher_without_mass_somewhere() -> None:
    """JSD keeps its bound; reverse KL is large but finite and pushes the student's mass away."""
    teacher, student = (x.float() for x in logits())
    teacher[:, 4] = -INF
    q = student.softmax(-1)
    value, slope = gradient("jsd", teacher, student)
    expected = divergence64("jsd", teacher.double().softmax(-1), q.double(), 0.2)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(slope).all()
    value, slope = gradient("reverse_kl", teacher, student)
    assert torch.isfinite(value).all() and (value > -0.5 * LOG_FLOOR * q[:, 4]).all()
    assert (slope[:, 4] > 0).all()


def test_jsd_mix_is_the_teachers_share() -> None:
    """mix → 1: the mixture is the teacher, D / (1 − mix) → KL(student‖teacher); mix → 0 the other way round."""
    teacher, student = logits(std=1.0)
    pair = DistributionPair.of_logits(teacher_RV=teacher, student_RV=student)
    near_one, near_zero = JSD(mix=1 - 1e-6)(pair)[0] / 1e-6, JSD(mix=1e-6)(pair)[0] / 1e-6
    torch.testing.assert_close(near_one, reverse_kl(pair)[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_zero, forward_kl(pair)[0], rtol=1e-3, atol=1e-4)
    assert (forward_kl(pair)[0] - reverse_kl(pair)[0]).abs().min() > 0.01


def test_jsd_is_symmetric_at_one_half_and_bounded() -> None:
    teacher, student = logits(std=30.0)
    one, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=teacher, student_RV=student))
    other, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=student, student_RV=teacher))
    torch.testing.assert_close(one, other)
    assert (one <= math.log(2) + 1e-12).all() and one.max() > 0.6
    disjoint = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    value, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=disjoint[0], student_RV=disjoint[1]))
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)


def test_entropy_of_the_uniform_distribution() -> None:
    logp = log_probabilities(torch.zeros(2, 50))
    torch.testing.assert_close(entropy(logp, logp.exp()), torch.full((2,), math.log(50)))
