"""The fused vocabulary pass: all vocabulary terms and their gradients without the full logits of either model.

Shape letters: B sequences, S positions, T counted tokens, C tokens of one chunk, R rows of one block, V student
vocabulary, W shared ids, D student width, E teacher width, N terms, H health figures.

Counted tokens are walked in chunks. Two buffers of (chunk, vocabulary) in the models' dtype hold the projections of
student and teacher; blocks of a few rows are evaluated in float32 (`rows.py`) and the gradient is written over the
student's projection, which then is multiplied into the gradients of hidden states and head. All gradients are
complete when the forward pass ends; the backward pass multiplies them by the incoming scalar.

The unit of the accumulated gradients is the largest scale rounded up to a power of two: gradients of 1/count times a
probability would underflow in float16, and a power of two costs no rounding when it is multiplied in afterwards.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import (
    Batch,
    Distribution,
    HiddenSignal,
    MixtureSignal,
    SampledSignal,
    TopKSignal,
    VocabularyHead,
)
from largekd.objectives.compiled import RowFunction
from largekd.objectives.mixture import MixtureRule
from largekd.objectives.policy import clipped_terms
from largekd.objectives.readings import SparseKind
from largekd.objectives.rows import HeadShape, RowPlan
from largekd.objectives.selection import SelectionRule
from largekd.objectives.spans import label_log_probabilities, span_terms
from largekd.objectives.sweep import Gradients, StudentSide, Sweep, SweepResult
from largekd.objectives.terms import PolicyGradient, SpanLikelihood, VocabularyTerm


class VocabularyPass(nn.Module):
    """Σ_n scales_n · Σ_t weight_t · D_n(t) over the counted tokens of a batch, and its gradients.

    Under ZeRO-3 the caller registers the head's weight (and bias) as external parameters of this module.
    """

    def __init__(
        self,
        *,
        terms: Sequence[VocabularyTerm],
        chunk_tokens: int,
        sparse: SparseKind = "tail",
        selection: SelectionRule | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        assert terms, "a vocabulary pass needs a term"
        assert chunk_tokens > 0
        self.terms = tuple(terms)
        self.chunk_tokens = chunk_tokens
        self.sparse = sparse
        self.selection = selection
        self.rows = RowFunction(compiles=compile)

    def forward(
        self,
        hidden_BSD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None = None,
        *,
        vocab_size: int,
        batch: Batch,
        signal: Distribution | None,
        scales: Tensor,
        temperature: Tensor | None = None,
        limit: Tensor | None = None,
        measure: bool = False,
        term_gradients: bool = False,
        head_scale: float = 1.0,
        softcap: float | None = None,
    ) -> dict[str, Tensor]:
        """`loss`: the differentiable scalar; `sums`: (terms,) Σ_t weight_t · D_n(t), neither scaled nor divided.

        With `measure` also `health`: (len(HEALTH_NAMES),) weighted sums. With a selection and its `limit` also `kept`:
        (1,) the weight of the tokens that the divergences used, and `histogram` of their scores. With `term_gradients`
        also `squares`: (terms,) the squared norm of each scaled term's gradient with respect to the hidden states. With
        several teachers also `mixture`: (len(MIXTURE_NAMES), members) weighted sums, those of distances with `measure`.

        `scales` (terms,) float32 holds what each sum is multiplied by (factor / global count × ranks); `temperature` is
        a scalar on the device, None stands for 1. Rows of `weight_VD` beyond `vocab_size` are padding: no probability,
        zero gradient. No call waits for the device; no gradient is held while gradients are off.
        """
        inputs = (hidden_BSD, weight_VD, *(() if bias_V is None else (bias_V,)))
        assert signal is not None or not any(term.reads_teacher for term in self.terms), "no teacher signal"
        assert scales.shape == (len(self.terms),), "one scale per term"
        sweep = Sweep(
            plan=RowPlan(
                terms=self.terms,
                student=HeadShape(vocab_size, head_scale, softcap, bias_V is not None),
                tempered=temperature is not None,
                selection=None if limit is None else self.selection,
                gradient=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs),
                measure=measure,
                **self._teacher_side(signal),
            ),
            rows=self.rows,
            chunk_tokens=self.chunk_tokens,
            batch=batch,
            signal=signal,
            temperature=temperature,
            limit=limit,
        )
        if term_gradients:
            squares = self._squares(hidden_BSD, weight_VD, bias_V, scales=scales, sweep=sweep)
        loss, *figures = _FusedVocabulary.apply(hidden_BSD, weight_VD, bias_V, scales, sweep)
        outputs = {"loss": loss, "sums": figures[0]}
        outputs |= {"health": figures[1]} if measure else {}
        outputs |= {"kept": figures[2], "histogram": figures[3]} if sweep.plan.selection is not None else {}
        outputs |= {"mixture": figures[4]} if isinstance(signal, MixtureSignal) else {}
        return outputs | ({"squares": squares} if term_gradients else {})

    def _teacher_side(self, signal: Distribution | None) -> dict[str, Any]:
        match signal:
            case HiddenSignal(head=head):
                return {"teacher": _shape(head), "own_ids": signal.rows_T is not None}
            case MixtureSignal(members=members):
                rule = MixtureRule(confidence_scale=signal.confidence_scale, learned=signal.learned)
                return {"members": tuple(_shape(member.head) for member in members), "mixing": rule}
            case TopKSignal():
                return {"sparse": self.sparse, "sparse_ids": signal.vocab_size}
            case SampledSignal():
                return {"sparse": "sampled", "sparse_ids": signal.vocab_size}
        return {}

    def _squares(
        self, hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, scales: Tensor, sweep: Sweep
    ) -> Tensor:
        """One more walk per term, for its own gradient of the hidden states."""
        hidden_PD = hidden_BSD.detach().reshape(-1, hidden_BSD.shape[-1])
        student = StudentSide(hidden_PD, weight_VD.detach(), None if bias_V is None else bias_V.detach())
        sweep = replace(sweep, plan=replace(sweep.plan, measure=False, gradient=True))
        squares = []
        with torch.no_grad():
            for index in range(len(self.terms)):
                alone = torch.zeros_like(scales)
                alone[index] = scales[index]
                unit = _power_of_two_above(alone.abs().max())
                gradients = Gradients(hidden_PD=torch.zeros_like(hidden_PD))
                _run(sweep, student=student, factors=alone / unit, gradients=gradients)
                assert gradients.hidden_PD is not None
                squares.append(gradients.hidden_PD.float().square().sum() * unit.square())
        return torch.stack(squares)


class _FusedVocabulary(torch.autograd.Function):
    """Accumulates gradients in `forward`; `backward` runs once at most, for it hands over its buffers."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BSD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scales: Tensor, sweep: Sweep
    ) -> tuple[Tensor, ...]:
        student = StudentSide(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), weight_VD, bias_V)
        wants_hidden, wants_weight, wants_bias = (sweep.plan.gradient and need for need in ctx.needs_input_grad[:3])
        gradients = sweep.empty_gradients(student, wants=(wants_hidden, wants_weight, wants_bias))
        unit = _power_of_two_above(scales.abs().max())
        result = _run(sweep, student=student, factors=scales / unit, gradients=gradients)
        ctx.gradients, ctx.unit, ctx.hidden_shape = gradients, unit, hidden_BSD.shape
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        figures = (result.sums, result.health, result.kept, result.histogram, result.mixture)
        ctx.mark_non_differentiable(*figures)
        return (scales * result.sums).sum(), *figures

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the vocabulary pass hands its gradients over once; run the pass again"
        factor = loss_gradient * ctx.unit
        for tensor in (gradients.hidden_PD, gradients.weight_VD, gradients.bias_V):
            if tensor is not None:
                tensor.mul_(factor)
        hidden = None if gradients.hidden_PD is None else gradients.hidden_PD.view(ctx.hidden_shape)
        bias = None if gradients.bias_V is None else gradients.bias_V.to(ctx.bias_dtype)
        return hidden, gradients.weight_VD, bias, None, None


