"""The walk over the counted tokens of a batch: project, evaluate, accumulate, in buffers of one chunk.

Shape letters: P positions of the batch (B·S), T counted tokens, C tokens of one chunk, R rows of one block,
V student vocabulary, W the teacher's ids that take part, D student width, K kept entries, N terms, H health figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from largekd.contracts import (
    HEALTH_NAMES,
    MIXTURE_NAMES,
    Batch,
    Distribution,
    HiddenSignal,
    MixtureSignal,
    SampledSignal,
    TopKSignal,
)
from largekd.objectives.compiled import RowFunction
from largekd.objectives.members import MemberBuffers
from largekd.objectives.rows import RowBlock, RowPlan, SparseRows
from largekd.objectives.selection import histogram
from largekd.objectives.workers import map_spans

CPU_BLOCK_ELEMENTS = 2**17
"""Elements of a float32 block on a CPU: the few that are alive at once should stay in its caches."""

DEVICE_BLOCK_ELEMENTS = 2**24
"""Elements of a float32 block on an accelerator: enough to fill it, 64 MiB per temporary."""


@dataclass(frozen=True)
class StudentSide:
    """The student's hidden states at flat positions and its head's tensors."""

    hidden_PD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


@dataclass
class Gradients:
    """Accumulated gradients in the units of the factors; None where none is wanted."""

    hidden_PD: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class SweepResult:
    """Sums per term (N,) and health sums (H,), unscaled; with a selection the weight that was kept (1,) and the
    histogram of scores (SCORE_BINS,), empty without; of several teachers the figures of MIXTURE_NAMES, (F, M)."""

    sums: Tensor
    health: Tensor
    kept: Tensor
    histogram: Tensor
    mixture: Tensor


@dataclass(frozen=True)
class Sweep:
    """What one walk needs besides the student's tensors.

    temperature, limit: scalars on the device, None where the plan needs none. hard_T: what −log q[label] of each
    counted token is multiplied by in the gradient besides the cross-entropy's own factor; None: nothing.
    """

    plan: RowPlan
    rows: RowFunction
    chunk_tokens: int
    batch: Batch
    signal: Distribution | None
    temperature: Tensor | None = None
    limit: Tensor | None = None
    hard_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T; known on the host without a synchronisation."""
        return self.batch.counted_T.numel()

    def empty_gradients(self, student: StudentSide, /, *, wants: tuple[bool, bool, bool]) -> Gradients:
        """Zero buffers for those of (hidden, weight, bias) that are wanted."""
        gradients = Gradients()
        if wants[0]:
            gradients.hidden_PD = torch.zeros_like(student.hidden_PD)
        if wants[1]:
            gradients.weight_VD = torch.zeros_like(student.weight_VD)
        if wants[2] and student.bias_V is not None:
            gradients.bias_V = torch.zeros_like(student.bias_V, dtype=_block_dtype(student.bias_V))
        return gradients

    def run(self, student: StudentSide, /, *, factors: Tensor, gradients: Gradients) -> SweepResult:
        """The sums of all counted tokens; adds Σ factor · gradient to the buffers."""
        counted_T = self.batch.counted_T
        inputs = _TokenInputs.of(self, factors=factors.to(_block_dtype(student.weight_VD)))
        chunk = _Chunk.allocate(self, student=student)
        outputs = _TokenOutputs.allocate(self, inputs=inputs)
        block = self.block_rows(student.hidden_PD.device)
        for start in range(0, self.tokens, self.chunk_tokens):
            span = slice(start, min(start + self.chunk_tokens, self.tokens))
            positions_C = counted_T[span]
            hidden_CD = student.hidden_PD[positions_C].to(student.weight_VD.dtype)
            chunk.project(hidden_CD, weight_VD=student.weight_VD, sweep=self, span=span)
            evaluate = partial(self._evaluate, chunk=chunk, start=start, inputs=inputs, outputs=outputs)
            bias_parts = map_spans(evaluate, size=positions_C.numel(), block=block, device=student.hidden_PD.device)
            if gradients.bias_V is not None:
                for part_V in bias_parts:
                    assert part_V is not None
                    gradients.bias_V[: self.plan.student.vocab_size] += part_V
            if self.plan.gradient:
                gradient_CV = chunk.student_CV[: positions_C.numel()]
                _accumulate(gradients, gradient_CV, student=student, hidden_CD=hidden_CD, positions_C=positions_C)
        return outputs.sums(inputs=inputs)

    def _evaluate(
        self,
        span: slice,
        /,
        *,
        chunk: "_Chunk",
        start: int,
        inputs: "_TokenInputs",
        outputs: "_TokenOutputs",
    ) -> Tensor | None:
        """Evaluate rows `span` of a chunk that begins at token `start`; the gradient's sum over rows if it is wanted.

        Writes the figures to `outputs` and the gradient over the student's projections.
        """
        bias_gradient_V = None
        for rows in _blocks(span, self.block_rows(chunk.student_CV.device)):
            tokens = slice(start + rows.start, start + rows.stop)
            result = self.rows(chunk.block(rows, inputs=inputs, span=tokens, sweep=self), plan=self.plan)
            outputs.values_TN[tokens] = result.values_RN
            if result.health_RH is not None:
                outputs.health_TH[tokens] = result.health_RH
            if result.score_R is not None and result.keep_R is not None:
                outputs.score_T[tokens], outputs.keep_T[tokens] = result.score_R, result.keep_R
            if result.mixture_RFM is not None:
                outputs.mixture_TFM[tokens] = result.mixture_RFM
            if result.gradient_RV is not None:
                chunk.student_CV[rows] = result.gradient_RV
                if chunk.student_bias_V is not None:
                    part_V = result.gradient_RV.sum(0)
                    bias_gradient_V = part_V if bias_gradient_V is None else bias_gradient_V.add_(part_V)
        return bias_gradient_V

    def block_rows(self, device: torch.device, /) -> int:
        """Rows per block: a cache's worth on a CPU, a kernel's worth on an accelerator."""
        elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
        return max(1, elements // self.plan.student.vocab_size)


@dataclass(frozen=True)
class _TokenInputs:
    """What is known of each counted token: labels, weights, factors (token weight · scale), the teacher's signal.

    weight_TN: the token's weight in each term, one column where they are all the same.
    """

    labels_T: Tensor
    weight_T: Tensor
    weight_TN: Tensor
    factor_TN: Tensor
    present_T: Tensor | None
    sparse: SparseRows | None

    @classmethod
    def of(cls, sweep: Sweep, /, *, factors: Tensor) -> "_TokenInputs":
        batch, signal = sweep.batch, sweep.signal
        weight_T = batch.token_weight_BS.reshape(-1)[batch.counted_T].to(factors.dtype)
        weight_TN = weight_T[:, None]
        if batch.task_weight_BS is not None:
            task_T = batch.task_weight_BS.reshape(-1)[batch.counted_T].to(factors.dtype)
            of_terms = [task_T if term.divergence is None else weight_T for term in sweep.plan.terms]
            weight_TN = torch.stack(of_terms, dim=-1)
        present_T = signal.present_T if isinstance(signal, HiddenSignal | TopKSignal) else None
        return cls(
            labels_T=batch.labels_BS.reshape(-1)[batch.counted_T],
            weight_T=weight_T,
            weight_TN=weight_TN,
            factor_TN=weight_TN * factors,
            present_T=None if present_T is None else present_T.to(factors.dtype),
            sparse=_sparse_rows(signal, dtype=factors.dtype) if sweep.plan.reads_teacher else None,
        )


def _sparse_rows(signal: Distribution | None, /, *, dtype: torch.dtype) -> SparseRows | None:
    match signal:
        case TopKSignal():
            return SparseRows(
                signal.ids_TK, signal.logp_TK.to(dtype), signal.tail_T.to(dtype), signal.tempered_tail_T.to(dtype)
            )
        case SampledSignal():
            return SparseRows(signal.ids_TK, signal.logp_TK.to(dtype), weight_RK=signal.weight_TK.to(dtype))
    return None


@dataclass(frozen=True)
class _TokenOutputs:
    """The figures of every counted token."""

    values_TN: Tensor
    health_TH: Tensor
    score_T: Tensor
    keep_T: Tensor
    mixture_TFM: Tensor
    scored: bool

    @classmethod
    def allocate(cls, sweep: Sweep, /, *, inputs: _TokenInputs) -> "_TokenOutputs":
        new, tokens = inputs.factor_TN.new_empty, sweep.tokens
        # Without a teacher's signal no token has a score: the histogram is all zero.
        scored = tokens if sweep.plan.selection is not None and sweep.plan.reads_teacher else 0
        return cls(
            scored=sweep.plan.selection is not None,
            values_TN=new(tokens, len(sweep.plan.terms)),
            health_TH=new(tokens if sweep.plan.measure else 0, len(HEALTH_NAMES)),
            score_T=new(scored),
            keep_T=new(scored),
            mixture_TFM=new(tokens if sweep.plan.reads_teacher else 0, len(MIXTURE_NAMES), len(sweep.plan.members)),
        )

    def sums(self, *, inputs: _TokenInputs) -> SweepResult:
        """Token-weighted sums; what a selection is about are the tokens that have a signal."""
        weight_T, present_T = inputs.weight_T, inputs.present_T
        weight_S = (weight_T if present_T is None else weight_T * present_T)[: self.score_T.numel()]
        return SweepResult(
            sums=(self.values_TN * inputs.weight_TN).sum(0),
            health=self.health_TH.sum(0),
            kept=(self.keep_T * weight_S).sum(0, keepdim=True),
            histogram=histogram(self.score_T, weight_T=weight_S) if self.scored else self.score_T,
            mixture=(self.mixture_TFM * weight_T[: len(self.mixture_TFM), None, None]).sum(0),
        )


@dataclass(frozen=True)
class _Chunk:
    """The two reused buffers of projections, and what is the same for all their rows."""

    student_CV: Tensor
    teacher_CW: Tensor | None
    student_bias_V: Tensor | None
    teacher_bias_W: Tensor | None = None
    support_W: Tensor | None = None
    members: MemberBuffers | None = None

    @classmethod
    def allocate(cls, sweep: Sweep, /, *, student: StudentSide) -> "_Chunk":
        plan, rows = sweep.plan, min(sweep.chunk_tokens, sweep.tokens)
        student_CV = student.weight_VD.new_empty(rows, plan.student.vocab_size)
        student_bias_V = None if student.bias_V is None else student.bias_V[: plan.student.vocab_size]
        if isinstance(sweep.signal, MixtureSignal) and plan.reads_teacher:
            members = MemberBuffers.allocate(
                sweep.signal, rows=rows, ids=plan.student_ids, dtype=_block_dtype(student_CV)
            )
            support_W = _support_of_several(plan, student_bias_V=student_bias_V, members=members)
            return cls(student_CV, None, student_bias_V, support_W=support_W, members=members)
        if not isinstance(sweep.signal, HiddenSignal) or not plan.reads_teacher:
            return cls(student_CV, None, student_bias_V)
        head = sweep.signal.head
        teacher_CW = head.weight_VD.new_empty(rows, plan.teacher_ids)
        teacher_bias_W = None if head.bias_V is None else head.bias_V[: plan.teacher_ids]
        support_W = None
        if plan.has_support and not plan.own_ids:
            support_W = torch.ones(plan.student_ids, dtype=torch.bool, device=student_CV.device)
            for bias, shape in ((student_bias_V, plan.student), (teacher_bias_W, plan.teacher)):
                if bias is not None and shape is not None and shape.softcap is None:
                    support_W = support_W & ~torch.isneginf(bias[: plan.student_ids])
        return cls(student_CV, teacher_CW, student_bias_V, teacher_bias_W, support_W)

    def project(self, hidden_CD: Tensor, /, *, weight_VD: Tensor, sweep: Sweep, span: slice) -> None:
        """Fill the buffers' first rows with hidden · weightᵀ for the counted tokens `span`."""
        size, vocab = hidden_CD.shape[0], self.student_CV.shape[1]
        torch.mm(hidden_CD, weight_VD[:vocab].t(), out=self.student_CV[:size])
        signal = sweep.signal
        if self.members is not None:
            self.members.project(sweep.batch.counted_T[span])
        if self.teacher_CW is not None and isinstance(signal, HiddenSignal):
            weight_WE = signal.head.weight_VD[: self.teacher_CW.shape[1]]
            rows_C = (sweep.batch.counted_T if signal.rows_T is None else signal.rows_T)[span]
            hidden_PE = signal.hidden_BSE.reshape(-1, signal.hidden_BSE.shape[-1])
            torch.mm(hidden_PE[rows_C].to(weight_WE.dtype), weight_WE.t(), out=self.teacher_CW[:size])

    def block(self, rows: slice, /, *, inputs: _TokenInputs, span: slice, sweep: Sweep) -> RowBlock:
        """The rows of this chunk that are tokens `span` of the sweep."""
        sparse = inputs.sparse
        if sparse is not None:
            cut = {name: value[span] for name, value in vars(sparse).items() if value is not None}
            sparse = SparseRows(**cut)
        return RowBlock(
            student_RV=self.student_CV[rows],
            labels_R=inputs.labels_T[span],
            weight_R=inputs.weight_T[span],
            factor_RN=inputs.factor_TN[span],
            teacher_RW=None if self.teacher_CW is None else self.teacher_CW[rows],
            sparse=sparse,
            hard_R=None if sweep.hard_T is None else sweep.hard_T[span],
            present_R=None if inputs.present_T is None else inputs.present_T[span],
            temperature=sweep.temperature,
            limit=sweep.limit,
            student_bias_V=self.student_bias_V,
            teacher_bias_W=self.teacher_bias_W,
            support_W=self.support_W,
            mixture=None if self.members is None else self.members.block(rows, tokens=span),
        )


def _support_of_several(plan: RowPlan, /, *, student_bias_V: Tensor | None, members: MemberBuffers) -> Tensor | None:
    """(W,) false for the shared ids that are impossible for the student or for all of its teachers."""
    possible_W = members.possible()
    if student_bias_V is not None and plan.student.softcap is None:
        own_W = ~torch.isneginf(student_bias_V[: plan.student_ids])
        possible_W = own_W if possible_W is None else possible_W & own_W
    return possible_W


def _accumulate(
    gradients: Gradients, gradient_CV: Tensor, /, *, student: StudentSide, hidden_CD: Tensor, positions_C: Tensor
) -> None:
    """Add a chunk's logit gradient to the head's gradient and write the hidden states' gradient."""
    vocab = gradient_CV.shape[1]
    if gradients.hidden_PD is not None:
        hidden_gradient_CD = torch.mm(gradient_CV, student.weight_VD[:vocab])
        gradients.hidden_PD.index_copy_(0, positions_C, hidden_gradient_CD.to(gradients.hidden_PD.dtype))
    if gradients.weight_VD is not None:
        gradients.weight_VD[:vocab].addmm_(gradient_CV.t(), hidden_CD)


def _block_dtype(tensor: Tensor, /) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(span: slice, rows: int, /) -> Iterator[slice]:
    """Full blocks, then single rows: a compiled row function meets two shapes at most."""
    full = span.stop - (span.stop - span.start) % rows
    yield from (slice(start, start + rows) for start in range(span.start, full, rows))
    yield from (slice(row, row + 1) for row in range(full, span.stop))
