"""The row function of the vocabulary pass: every term, its logit gradient and the health figures of a block of rows.

Shape letters: R rows of the block, V student ids, W ids the divergences are defined on (shared by both heads),
K terms. A block is small enough to live in a processor's cache; everything here is in float32 (or float64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from largekd.objectives.divergences import (
    DistributionPair,
    cross_entropy,
    entropy,
    forward_kl,
    log_probabilities,
    logit_gradient,
)
from largekd.objectives.terms import VocabularyTerm


@dataclass(frozen=True)
class HeadShape:
    """What follows the projection: softcap(scale · (hidden · weightᵀ + bias))."""

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    has_bias: bool = False

    def logits(self, *, projected_RV: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits in float32 (float64 stays)."""
        logits_RV = projected_RV.to(torch.promote_types(projected_RV.dtype, torch.float32))
        if bias_V is not None:
            logits_RV = logits_RV + bias_V
        if self.scale != 1.0:
            logits_RV = logits_RV * self.scale
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV

    def projection_gradient(self, *, gradient_RV: Tensor, logits_RV: Tensor) -> Tensor:
        """∂/∂(hidden · weightᵀ) from ∂/∂logits: c·tanh(x/c) has the derivative 1 − (logit/c)²."""
        if self.softcap is not None:
            gradient_RV = gradient_RV * (1.0 - (logits_RV / self.softcap).square())
        return gradient_RV * self.scale if self.scale != 1.0 else gradient_RV


@dataclass(frozen=True)
class RowPlan:
    """Everything about a block that is known before its numbers; hashable, so that a compiled form can be kept."""

    terms: tuple[VocabularyTerm, ...]
    temperature: float
    student: HeadShape
    teacher: HeadShape | None
    gradient: bool
    measure: bool

    @property
    def reads_teacher(self) -> bool:
        """Whether any figure of this plan depends on the teacher."""
        return self.teacher is not None and (self.measure or any(term.divergence for term in self.terms))

    @property
    def shared_ids(self) -> int:
        """W: the ids both heads have; they come first, in the same order (one tokenizer, unequal padding)."""
        return min(self.student.vocab_size, self.teacher.vocab_size) if self.teacher else self.student.vocab_size

    @property
    def has_support(self) -> bool:
        """Whether some shared id may be impossible (a bias of −inf) on one side; it then is so on both."""
        heads = (self.student, self.teacher)
        return any(head is not None and head.has_bias and head.softcap is None for head in heads)

    @property
    def one_softmax(self) -> bool:
        """Whether cross-entropy and the divergences at temperature 1 read the same student distribution."""
        return self.shared_ids == self.student.vocab_size and not self.has_support


@dataclass(frozen=True)
class RowBlock:
    """The numbers of one block: projections hidden · weightᵀ before bias and scale, labels and factors."""

    student_RV: Tensor
    teacher_RW: Tensor | None
    labels_R: Tensor
    weight_R: Tensor
    factor_RK: Tensor
    student_bias_V: Tensor | None = None
    teacher_bias_W: Tensor | None = None
    support_W: Tensor | None = None


@dataclass(frozen=True)
class RowResult:
    """Unweighted values per row and term, health per row (times token weight), gradient of Σ factor · value."""

    values_RK: Tensor
    health_RH: Tensor | None
    gradient_RV: Tensor | None


def evaluate_rows(block: RowBlock, /, *, plan: RowPlan) -> RowResult:
    """All of a plan's figures for one block; the gradient is with respect to `student_RV`."""
    logits_RV = plan.student.logits(projected_RV=block.student_RV, bias_V=block.student_bias_V)
    needs_full = plan.measure or any(term.divergence is None for term in plan.terms)
    full_logq_RV = log_probabilities(logits_RV) if needs_full else None
    teacher_RW = _teacher_logits(block, plan=plan)
    at_one = at_temperature = None
    if teacher_RW is not None:
        student_RW = _on_support(logits_RV[:, : plan.shared_ids], support_W=block.support_W)
        reuse = full_logq_RV if plan.one_softmax else None
        if plan.measure or plan.temperature == 1.0:
            at_one = _pair(teacher_RW, student_RW, temperature=1.0, student_logq_RW=reuse)
        at_temperature = at_one
        if plan.temperature != 1.0 and any(term.divergence for term in plan.terms):
            at_temperature = _pair(teacher_RW, student_RW, temperature=plan.temperature, student_logq_RW=None)
    values_RK, gradient_RV = _terms(block, plan=plan, full_logq_RV=full_logq_RV, pair=at_temperature)
    if gradient_RV is not None:
        gradient_RV = plan.student.projection_gradient(gradient_RV=gradient_RV, logits_RV=logits_RV)
    health_RH = (
        _health(block, full_logq_RV=full_logq_RV, pair=at_one) if full_logq_RV is not None and plan.measure else None
    )
    return RowResult(values_RK, health_RH, gradient_RV)


