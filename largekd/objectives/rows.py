"""The row function of the vocabulary pass: every term, its logit gradient and the health figures of a block of rows.

Shape letters: R rows of the block, V student ids, W teacher ids, K kept entries, N terms, O outcomes of a reading.
A block is small enough to live in a processor's cache; everything here is in float32 (or float64).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from largekd.objectives.divergences import (
    POSSIBLE,
    DistributionPair,
    cross_entropy,
    entropy,
    forward_kl,
    log_probabilities,
)
from largekd.objectives.mixture import AS_THEY_ARE, Mixture, MixtureRows, MixtureRule
from largekd.objectives.plugins import PluginTerm, TermRows
from largekd.objectives.readings import (
    DenseReading,
    Reading,
    SparseEntries,
    SparseKind,
    sampled_forward_kl,
    sparse_reading,
)
from largekd.objectives.selection import ScoreName, SelectionRule, bounded
from largekd.objectives.terms import PolicyGradient, SpanLikelihood, VocabularyTerm


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
    """Everything about a block that is known before its numbers; hashable, so that a compiled form can be kept.

    teacher: the head of a full distribution. sparse: how ids with log-probabilities are read, among `sparse_ids` ids.
    own_ids: each side keeps its own ids (other tokenizers). tempered: the block has a temperature.
    members: the heads of several teachers, which `mixing` combines.
    """

    terms: tuple[VocabularyTerm, ...]
    student: HeadShape
    teacher: HeadShape | None = None
    sparse: SparseKind | None = None
    sparse_ids: int | None = None
    own_ids: bool = False
    tempered: bool = False
    selection: SelectionRule | None = None
    gradient: bool = True
    measure: bool = False
    members: tuple[HeadShape, ...] = ()
    mixing: MixtureRule = AS_THEY_ARE

    @property
    def distils(self) -> bool:
        """Whether a term of this plan is evaluated row by row on the teacher's distribution."""
        outside = (SpanLikelihood, PolicyGradient)
        return any(term.divergence and not isinstance(term.divergence, outside) for term in self.terms)

    @property
    def reads_teacher(self) -> bool:
        """Whether any figure of this plan depends on the teacher's distribution."""
        known = self.teacher is not None or self.sparse is not None or bool(self.members)
        return known and (self.measure or self.distils or self.selection is not None)

    @property
    def student_ids(self) -> int:
        """Ids of the student that take part: shared ones come first, in the same order (unequal padding)."""
        if self.own_ids:
            return self.student.vocab_size
        if self.members:
            return min(self.student.vocab_size, *(head.vocab_size for head in self.members))
        other = self.teacher.vocab_size if self.teacher else self.sparse_ids
        return min(self.student.vocab_size, other) if other else self.student.vocab_size

    @property
    def teacher_ids(self) -> int:
        """W: ids of the teacher's head that take part."""
        assert self.teacher is not None
        return self.teacher.vocab_size if self.own_ids else self.student_ids

    @property
    def has_support(self) -> bool:
        """Whether some shared id may be impossible (a bias of −inf) on one side; it then is so on both."""
        heads = (self.student, self.teacher, *self.members)
        return any(head is not None and head.has_bias and head.softcap is None for head in heads)

    @property
    def one_softmax(self) -> bool:
        """Whether cross-entropy and the divergences at temperature 1 read the same student distribution."""
        return self.student_ids == self.student.vocab_size and not self.has_support


@dataclass(frozen=True)
class SparseRows:
    """A sparse signal's rows; `tail_R` at temperature 1, `tempered_tail_R` at the block's; weights of drawn ids."""

    ids_RK: Tensor
    logp_RK: Tensor
    tail_R: Tensor | None = None
    tempered_tail_R: Tensor | None = None
    weight_RK: Tensor | None = None


