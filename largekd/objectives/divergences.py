"""Divergences between a teacher's and a student's next-token distribution, with their analytic gradients.

Shape letters: R rows (tokens) of one block, V ids of the common support.

Every divergence D(p, q) is differentiated through one identity. With the student's q = softmax(z / T),
r = ∂D/∂q and m = Σ q·r, the gradient with respect to the logits is ∂D/∂z = (1/T)·q·(r − m). A divergence therefore
returns its value and its *weighted slope* q·r; the product stays finite where r alone overflows (q → 0). A constant
added to r cancels in r − m and is left out.

All functions are pure, take and return float32 (or float64), and are exact at columns where both distributions
vanish: 0·log 0 = 0. The factor T² of Hinton et al. (arXiv 1503.02531, section 2) is no part of a divergence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LOG_FLOOR = -1.0e4
"""The log-probability that stands for −inf: exp() of it is 0 and a product with 0 is 0, not NaN."""


@dataclass(frozen=True)
class DistributionPair:
    """Teacher p and student q on the same ids, as probabilities and as log-probabilities; each (rows, ids)."""

    teacher_logp_RV: Tensor
    teacher_p_RV: Tensor
    student_logq_RV: Tensor
    student_q_RV: Tensor

    @classmethod
    def of_logits(cls, *, teacher_RV: Tensor, student_RV: Tensor) -> "DistributionPair":
        """The pair softmax(teacher), softmax(student); a temperature has been applied to the logits before."""
        return cls.of_logs(teacher_logp_RV=log_probabilities(teacher_RV), student_logq_RV=log_probabilities(student_RV))

    @classmethod
    def of_logs(cls, *, teacher_logp_RV: Tensor, student_logq_RV: Tensor) -> "DistributionPair":
        """The pair with these log-probabilities."""
        return cls(teacher_logp_RV, teacher_logp_RV.exp(), student_logq_RV, student_logq_RV.exp())


class Divergence(Protocol):
    """A row function: value D_R (rows,) in nats and weighted slope (q·∂D/∂q)_RV (rows, ids)."""

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]: ...


def log_probabilities(logits_RV: Tensor) -> Tensor:
    """log softmax over the last dimension, floored at LOG_FLOOR; logits of −inf get probability 0 exactly."""
    return torch.log_softmax(logits_RV, dim=-1).clamp_min(LOG_FLOOR)


def forward_kl(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = Σ p·(log p − log q); r = −p/q, so q·r = −p and ∂D/∂z = (q − p)/T.

    Source: Hinton et al. 2015, arXiv 1503.02531, equation 2 (as a divergence; the teacher's entropy is constant).
    """
    value_R = (pair.teacher_p_RV * (pair.teacher_logp_RV - pair.student_logq_RV)).sum(-1)
    return value_R, -pair.teacher_p_RV


def reverse_kl(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = Σ q·(log q − log p); r = log q − log p (+ 1, which cancels), so Σ q·r = D.

    Where the teacher's p is exactly 0 its log is LOG_FLOOR: the value stays finite and the gradient removes mass.
    Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1.
    """
    slope_RV = pair.student_q_RV * (pair.student_logq_RV - pair.teacher_logp_RV)
    return slope_RV.sum(-1), slope_RV


@dataclass(frozen=True)
class JSD:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q; r = (1−β)·(log q − log m).

    `mix` is β, the teacher's weight in the mixture, in (0, 1); β = 1/2 is the symmetric divergence, at most ln 2.
    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1 with P the teacher.
    """

    mix: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        mixture_RV = torch.lerp(pair.student_q_RV, pair.teacher_p_RV, self.mix)
        log_mixture_RV = mixture_RV.clamp_min(torch.finfo(mixture_RV.dtype).tiny).log()
        slope_RV = (1.0 - self.mix) * pair.student_q_RV * (pair.student_logq_RV - log_mixture_RV)
        teacher_R = (pair.teacher_p_RV * (pair.teacher_logp_RV - log_mixture_RV)).sum(-1)
        return self.mix * teacher_R + slope_RV.sum(-1), slope_RV


def cross_entropy(student_logq_RV: Tensor, labels_R: Tensor) -> Tensor:
    """−log q[label] per row (rows,), in nats; ∂D/∂z = q − onehot(label), that is a slope of −1 at the label alone."""
    return -student_logq_RV.gather(-1, labels_R[:, None]).squeeze(-1)


def logit_gradient(q_RV: Tensor, slope_RV: Tensor, slope_sum_R: Tensor) -> Tensor:
    """q·(r − m) from the weighted slope q·r and its row sum m: the gradient with respect to z / T."""
    return slope_RV - q_RV * slope_sum_R[:, None]


def entropy(logp_RV: Tensor, p_RV: Tensor) -> Tensor:
    """−Σ p·log p per row (rows,), in nats."""
    return -(p_RV * logp_RV).sum(-1)
