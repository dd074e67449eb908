"""The walk over the counted tokens of a batch: project, evaluate, accumulate, in buffers of one chunk.

Shape letters: N positions of the batch (B·S), T counted tokens, C tokens of one chunk, R rows of one block,
V student vocabulary, W shared ids, D student width, K terms, H health figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from largekd.contracts import HEALTH_NAMES, Batch, HiddenSignal
from largekd.objectives.compiled import RowFunction
from largekd.objectives.rows import RowBlock, RowPlan
from largekd.objectives.workers import map_spans

CPU_BLOCK_ELEMENTS = 2**17
"""Elements of a float32 block on a CPU: the few that are alive at once should stay in its caches."""

DEVICE_BLOCK_ELEMENTS = 2**24
"""Elements of a float32 block on an accelerator: enough to fill it, 64 MiB per temporary."""


@dataclass(frozen=True)
class StudentSide:
    """The student's hidden states at flat positions and its head's tensors."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


@dataclass
class Gradients:
    """Accumulated gradients in the units of the factors; None where none is wanted."""

    hidden_ND: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class Sweep:
    """What one walk needs besides the student's tensors."""

    plan: RowPlan
    rows: RowFunction
    chunk_tokens: int
    batch: Batch
    signal: HiddenSignal | None

    @property
    def tokens(self) -> int:
        """T; known on the host without a synchronisation."""
        return self.batch.counted_T.numel()

    def empty_gradients(self, student: StudentSide, /, *, wants: tuple[bool, bool, bool]) -> Gradients:
        """Zero buffers for those of (hidden, weight, bias) that are wanted."""
        gradients = Gradients()
        if wants[0]:
            gradients.hidden_ND = torch.zeros_like(student.hidden_ND)
        if wants[1]:
            gradients.weight_VD = torch.zeros_like(student.weight_VD)
        if wants[2] and student.bias_V is not None:
            gradients.bias_V = torch.zeros_like(student.bias_V, dtype=_block_dtype(student.bias_V))
        return gradients

    def run(self, student: StudentSide, /, *, factors: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Sums per term (K,) and health sums (H,), unscaled; adds Σ factor · gradient to the buffers."""
        counted_T = self.batch.counted_T
        inputs = _TokenInputs.of(self.batch, factors=factors.to(_block_dtype(student.weight_VD)))
        chunk = _Chunk.allocate(self, student=student)
        values_TK = inputs.factor_TK.new_empty(self.tokens, len(self.plan.terms))
        health_TH = values_TK.new_empty(self.tokens if self.plan.measure else 0, len(HEALTH_NAMES))
        block = self.block_rows(student.hidden_ND.device)
        for start in range(0, self.tokens, self.chunk_tokens):
            positions_C = counted_T[start : start + self.chunk_tokens]
            hidden_CD = student.hidden_ND[positions_C].to(student.weight_VD.dtype)
            chunk.project(hidden_CD, weight_VD=student.weight_VD, positions_C=positions_C, signal=self.signal)
            evaluate = partial(self._evaluate, chunk=chunk, start=start, inputs=inputs, outputs=(values_TK, health_TH))
            bias_parts = map_spans(evaluate, size=positions_C.numel(), block=block, device=student.hidden_ND.device)
            if gradients.bias_V is not None:
                for part_V in bias_parts:
                    assert part_V is not None
                    gradients.bias_V[: self.plan.student.vocab_size] += part_V
            if self.plan.gradient:
                gradient_CV = chunk.student_CV[: positions_C.numel()]
                _accumulate(gradients, gradient_CV, student=student, hidden_CD=hidden_CD, positions_C=positions_C)
        return (values_TK * inputs.weight_T[:, None]).sum(0), health_TH.sum(0)

    def _evaluate(
        self,
        span: slice,
        /,
        *,
        chunk: "_Chunk",
        start: int,
        inputs: "_TokenInputs",
        outputs: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """Evaluate rows `span` of a chunk that begins at token `start`; the gradient's sum over rows if it is wanted.

        Writes values and health to `outputs` and the gradient over the student's projections.
        """
        bias_gradient_V = None
        for rows in _blocks(span, self.block_rows(chunk.student_CV.device)):
            tokens = slice(start + rows.start, start + rows.stop)
            result = self.rows(chunk.block(rows, inputs=inputs, span=tokens), plan=self.plan)
            outputs[0][tokens] = result.values_RK
            if result.health_RH is not None:
                outputs[1][tokens] = result.health_RH
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
    """Labels, weights and factors (token weight · scale) of the counted tokens."""

    labels_T: Tensor
    weight_T: Tensor
    factor_TK: Tensor

    @classmethod
    def of(cls, batch: Batch, /, *, factors: Tensor) -> "_TokenInputs":
        weight_T = batch.token_weight_BS.reshape(-1)[batch.counted_T].to(factors.dtype)
        return cls(batch.labels_BS.reshape(-1)[batch.counted_T], weight_T, weight_T[:, None] * factors)


@dataclass(frozen=True)
class _Chunk:
    """The two reused buffers of projections, and what is the same for all their rows."""

    student_CV: Tensor
    teacher_CW: Tensor | None
    student_bias_V: Tensor | None
    teacher_bias_W: Tensor | None = None
    support_W: Tensor | None = None

    @classmethod
    def allocate(cls, sweep: Sweep, /, *, student: StudentSide) -> "_Chunk":
        plan, rows = sweep.plan, min(sweep.chunk_tokens, sweep.tokens)
        student_CV = student.weight_VD.new_empty(rows, plan.student.vocab_size)
        student_bias_V = None if student.bias_V is None else student.bias_V[: plan.student.vocab_size]
        if sweep.signal is None or not plan.reads_teacher:
            return cls(student_CV, None, student_bias_V)
        head = sweep.signal.head
        teacher_CW = head.weight_VD.new_empty(rows, plan.shared_ids)
        teacher_bias_W = None if head.bias_V is None else head.bias_V[: plan.shared_ids]
        support_W = None
        if plan.has_support:
            support_W = torch.ones(plan.shared_ids, dtype=torch.bool, device=student_CV.device)
            for bias, shape in ((student_bias_V, plan.student), (teacher_bias_W, plan.teacher)):
                if bias is not None and shape is not None and shape.softcap is None:
                    support_W = support_W & ~torch.isneginf(bias[: plan.shared_ids])
        return cls(student_CV, teacher_CW, student_bias_V, teacher_bias_W, support_W)

    def project(
        self, hidden_CD: Tensor, /, *, weight_VD: Tensor, positions_C: Tensor, signal: HiddenSignal | None
    ) -> None:
        """Fill the buffers' first rows with hidden · weightᵀ."""
        size, vocab = hidden_CD.shape[0], self.student_CV.shape[1]
        torch.mm(hidden_CD, weight_VD[:vocab].t(), out=self.student_CV[:size])
        if self.teacher_CW is not None and signal is not None:
            weight_WE = signal.head.weight_VD[: self.teacher_CW.shape[1]]
            hidden_NE = signal.hidden_BSE.reshape(-1, signal.hidden_BSE.shape[-1])
            torch.mm(hidden_NE[positions_C].to(weight_WE.dtype), weight_WE.t(), out=self.teacher_CW[:size])

    def block(self, rows: slice, /, *, inputs: _TokenInputs, span: slice) -> RowBlock:
        """The rows of this chunk that are tokens `span` of the sweep."""
        return RowBlock(
            student_RV=self.student_CV[rows],
            teacher_RW=None if self.teacher_CW is None else self.teacher_CW[rows],
            labels_R=inputs.labels_T[span],
            weight_R=inputs.weight_T[span],
            factor_RK=inputs.factor_TK[span],
            student_bias_V=self.student_bias_V,
            teacher_bias_W=self.teacher_bias_W,
            support_W=self.support_W,
        )


def _accumulate(
    gradients: Gradients, gradient_CV: Tensor, /, *, student: StudentSide, hidden_CD: Tensor, positions_C: Tensor
) -> None:
    """Add a chunk's logit gradient to the head's gradient and write the hidden states' gradient."""
    vocab = gradient_CV.shape[1]
    if gradients.hidden_ND is not None:
        hidden_gradient_CD = torch.mm(gradient_CV, student.weight_VD[:vocab])
        gradients.hidden_ND.index_copy_(0, positions_C, hidden_gradient_CD.to(gradients.hidden_ND.dtype))
    if gradients.weight_VD is not None:
        gradients.weight_VD[:vocab].addmm_(gradient_CV.t(), hidden_CD)


def _block_dtype(tensor: Tensor, /) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(span: slice, rows: int, /) -> Iterator[slice]:
    """Full blocks, then single rows: a compiled row function meets two shapes at most."""
    full = span.stop - (span.stop - span.start) % rows
    yield from (slice(start, start + rows) for start in range(span.start, full, rows))
    yield from (slice(row, row + 1) for row in range(full, span.stop))