@dataclass(frozen=True)
class RowBlock:
    """The numbers of one block: projections hidden · weightᵀ before bias and scale, labels and factors.

    factor_RN multiplies a term's value and gradient, hard_R the gradient of −log q[label] that spans ask for.
    present_R: 1 where the teacher has a signal. limit: of a selection, bounded.
    """

    student_RV: Tensor
    labels_R: Tensor
    weight_R: Tensor
    factor_RN: Tensor
    teacher_RW: Tensor | None = None
    sparse: SparseRows | None = None
    hard_R: Tensor | None = None
    present_R: Tensor | None = None
    temperature: Tensor | None = None
    limit: Tensor | None = None
    student_bias_V: Tensor | None = None
    teacher_bias_W: Tensor | None = None
    support_W: Tensor | None = None
    mixture: MixtureRows | None = None


@dataclass(frozen=True)
class RowResult:
    """Unweighted values per row and term (0 where a token is not selected), health per row (times token weight),
    gradient of Σ factor · value, with a selection the bounded score and 1 where the row is kept, and of several
    teachers the figures of MIXTURE_NAMES per row, figure and member."""

    values_RN: Tensor
    health_RH: Tensor | None
    gradient_RV: Tensor | None
    score_R: Tensor | None = None
    keep_R: Tensor | None = None
    mixture_RFM: Tensor | None = None


def evaluate_rows(block: RowBlock, /, *, plan: RowPlan) -> RowResult:
    """All of a plan's figures for one block; the gradient is with respect to `student_RV`."""
    logits_RV = plan.student.logits(projected_RV=block.student_RV, bias_V=block.student_bias_V)
    hard = any(term.divergence is None for term in plan.terms) or block.hard_R is not None
    full_logq_RV = log_probabilities(logits_RV) if plan.measure or hard else None
    sides = _Sides.of(block, plan=plan, logits_RV=logits_RV)
    at_one = at_temperature = None
    if plan.reads_teacher:
        if plan.measure or plan.selection is not None or not plan.tempered:
            at_one = sides.reading(plan=plan, temperature=None, reuse_RV=full_logq_RV if plan.one_softmax else None)
        at_temperature = at_one
        if plan.tempered and plan.distils:
            at_temperature = sides.reading(plan=plan, temperature=block.temperature, reuse_RV=None)
    score_R, keep_R = _select(block, plan=plan, reading=at_one, student_RV=sides.student_RV)
    taken_R = _taken(block.present_R, keep_R)
    values_RN, gradient_RV = _terms(
        block, plan=plan, full_logq_RV=full_logq_RV, reading=at_temperature, sides=sides, taken_R=taken_R
    )
    if gradient_RV is not None:
        gradient_RV = plan.student.projection_gradient(gradient_RV=gradient_RV, logits_RV=logits_RV)
    health_RH = None
    if plan.measure and full_logq_RV is not None:
        measured = at_one
        if plan.sparse in ("renormalise", "drop"):  # no divergences between what the models say
            measured = sides.reading(plan=replace(plan, sparse="tail"), temperature=None, reuse_RV=None)
        health_RH = _health(block, plan=plan, full_logq_RV=full_logq_RV, reading=measured)
    mixture_RFM = None
    if sides.mixture is not None:
        student_logq_RV = at_one.pair.student_logq_RV if plan.measure and at_one is not None else None
        mixture_RFM = sides.mixture.figures(block.labels_R, rule=plan.mixing, student_logq_RV=student_logq_RV)
    return RowResult(values_RN, health_RH, gradient_RV, score_R, keep_R, mixture_RFM)