def _shape(head: VocabularyHead, /) -> HeadShape:
    return HeadShape(head.vocab_size, head.scale, head.softcap, head.bias_V is not None)


def _run(sweep: Sweep, /, *, student: StudentSide, factors: Tensor, gradients: Gradients) -> SweepResult:
    """The walk with the terms' own dtypes, whatever autocast says around it."""
    with torch.autocast(student.hidden_PD.device.type, enabled=False):
        if sweep.batch.advantage_BS is not None:
            return _with_policy(sweep, student=student, factors=factors, gradients=gradients)
        return _with_spans(sweep, student=student, factors=factors, gradients=gradients)


def _with_policy(sweep: Sweep, /, *, student: StudentSide, factors: Tensor, gradients: Gradients) -> SweepResult:
    """The walk, with the policy gradient added: ratios of a batch's sampled labels are known before it begins."""
    places = [i for i, term in enumerate(sweep.plan.terms) if isinstance(term.divergence, PolicyGradient)]
    if not places:
        return sweep.run(student, factors=factors, gradients=gradients)
    (place,) = places
    policy, batch, counted_T = sweep.plan.terms[place].divergence, sweep.batch, sweep.batch.counted_T
    assert isinstance(policy, PolicyGradient) and batch.advantage_BS is not None and batch.sampled_logq_BS is not None
    logq_T = label_log_probabilities(
        student.hidden_PD[counted_T],
        batch.labels_BS.reshape(-1)[counted_T],
        weight_VD=student.weight_VD,
        bias_V=student.bias_V,
        head=sweep.plan.student,
        chunk_tokens=sweep.chunk_tokens,
    )
    own = (batch.token_weight_BS, batch.advantage_BS, batch.sampled_logq_BS)
    weight_T, advantage_T, sampled_T = (tensor.reshape(-1)[counted_T].to(logq_T.dtype) for tensor in own)
    value_T, slope_T = clipped_terms(logq_T, sampled_logq_T=sampled_T, advantage_T=advantage_T, clip=policy.clip)
    hard_T = -slope_T * weight_T * factors[place].to(weight_T.dtype)
    result = replace(sweep, hard_T=hard_T).run(student, factors=factors, gradients=gradients)
    sums = result.sums.clone()
    sums[place] = (value_T * weight_T).sum().to(sums.dtype)
    return replace(result, sums=sums)


