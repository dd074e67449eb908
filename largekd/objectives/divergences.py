"""Divergences between a teacher's and a student's next-token distribution, with their analytic gradients.

Shape letters: R rows (tokens) of one block, V outcomes of the common support, K likeliest of them. W: the teacher's
outcomes where they may be others than the student's (`sorted_distance` alone).

A divergence maps log-probabilities to a value D and to the slope ∂D/∂(log q) = q·∂D/∂q, all log q taken as free
variables. With log q = log softmax(z / T), every function of log q, whether or not it can be written with q alone, has
∂D/∂z = (1/T)·(slope − q·Σ slope). That covers losses on logits too, as long as a shift of all logits changes nothing:
log q is z less a shift. The slope stays finite where ∂D/∂q overflows (q → 0).

The same functions are applied to sparse rows: K ids and one outcome for all others, or K ids that do not sum to one.
No function counts on a row that is complete; a constant times q, which would cancel in a complete one, is kept in the
slope. Each docstring says whether the function means anything on sparse rows.

All functions are pure, take and return float32 (or float64; other dtypes are converted before), and are exact at
columns where both distributions vanish: 0·log 0 = 0. The factor T² of Hinton et al. (arXiv 1503.02531, section 2) is no
part of a divergence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_FLOOR = -1.0e4
"""The log-probability that stands for −inf: exp() of it is 0 and a product with 0 is 0, not NaN."""

POSSIBLE = LOG_FLOOR / 2
"""Log-probabilities above this belong to outcomes that can happen."""


@dataclass(frozen=True)
class DistributionPair:
    """Teacher p and student q on the same outcomes, as probabilities and as log-probabilities; each (rows, outcomes).

    For `sorted_distance` alone the two may have different numbers of columns.
    """

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
    """A row function: value D_R (rows,) and slope (∂D/∂ log q)_RV (rows, outcomes); KL and its kin are in nats."""

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]: ...


def log_probabilities(logits_RV: Tensor) -> Tensor:
    """log softmax over the last dimension, floored at LOG_FLOOR; logits of −inf get probability 0 exactly."""
    return torch.log_softmax(logits_RV, dim=-1).clamp_min(LOG_FLOOR)


def forward_kl(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = Σ p·(log p − log q); slope −p, so that ∂D/∂z = (q − p)/T.

    Sparse rows: yes. Source: Hinton et al. 2015, arXiv 1503.02531, equation 2 (as a divergence; the teacher's entropy
    is constant).
    """
    value_R = (pair.teacher_p_RV * (pair.teacher_logp_RV - pair.student_logq_RV)).sum(-1)
    return value_R, -pair.teacher_p_RV