@dataclass(frozen=True)
class _Sides:
    """Both models' logits over the ids that take part, before a temperature."""

    student_RV: Tensor
    teacher_RW: Tensor | None
    sparse: SparseRows | None
    mixture: Mixture | None = None

    @classmethod
    def of(cls, block: RowBlock, /, *, plan: RowPlan, logits_RV: Tensor) -> "_Sides":
        student_RV = logits_RV[:, : plan.student_ids]
        if block.mixture is not None:
            return cls._of_several(block, plan=plan, student_RV=student_RV, mixture=block.mixture)
        if block.teacher_RW is None or plan.teacher is None:
            return cls(student_RV, None, block.sparse)
        teacher_RW = plan.teacher.logits(projected_RV=block.teacher_RW, bias_V=block.teacher_bias_W)
        if block.support_W is not None:
            gone_W = ~block.support_W
            student_RV, teacher_RW = (side.masked_fill(gone_W, float("-inf")) for side in (student_RV, teacher_RW))
        return cls(student_RV, teacher_RW, None)

    @classmethod
    def _of_several(cls, block: RowBlock, /, *, plan: RowPlan, student_RV: Tensor, mixture: MixtureRows) -> "_Sides":
        projected = zip(plan.members, mixture.members_RV, mixture.biases_V, strict=True)
        members_RV = [head.logits(projected_RV=member_RV, bias_V=bias_V) for head, member_RV, bias_V in projected]
        if block.support_W is not None:
            gone_W = ~block.support_W
            student_RV, *members_RV = (side.masked_fill(gone_W, float("-inf")) for side in (student_RV, *members_RV))
        reads_one = plan.measure or plan.selection is not None or not plan.tempered
        mixed = Mixture.of(members_RV, rows=mixture, rule=plan.mixing, reads_one=reads_one)
        return cls(student_RV, None, None, mixed)

    def reading(self, *, plan: RowPlan, temperature: Tensor | None, reuse_RV: Tensor | None) -> Reading | None:
        """The reading at a temperature; None for drawn ids. `reuse_RV`: the student's log-probabilities, if known."""
        inverse = None if temperature is None else 1.0 / temperature
        if self.sparse is not None and plan.sparse is not None:
            if plan.sparse == "sampled":
                return None
            tail_R = self.sparse.tail_R if temperature is None else self.sparse.tempered_tail_R
            assert tail_R is not None
            entries = SparseEntries(self.sparse.ids_RK, self.sparse.logp_RK, tail_R)
            student_RV = self.student_RV if inverse is None else self.student_RV * inverse
            return sparse_reading(entries, kind=plan.sparse, student_RV=student_RV, temperature=temperature)
        if self.mixture is not None:
            student_RV = self.student_RV if inverse is None else self.student_RV * inverse
            teacher_logp_RV = self.mixture.log_probabilities(inverse_temperature=inverse)
            logq_RV = log_probabilities(student_RV) if reuse_RV is None else reuse_RV
            return DenseReading(DistributionPair.of_logs(teacher_logp_RV=teacher_logp_RV, student_logq_RV=logq_RV))
        assert self.teacher_RW is not None, "a divergence was asked for without a teacher's signal"
        teacher_RW, student_RV = self.teacher_RW, self.student_RV
        if inverse is not None:
            teacher_RW, student_RV = teacher_RW * inverse, student_RV * inverse
        logq_RV = log_probabilities(student_RV) if reuse_RV is None else reuse_RV
        return DenseReading(
            DistributionPair.of_logs(teacher_logp_RV=log_probabilities(teacher_RW), student_logq_RV=logq_RV)
        )

    def rows(self, *, labels_R: Tensor, temperature: Tensor | None) -> TermRows:
        """What a user's term reads; of several teachers the mixture's log-probabilities, which are logits too."""
        if self.mixture is not None:
            inverse = None if temperature is None else 1.0 / temperature
            student_RV = self.student_RV if temperature is None else self.student_RV / temperature
            return TermRows(student_RV, self.mixture.log_probabilities(inverse_temperature=inverse), labels_R)
        assert self.teacher_RW is not None
        if temperature is None:
            return TermRows(self.student_RV, self.teacher_RW, labels_R)
        return TermRows(self.student_RV / temperature, self.teacher_RW / temperature, labels_R)


def _taken(present_R: Tensor | None, keep_R: Tensor | None) -> Tensor | None:
    if present_R is None or keep_R is None:
        return keep_R if present_R is None else present_R
    return present_R * keep_R


