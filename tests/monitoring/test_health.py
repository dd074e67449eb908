"""Health figures against distributions written out in full."""

import math

import pytest
import torch

from largekd.contracts import HEALTH_NAMES
from largekd.monitoring.health import health_figures, perplexity


def sums_of(*, student_TV: torch.Tensor, teacher_TV: torch.Tensor, labels_T: torch.Tensor, weight_T: torch.Tensor):
    p, q = teacher_TV.softmax(-1), student_TV.softmax(-1)
    per_token = {
        "token_weight": torch.ones_like(weight_T),
        "ce": -q.log()[range(len(labels_T)), labels_T],
        "student_top1_correct": (q.argmax(-1) == labels_T).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "signal_weight": torch.ones_like(weight_T),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "teacher_ce": -p.log()[range(len(labels_T)), labels_T],
        "kl_t1": (p * (p.log() - q.log())).sum(-1),
        "top1_agree": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    return {name: float((weight_T * values).sum()) for name, values in per_token.items()}


def test_figures_of_a_certain_teacher_and_an_ignorant_student():
    vocab = 8
    teacher_TV = torch.full((3, vocab), -50.0, dtype=torch.float64)
    teacher_TV[:, 2] = 50.0
    student_TV = torch.zeros(3, vocab, dtype=torch.float64)
    student_TV[0, 2] = 1e-9
    weight_T = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    sums = sums_of(student_TV=student_TV, teacher_TV=teacher_TV, labels_T=torch.tensor([2, 3, 4]), weight_T=weight_T)
    figures = health_figures(sums)
    assert figures == {
        "health/kl_t1": pytest.approx(math.log(vocab)),
        "health/top1_agreement": pytest.approx(0.5),
        "health/student_entropy": pytest.approx(math.log(vocab)),
        "health/teacher_entropy": pytest.approx(0.0, abs=1e-9),
        "health/entropy_gap": pytest.approx(-math.log(vocab)),
        "health/student_top1_accuracy": pytest.approx(0.5),
    }
    assert perplexity(sums["ce"] / sums["token_weight"]) == pytest.approx(vocab)


def test_no_counted_token_and_missing_sums():
    figures = health_figures(dict.fromkeys(HEALTH_NAMES, 0.0))
    assert all(math.isnan(value) for value in figures.values())
    with pytest.raises(AssertionError, match="'ce'"):
        health_figures({name: 1.0 for name in HEALTH_NAMES if name != "ce"})


def test_figures_of_the_teacher_are_over_the_tokens_that_it_has_a_signal_for():
    sums = dict.fromkeys(HEALTH_NAMES, 6.0) | {"token_weight": 4.0, "signal_weight": 3.0}
    figures = health_figures(sums)
    assert figures["health/kl_t1"] == figures["health/top1_agreement"] == figures["health/teacher_entropy"] == 2.0
    assert figures["health/student_entropy"] == figures["health/student_top1_accuracy"] == 1.5
    figures = health_figures(sums | {"signal_weight": 0.0})
    assert math.isnan(figures["health/kl_t1"]) and figures["health/student_entropy"] == 1.5


def test_perplexity_at_the_ends():
    assert perplexity(0.0) == 1.0
    assert math.isfinite(perplexity(709.7))
    assert perplexity(710.0) == math.inf and perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))