def _teacher_logits(block: RowBlock, /, *, plan: RowPlan) -> Tensor | None:
    if block.teacher_RW is None or plan.teacher is None:
        return None
    logits_RW = plan.teacher.logits(projected_RV=block.teacher_RW, bias_V=block.teacher_bias_W)
    return _on_support(logits_RW, support_W=block.support_W)


def _on_support(logits_RW: Tensor, /, *, support_W: Tensor | None) -> Tensor:
    return logits_RW if support_W is None else logits_RW.masked_fill(~support_W, float("-inf"))


def _pair(
    teacher_RW: Tensor, student_RW: Tensor, /, *, temperature: float, student_logq_RW: Tensor | None
) -> DistributionPair:
    if temperature != 1.0:
        teacher_RW, student_RW = teacher_RW * (1.0 / temperature), student_RW * (1.0 / temperature)
    if student_logq_RW is None:
        student_logq_RW = log_probabilities(student_RW)
    return DistributionPair.of_logs(teacher_logp_RV=log_probabilities(teacher_RW), student_logq_RV=student_logq_RW)


def _terms(
    block: RowBlock, /, *, plan: RowPlan, full_logq_RV: Tensor | None, pair: DistributionPair | None
) -> tuple[Tensor, Tensor | None]:
    """Values per term and, if the plan asks for it, the gradient of their factored sum with respect to the logits."""
    values, slope_RW, hard_factor_R = [], None, None
    for index, term in enumerate(plan.terms):
        factor_R = block.factor_RK[:, index]
        if term.divergence is None:
            assert full_logq_RV is not None
            values.append(cross_entropy(full_logq_RV, block.labels_R))
            hard_factor_R = factor_R
            continue
        assert pair is not None, "a divergence was asked for without a teacher's signal"
        value_R, term_slope_RW = term.divergence(pair)
        values.append(value_R)
        weighted_RW = term_slope_RW * factor_R[:, None]
        slope_RW = weighted_RW if slope_RW is None else slope_RW + weighted_RW
    values_RK = torch.stack(values, dim=-1)
    if not plan.gradient:
        return values_RK, None
    gradient_RV = None
    if slope_RW is not None and pair is not None:
        gradient_RW = logit_gradient(pair.student_q_RV, slope_RW, slope_RW.sum(-1))
        if plan.temperature != 1.0:
            gradient_RW = gradient_RW * (1.0 / plan.temperature)
        gradient_RV = F.pad(gradient_RW, (0, plan.student.vocab_size - plan.shared_ids))
    if hard_factor_R is not None and full_logq_RV is not None:
        shares = pair is not None and plan.one_softmax and plan.temperature == 1.0
        q_RV = pair.student_q_RV if shares and pair is not None else full_logq_RV.exp()
        hard_RV = q_RV * hard_factor_R[:, None]
        gradient_RV = hard_RV if gradient_RV is None else gradient_RV + hard_RV
        gradient_RV = gradient_RV.scatter_add_(-1, block.labels_R[:, None], -hard_factor_R[:, None])
    return values_RK, gradient_RV


def _health(block: RowBlock, /, *, full_logq_RV: Tensor, pair: DistributionPair | None) -> Tensor:
    """The figures of HEALTH_NAMES for each row, times the row's token weight."""
    hard_R = cross_entropy(full_logq_RV, block.labels_R)
    correct_R = full_logq_RV.argmax(-1).eq(block.labels_R).to(hard_R.dtype)
    if pair is None:
        zero_R = torch.zeros_like(hard_R)
        figures = [torch.ones_like(hard_R), hard_R, correct_R, entropy(full_logq_RV, full_logq_RV.exp())] + [zero_R] * 4
    else:
        kl_R, _ = forward_kl(pair)
        agree_R = pair.student_logq_RV.argmax(-1).eq(pair.teacher_logp_RV.argmax(-1)).to(hard_R.dtype)
        student_R = entropy(pair.student_logq_RV, pair.student_q_RV)
        teacher_R = entropy(pair.teacher_logp_RV, pair.teacher_p_RV)
        # A label that only the student has gets probability 0 from the teacher.
        known_R = block.labels_R < pair.teacher_logp_RV.shape[-1]
        taught_R = cross_entropy(pair.teacher_logp_RV, torch.where(known_R, block.labels_R, 0))
        taught_R = torch.where(known_R, taught_R, float("inf"))
        figures = [torch.ones_like(hard_R), hard_R, correct_R, student_R, teacher_R, taught_R, kl_R, agree_R]
    return torch.stack(figures, dim=-1) * block.weight_R[:, None]