def _select(
    block: RowBlock, /, *, plan: RowPlan, reading: Reading | None, student_RV: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The bounded score of each row and 1 where it is kept; nothing without a selection.

    The student's entropy is over all ids that take part even where the teacher is known in a few; the teacher's and the
    gap then are of the outcomes that the reading has.
    """
    if plan.selection is None or not plan.reads_teacher:
        return None, None
    assert block.limit is not None
    if plan.selection.by == "student_entropy" and not isinstance(reading, DenseReading):
        logq_RV = log_probabilities(student_RV)
        score_R = entropy(logq_RV, logq_RV.exp())
    else:
        assert reading is not None, "drawn ids tell no more than the student's entropy"
        score_R = _score(reading.pair, by=plan.selection.by)
    score_R = bounded(score_R)
    return score_R, plan.selection.keeps(score_R, limit=block.limit)


def _score(pair: DistributionPair, /, *, by: ScoreName) -> Tensor:
    match by:
        case "teacher_entropy":
            return entropy(pair.teacher_logp_RV, pair.teacher_p_RV)
        case "student_entropy":
            return entropy(pair.student_logq_RV, pair.student_q_RV)
        case "gap":
            return forward_kl(pair)[0]


def _terms(
    block: RowBlock,
    /,
    *,
    plan: RowPlan,
    full_logq_RV: Tensor | None,
    reading: Reading | None,
    sides: _Sides,
    taken_R: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Values per term and, if the plan asks for it, the gradient of their factored sum with respect to the logits."""
    values: list[Tensor] = []
    slope_RO, direct_RV, hard_R = None, None, block.hard_R
    for index, term in enumerate(plan.terms):
        factor_R = block.factor_RN[:, index]
        divergence = term.divergence
        if divergence is None:
            assert full_logq_RV is not None
            values.append(cross_entropy(full_logq_RV, block.labels_R))
            hard_R = factor_R if hard_R is None else hard_R + factor_R
            continue
        if isinstance(divergence, SpanLikelihood | PolicyGradient):
            values.append(torch.zeros_like(factor_R))  # its value belongs to several rows and is added outside
            continue
        factor_R = factor_R if taken_R is None else factor_R * taken_R
        if isinstance(divergence, PluginTerm):
            rows = sides.rows(labels_R=block.labels_R, temperature=block.temperature if plan.tempered else None)
            value_R, gradient_RV = divergence.evaluate(rows, factor_R=factor_R, gradient=plan.gradient)
            direct_RV = direct_RV if gradient_RV is None else _plus(direct_RV, gradient_RV)
        elif plan.sparse == "sampled":
            value_R, gradient_RV = _sampled(block, plan=plan, sides=sides)
            direct_RV = _plus(direct_RV, gradient_RV * factor_R[:, None])
        else:
            assert reading is not None
            value_R, term_slope_RO = divergence(reading.pair)
            slope_RO = _plus(slope_RO, term_slope_RO * factor_R[:, None])
        values.append(value_R if taken_R is None else torch.where(taken_R > 0, value_R * taken_R, 0.0))
    values_RN = torch.stack(values, dim=-1)
    if not plan.gradient:
        return values_RN, None
    soft_RV = direct_RV
    if slope_RO is not None and reading is not None:
        soft_RV = _plus(soft_RV, reading.gradient(slope_RO))
    if soft_RV is not None and plan.tempered:
        assert block.temperature is not None
        soft_RV = soft_RV / block.temperature
    gradient_RV = None if soft_RV is None else F.pad(soft_RV, (0, plan.student.vocab_size - plan.student_ids))
    if hard_R is not None and full_logq_RV is not None:
        gradient_RV = _plus(gradient_RV, _student_q(plan, full_logq_RV, reading) * hard_R[:, None])
        gradient_RV = gradient_RV.scatter_add_(-1, block.labels_R[:, None], -hard_R[:, None])
    if gradient_RV is None:
        gradient_RV = torch.zeros_like(block.student_RV, dtype=values_RN.dtype)
    return values_RN, gradient_RV


def _student_q(plan: RowPlan, full_logq_RV: Tensor, reading: Reading | None, /) -> Tensor:
    """The student's probabilities over all of its ids at temperature 1, from the reading if it has them."""
    if isinstance(reading, DenseReading) and plan.one_softmax and not plan.tempered:
        return reading.pair.student_q_RV
    return full_logq_RV.exp()


def _sampled(block: RowBlock, /, *, plan: RowPlan, sides: _Sides) -> tuple[Tensor, Tensor]:
    sparse = block.sparse
    assert sparse is not None and sparse.weight_RK is not None
    student_RV = sides.student_RV
    if plan.tempered and block.temperature is not None:
        student_RV = student_RV / block.temperature
    return sampled_forward_kl(
        ids_RK=sparse.ids_RK,
        weight_RK=sparse.weight_RK,
        logp_RK=sparse.logp_RK,
        logq_RV=log_probabilities(student_RV),
    )


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _health(block: RowBlock, /, *, plan: RowPlan, full_logq_RV: Tensor, reading: Reading | None) -> Tensor:
    """The figures of HEALTH_NAMES for each row, times the row's token weight."""
    hard_R = cross_entropy(full_logq_RV, block.labels_R)
    one_R = torch.ones_like(hard_R)
    correct_R = full_logq_RV.argmax(-1).eq(block.labels_R).to(hard_R.dtype)
    own = [one_R, hard_R, correct_R]
    if reading is None:
        figures = [*own, entropy(full_logq_RV, full_logq_RV.exp()), *[torch.zeros_like(hard_R)] * 5]
    else:
        figures = [*own, *_compared(block, plan=plan, full_logq_RV=full_logq_RV, reading=reading)]
    return torch.stack(figures, dim=-1) * block.weight_R[:, None]


def _compared(block: RowBlock, /, *, plan: RowPlan, full_logq_RV: Tensor, reading: Reading) -> list[Tensor]:
    """The student's entropy and the figures that need a teacher; those are 0 where it has no signal."""
    pair = reading.pair
    teacher_R = entropy(pair.teacher_logp_RV, pair.teacher_p_RV)
    likeliest_R = pair.teacher_logp_RV.argmax(-1)
    if block.sparse is None:
        student_R = entropy(pair.student_logq_RV, pair.student_q_RV)
        agree_R = pair.student_logq_RV.argmax(-1).eq(likeliest_R).to(teacher_R.dtype)
        taught_R = _label_cross_entropy(pair.teacher_logp_RV, block.labels_R)
    else:
        student_R = entropy(full_logq_RV, full_logq_RV.exp())
        kept_RK = pair.teacher_logp_RV[:, : block.sparse.ids_RK.shape[1]]
        likeliest_id_R = block.sparse.ids_RK.gather(-1, kept_RK.argmax(-1, keepdim=True)).squeeze(-1)
        agree_R = full_logq_RV.argmax(-1).eq(likeliest_id_R).to(teacher_R.dtype)
        # A label that was not kept has the tail's probability at most.
        # An empty entry may name any id; its log-probability stands at the floor here.
        found_RK = block.sparse.ids_RK.eq(block.labels_R[:, None]) & (kept_RK > POSSIBLE)
        assert block.sparse.tail_R is not None
        taught_R = -torch.where(found_RK, kept_RK, float("-inf")).amax(-1)
        taught_R = torch.where(found_RK.any(-1), taught_R, -block.sparse.tail_R)
    if plan.own_ids:  # ids mean different tokens: what compares them id by id has no value
        kl_R, agree_R, taught_R = (torch.full_like(teacher_R, float("nan")) for _ in range(3))
    else:
        kl_R, _ = forward_kl(pair)
    compared = [torch.ones_like(teacher_R), teacher_R, taught_R, kl_R, agree_R]
    if block.present_R is not None:
        compared = [torch.where(block.present_R > 0, figure_R, 0.0) for figure_R in compared]
    return [student_R, *compared]


def _label_cross_entropy(logp_RV: Tensor, labels_R: Tensor) -> Tensor:
    """−log p[label]; a label that only the student has gets probability 0 from the teacher."""
    known_R = labels_R < logp_RV.shape[-1]
    taught_R = cross_entropy(logp_RV, torch.where(known_R, labels_R, 0))
    return torch.where(known_R, taught_R, float("inf"))