def reverse_kl(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = Σ q·(log q − log p); slope q·(log q − log p + 1).

    Where the teacher's p is exactly 0 its log is LOG_FLOOR: the value stays finite and the gradient removes mass.
    Sparse rows: yes. Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543, equation 1.
    """
    slope_RV = pair.student_q_RV * (pair.student_logq_RV - pair.teacher_logp_RV)
    return slope_RV.sum(-1), slope_RV.add_(pair.student_q_RV)


@dataclass(frozen=True)
class BidirectionalKL:
    """a·KL(p‖q) + b·KL(q‖p) with a = `forward_weight`, b = `reverse_weight`; slope −a·p + b·q·(log q − log p + 1).

    Sparse rows: yes. With a = b = 1 it is Jeffreys' divergence (Kullback and Leibler 1951, section 2).
    """

    forward_weight: float
    reverse_weight: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        log_ratio_RV = pair.student_logq_RV - pair.teacher_logp_RV
        teacher_RV, student_RV = pair.teacher_p_RV * self.forward_weight, pair.student_q_RV * self.reverse_weight
        value_R = ((student_RV - teacher_RV) * log_ratio_RV).sum(-1)
        return value_R, torch.addcmul(student_RV, student_RV, log_ratio_RV).sub_(teacher_RV)


@dataclass(frozen=True)
class JSD:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q; slope (1−β)·q·(log q − log m).

    `mix` is β, the teacher's weight in the mixture, in (0, 1); β = 1/2 is the symmetric divergence, at most ln 2.
    Sparse rows: yes. Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1 with P the teacher.
    """

    mix: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        _, log_mixture_RV = _mixture(pair.student_q_RV, pair.teacher_p_RV, self.mix)
        slope_RV = (1.0 - self.mix) * pair.student_q_RV * (pair.student_logq_RV - log_mixture_RV)
        teacher_R = (pair.teacher_p_RV * (pair.teacher_logp_RV - log_mixture_RV)).sum(-1)
        return self.mix * teacher_R + slope_RV.sum(-1), slope_RV


@dataclass(frozen=True)
class SkewedForwardKL:
    """KL(p‖m) with m = s·p + (1−s)·q, s = `skew` in [0, 1); slope −(1−s)·q·p/m. At most −ln s; s = 0 is KL(p‖q).

    Sparse rows: yes. Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1, with P the teacher.
    """

    skew: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        if self.skew == 0.0:
            # p·q/m is 0/0 where q has underflowed; the plain form is exact there.
            return forward_kl(pair)
        mixture_RV, log_mixture_RV = _mixture(pair.student_q_RV, pair.teacher_p_RV, self.skew)
        value_R = (pair.teacher_p_RV * (pair.teacher_logp_RV - log_mixture_RV)).sum(-1)
        share_RV = pair.student_q_RV / mixture_RV
        return value_R, share_RV.mul_(pair.teacher_p_RV).mul_(self.skew - 1.0)


@dataclass(frozen=True)
class SkewedReverseKL:
    """KL(q‖m) with m = s·q + (1−s)·p, s = `skew` in [0, 1); slope q·(log q − log m + 1 − s·q/m). s = 0 is KL(q‖p).

    At most −ln s, whatever the teacher rules out. Sparse rows: yes. Source: Ko et al. 2024 (DistiLLM),
    arXiv 2402.03898, section 3.1, with P the teacher.
    """

    skew: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        if self.skew == 0.0:
            return reverse_kl(pair)
        mixture_RV, log_mixture_RV = _mixture(pair.teacher_p_RV, pair.student_q_RV, self.skew)
        log_ratio_RV = pair.student_logq_RV - log_mixture_RV
        value_R = (pair.student_q_RV * log_ratio_RV).sum(-1)
        share_RV = pair.student_q_RV / mixture_RV
        return value_R, log_ratio_RV.add_(1.0).sub_(share_RV, alpha=self.skew).mul_(pair.student_q_RV)


@dataclass(frozen=True)
class AdaptiveKL:
    """(g_head·KL(p‖q) + g_tail·KL(q‖p)) / (g_head + g_tail), g the sum of |p − q| over the teacher's head and tail.

    The head is the fewest of the teacher's likeliest outcomes whose probabilities reach `head_mass`, with all that tie
    with the least likely of them; where a sparse row never reaches it, every outcome. (The authors' code leaves the
    outcome that reaches `head_mass` to the tail; here no order among ties matters and no head is empty.) The gaps are
    constants in the gradient. Where both are 0, p = q: the value and, of a complete row, the gradient are 0.
    Cost: about 30 passes over a row to find the head, a third of the time of sorting it. Sparse rows: yes, but "tail"
    is then what the row shows of it. Source: Wu et al. 2024, arXiv 2404.02657, the adaptive KL divergence.
    """

    head_mass: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        p_RV, q_RV = pair.teacher_p_RV, pair.student_q_RV
        head_RV = p_RV >= _least_of_head(p_RV, head_mass=self.head_mass)
        gap_RV = (p_RV - q_RV).abs_()
        head_R = torch.where(head_RV, gap_RV, 0.0).sum(-1)
        share_R = head_R / gap_RV.sum(-1).clamp_min(torch.finfo(gap_RV.dtype).tiny)
        log_ratio_RV = pair.student_logq_RV - pair.teacher_logp_RV
        forward_R, reverse_R = -(p_RV * log_ratio_RV).sum(-1), (q_RV * log_ratio_RV).sum(-1)
        slope_RV = torch.addcmul(q_RV, q_RV, log_ratio_RV)
        # lerp(x, y, s) = (1 − s)·x + s·y; −p is the slope of the forward direction.
        slope_RV = torch.lerp(slope_RV, -p_RV, share_R[:, None])
        return torch.lerp(reverse_R, forward_R, share_R), slope_RV


def total_variation(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """½·Σ |p − q|, in [0, 1]; slope ½·q·sign(q − p), 0 where p = q.

    Sparse rows: yes (K ids and a tail: never more than the whole row's). Source: Wen et al. 2023 (f-DISTILL),
    arXiv 2307.15190, the total variation loss.
    """
    difference_RV = pair.student_q_RV - pair.teacher_p_RV
    # Not vector_norm: on CPU it adds in sequence, which costs four digits of a row of 150,000 in float32.
    value_R = 0.5 * difference_RV.abs().sum(-1)
    return value_R, difference_RV.sign_().mul_(pair.student_q_RV).mul_(0.5)


@dataclass(frozen=True)
class AlphaBeta:
    """−1/(αβ)·Σ [p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)], α, β > 0; slope q^β·(q^α − p^α)/α.

    (1, β → 0) is KL(p‖q) and (α → 0, 1) is KL(q‖p). Evaluated as Σ [p^α·(p^β − q^β)/β − q^β·(p^α − q^α)/α] / (α+β):
    differences are taken per outcome, so that rounding grows with 1/min(α, β) and not with 1/(αβ).
    Sparse rows: yes. Source: Wang et al. 2025 (ABKD), arXiv 2505.04560, with P the teacher, after Cichocki, Cruces and
    Amari 2011, Entropy 13, "Generalized Alpha-Beta Divergences".
    """

    alpha: float
    beta: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        p_alpha_RV, q_alpha_RV = (_power(x, self.alpha) for x in (pair.teacher_logp_RV, pair.student_logq_RV))
        p_beta_RV, q_beta_RV = p_alpha_RV, q_alpha_RV
        if self.beta != self.alpha:
            p_beta_RV, q_beta_RV = (_power(x, self.beta) for x in (pair.teacher_logp_RV, pair.student_logq_RV))
        slope_RV = (q_alpha_RV - p_alpha_RV).mul_(q_beta_RV).mul_(1.0 / self.alpha)
        toward_RV = (p_beta_RV - q_beta_RV).mul_(p_alpha_RV).mul_(1.0 / self.beta)
        return toward_RV.add_(slope_RV).sum(-1) / (self.alpha + self.beta), slope_RV


def logit_mse(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """Σ (d − mean d)² / (2V), d = log q − log p over the V outcomes possible on both sides; slope (d − mean d)/V.

    Centring removes both normalisers, so that d is the difference of centred logits over T, and T²·D is the same for
    every temperature. It is the limit of T²·KL(p‖q), and of T²·KL(q‖p), as T → ∞, with the factor 1: with x = d·T
    fixed and V complete, KL = Var(d)/2 + O(T⁻³) under the uniform distribution that both tend to.
    Sparse rows: no (their columns are not logits). Source: Hinton et al. 2015, arXiv 1503.02531, section 2.1,
    equation 4, integrated.
    """
    possible_RV = (pair.teacher_logp_RV > POSSIBLE) & (pair.student_logq_RV > POSSIBLE)
    count_R1 = possible_RV.sum(-1, keepdim=True).clamp_min(1)
    difference_RV = torch.where(possible_RV, pair.student_logq_RV - pair.teacher_logp_RV, 0.0)
    centred_RV = difference_RV - difference_RV.sum(-1, keepdim=True) / count_R1
    centred_RV = torch.where(possible_RV, centred_RV, 0.0)
    slope_RV = centred_RV / count_R1
    return 0.5 * (slope_RV * centred_RV).sum(-1), slope_RV


@dataclass(frozen=True)
class RankingHinge:
    """Mean over pairs (i, j) of max(0, margin − (log q_i − log q_j)), i likelier than j for the teacher.

    Pairs of the teacher's `top_k` outcomes; those that tie with each other, or that one side rules out, are left out of
    the sum and of the count (no pair: 0). log q_i − log q_j is the difference of student logits over T. Slope: −1/pairs
    at i and +1/pairs at j for every pair inside the margin.
    Sparse rows: no (the outcome of all others has no rank). Source: the pairwise margin loss of Herbrich, Graepel and
    Obermayer 2000 ("Large margin rank boundaries for ordinal regression") with the teacher's order as the label.
    """

    top_k: int
    margin: float

    def __call__(self, pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
        logp_RK, ids_RK = pair.teacher_logp_RV.topk(min(self.top_k, pair.teacher_logp_RV.shape[-1]), dim=-1)
        logq_RK = pair.student_logq_RV.gather(-1, ids_RK)
        possible_RK = (logp_RK > POSSIBLE) & (logq_RK > POSSIBLE)
        ordered_RKK = logp_RK[:, :, None] > logp_RK[:, None, :]
        ordered_RKK &= possible_RK[:, :, None] & possible_RK[:, None, :]
        violation_RKK = self.margin - (logq_RK[:, :, None] - logq_RK[:, None, :])
        active_RKK = ordered_RKK & (violation_RKK > 0)
        pairs_R = ordered_RKK.sum((-2, -1)).clamp_min(1)
        value_R = torch.where(active_RKK, violation_RKK, 0.0).sum((-2, -1)) / pairs_R
        # Times i is the less likely one of a pair inside the margin, less the times it is the likelier one.
        slope_RK = (active_RKK.sum(-2) - active_RKK.sum(-1)).to(logq_RK.dtype) / pairs_R[:, None]
        return value_R, torch.zeros_like(pair.student_logq_RV).scatter_(-1, ids_RK, slope_RK)


def sorted_distance(pair: DistributionPair, /) -> tuple[Tensor, Tensor]:
    """Σ_n |p_(n) − q_(n)|, p_(n) the n-th largest; slope q·sign(q_(n) − p_(n)) at the outcome whose rank is n.

    p and q may have different numbers of columns: the shorter one is continued with zeros. The value is in [0, 2] and
    depends on no order of ids, so that it needs no common vocabulary. Ranks among equal q are arbitrary.
    Cost: both rows are sorted. Sparse rows: no (K ids and a tail have no ranks beyond K). Source: Boizard et al. 2024
    (universal logit distillation), arXiv 2402.12030, the closed form of its Wasserstein distance.
    """
    teacher_RW, _ = pair.teacher_p_RV.sort(dim=-1, descending=True)
    student_RV, order_RV = pair.student_q_RV.sort(dim=-1, descending=True)
    ids = student_RV.shape[-1]
    unmatched_R = teacher_RW[:, ids:].sum(-1)
    difference_RV = student_RV - F.pad(teacher_RW[:, :ids], (0, max(0, ids - teacher_RW.shape[-1])))
    value_R = difference_RV.abs().sum(-1) + unmatched_R
    slope_RV = difference_RV.sign_().mul_(student_RV)
    return value_R, torch.empty_like(slope_RV).scatter_(-1, order_RV, slope_RV)


def cross_entropy(student_logq_RV: Tensor, labels_R: Tensor) -> Tensor:
    """−log q[label] per row (rows,), in nats; ∂D/∂z = q − onehot(label), that is a slope of −1 at the label alone."""
    return -student_logq_RV.gather(-1, labels_R[:, None]).squeeze(-1)


def logit_gradient(q_RV: Tensor, slope_RV: Tensor, slope_sum_R: Tensor) -> Tensor:
    """slope − q·Σ slope: the gradient with respect to z / T."""
    return slope_RV - q_RV * slope_sum_R[:, None]


def entropy(logp_RV: Tensor, p_RV: Tensor) -> Tensor:
    """−Σ p·log p per row (rows,), in nats."""
    return -(p_RV * logp_RV).sum(-1)


def _mixture(first_RV: Tensor, second_RV: Tensor, share: float, /) -> tuple[Tensor, Tensor]:
    """(1 − share)·first + share·second and its log; at least the smallest normal number, so that the log is finite."""
    mixture_RV = torch.lerp(first_RV, second_RV, share).clamp_min_(torch.finfo(first_RV.dtype).tiny)
    return mixture_RV, mixture_RV.log()


def _power(logp_RV: Tensor, exponent: float, /) -> Tensor:
    """p to a positive power, 0 for impossible outcomes; finer than pow(), which sees a p that has underflowed."""
    power_RV = (logp_RV * exponent).exp_()
    if exponent * POSSIBLE > -750.0:  # exp() of this would not be 0 (in float64)
        power_RV = torch.where(logp_RV > POSSIBLE, power_RV, 0.0)
    return power_RV


_BITS_OF_ONE = {torch.float32: (torch.int32, 0x3F80_0000), torch.float64: (torch.int64, 0x3FF0_0000_0000_0000)}


def _least_of_head(p_RV: Tensor, /, *, head_mass: float) -> Tensor:
    """The largest t (rows, 1) for which the outcomes with p ≥ t have at least `head_mass`; 0 if there is none.

    Found by bisection over the bit patterns of numbers in [0, 1], which are ordered as the numbers are: exact after as
    many passes as 1.0 has bits, without a sort and without a decision on the host.
    """
    bits_dtype, one = _BITS_OF_ONE[p_RV.dtype]
    above = one + 1
    low_R1 = torch.zeros(p_RV.shape[0], 1, dtype=bits_dtype, device=p_RV.device)
    high_R1 = torch.full_like(low_R1, above)
    for _ in range(above.bit_length()):
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        mass_R1 = torch.where(p_RV >= middle_R1.view(p_RV.dtype), p_RV, 0.0).sum(-1, keepdim=True)
        reached_R1 = mass_R1 >= head_mass
        low_R1 = torch.where(reached_R1, middle_R1, low_R1)
        high_R1 = torch.where(reached_R1, high_R1, middle_R1)
    return low_R1.view(p_RV.dtype)