def _with_spans(sweep: Sweep, /, *, student: StudentSide, factors: Tensor, gradients: Gradients) -> SweepResult:
    """The walk, with the term over spans added: its slope must be known before the walk meets a span's first token."""
    places = [i for i, term in enumerate(sweep.plan.terms) if isinstance(term.divergence, SpanLikelihood)]
    translation, signal = sweep.batch.translation, sweep.signal
    if not places:
        return sweep.run(student, factors=factors, gradients=gradients)
    assert translation is not None and isinstance(signal, TopKSignal) and signal.scored_logp_L is not None
    counted_T = sweep.batch.counted_T
    positions_U = counted_T[translation.span_token_U]
    dtype = torch.promote_types(student.weight_VD.dtype, torch.float32)
    weight_T = sweep.batch.token_weight_BS.reshape(-1)[counted_T].to(dtype)
    logq_U = label_log_probabilities(
        student.hidden_PD[positions_U],
        sweep.batch.labels_BS.reshape(-1)[positions_U],
        weight_VD=student.weight_VD,
        bias_V=student.bias_V,
        head=sweep.plan.student,
        chunk_tokens=sweep.chunk_tokens,
    )
    total, hard_T = span_terms(logq_U, translation=translation, scored_logp_L=signal.scored_logp_L, weight_T=weight_T)
    (place,) = places
    result = replace(sweep, hard_T=hard_T * factors[place]).run(student, factors=factors, gradients=gradients)
    sums = result.sums.clone()
    sums[place] = total.to(sums.dtype)
    return replace(result, sums=sums)


def _power_of_two_above(value: Tensor, /) -> Tensor:
    """The smallest power of two above a non-negative scalar; 1 for 0."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.ones_like(value), exponent)
