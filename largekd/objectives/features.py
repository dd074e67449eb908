"""Alignment of hidden states at chosen layers.

Shape letters: B rows, S positions, P compared positions, N positions of one block, D student width, E teacher width,
F width of the comparison.

Memory per active pair, beyond what the models hold: the student's compared rows, what the projector and predictor
keep for their backward, and one gradient of the loss (P, F), in the projector's dtype (pool: float32), until backward.
float32 copies exist for one block of rows at a time; the teacher's rows are never gathered whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn import functional as F

from largekd.config.alignment import FeatureConfig
from largekd.contracts import Batch
from largekd.objectives.layer_maps import LayerPair
from largekd.objectives.projectors import Projector, TwoLayers, at_least_float32, build_projector, is_shared
from largekd.objectives.similarity import linear_cka

BLOCK_ROWS = 512
"""Positions whose float32 states exist at one time; for `cka` it is the longest sample instead."""

VARIANCE_EPSILON = 1e-8
"""Added to a position's variance before it is divided by: states that do not vary become 0."""

NORM_FLOOR = 1e-6
"""Least norm that a state is divided by: a zero vector has cosine 0 with everything."""

CKA_WITH_TRANSLATION = (
    "{key}.loss = cka: it compares the positions of one sample with each other, and with objective.translation the "
    "samples' bounds among the aligned groups are not known on the host; choose mse, normalised_mse, cosine or "
    "predictive."
)
"""Message of the ConfigError that refuses the combination, to be formatted with the term's key."""

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_NF, teacher_NF), both float32 or finer -> the sum over the block's positions, or its value as a sample."""


@dataclass(frozen=True)
class FeaturePositions:
    """Flat positions (b * S + s, each side in its own rows) that are compared, in the same order on both sides.

    `sample_ranges` are the places of whole samples in these lists; host data, empty under a translation.
    """

    student_P: Tensor
    teacher_P: Tensor
    sample_ranges: tuple[slice, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> "FeaturePositions":
        """Every position of a sample, fill left out; under a translation the last position of each group.

        The lists are made on the host and copied to the batch's device; under a translation they are arithmetic on
        its device. Nothing waits for the device. Counts are `positions` and `samples` of `contracts.counts_of`.
        """
        translation = batch.translation
        if translation is not None:
            return cls(
                student_P=translation.student_start_G + translation.student_length_G - 1,
                teacher_P=translation.teacher_start_G + translation.teacher_length_G - 1,
            )
        width = batch.input_ids_BS.shape[1]
        parts, ranges, used = [np.empty(0, np.int64)], [], 0
        for place, row in enumerate(batch.segments):
            for segment in row:
                start = place * width + segment.offset
                parts.append(np.arange(start, start + segment.length, dtype=np.int64))
                ranges.append(slice(used, used + segment.length))
                used += segment.length
        places_P = torch.from_numpy(np.concatenate(parts)).to(batch.input_ids_BS.device, non_blocking=True)
        return cls(student_P=places_P, teacher_P=places_P, sample_ranges=tuple(ranges))


class FeatureTerm(nn.Module):
    """Distance of the student's projected hidden states from the teacher's, at paired layers.

    Projectors and predictors are `projectors.<student layer>_<teacher layer>` (`projectors.shared`) and
    `predictors.<student layer>_<teacher layer>`.
    Errors: ConfigError from `build_projector`.
    """

    def __init__(
        self,
        config: FeatureConfig,
        *,
        pairs: Sequence[LayerPair],
        student_width: int,
        teacher_width: int,
        key: str,
    ) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.loss = config.loss
        self._shared = is_shared(config.projector)
        self.projectors = nn.ModuleDict()
        self.predictors = nn.ModuleDict()
        for name in ("shared",) if self._shared else map(_name_of, self.pairs):
            self.projectors[name] = build_projector(
                config.projector, student_width=student_width, teacher_width=teacher_width, key=key
            )
        if config.loss == "predictive":
            # Without batch or layer norms: in BYOL they guard against a collapse that a frozen teacher rules out.
            for pair in self.pairs:
                width = self._projector(pair).width
                hidden = config.predictor_hidden or teacher_width
                self.predictors[_name_of(pair)] = TwoLayers(in_width=width, hidden=hidden, out_width=width)

    @property
    def count_key(self) -> Literal["positions", "samples"]:
        """The count (of contracts.COUNT_NAMES) that the sum is to be divided by."""
        return "samples" if self.loss == "cka" else "positions"

    def forward(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        *,
        positions: FeaturePositions,
        pairs: Sequence[LayerPair],
    ) -> Tensor:
        """The loss summed over positions (cka: samples), averaged over `pairs`; a float32 scalar.

        student: layer -> (B, S, D); teacher: layer -> (its rows, its positions, E), never differentiated; the layers
        of `pairs` (not empty, a selection of the term's) must be there. Every module runs, in an order that does not
        depend on the positions: one without a part in the loss runs on a single position, with factor 0.
        """
        blocks = self._blocks(positions)
        any_BSD = next(iter(student.values()))
        total = any_BSD.new_zeros((), dtype=torch.promote_types(any_BSD.dtype, torch.float32))
        for pair in self.pairs:
            if pair in pairs and blocks:
                rows_PD = student[pair.student].flatten(0, 1).index_select(0, positions.student_P)
                total = total + self._compare(rows_PD, teacher[pair.teacher], positions, blocks, pair) / len(pairs)
            elif pair in pairs or not self._shared or self.predictors:
                one_PD = student.get(pair.student, any_BSD)[0, :1]
                total = total + 0.0 * self._mapped(one_PD, pair).sum(dtype=total.dtype)
        return total

    def _projector(self, pair: LayerPair) -> Projector:
        module = self.projectors["shared" if self._shared else _name_of(pair)]
        assert isinstance(module, Projector)
        return module

    def _mapped(self, student_PD: Tensor, pair: LayerPair) -> Tensor:
        projected_PF: Tensor = self._projector(pair)(student_PD)
        return self.predictors[_name_of(pair)](projected_PF) if self.predictors else projected_PF

    def _blocks(self, positions: FeaturePositions) -> tuple[slice, ...]:
        """The rows that are compared together; a sample of one position cannot vary and is left out."""
        if self.loss == "cka":
            assert positions.sample_ranges or not len(positions.student_P)
            return tuple(place for place in positions.sample_ranges if place.stop - place.start > 1)
        count = len(positions.student_P)
        return tuple(slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS))

    def _compare(
        self,
        student_PD: Tensor,
        teacher_BSE: Tensor,
        positions: FeaturePositions,
        blocks: tuple[slice, ...],
        pair: LayerPair,
    ) -> Tensor:
        projector = self._projector(pair)
        mapped_PF = self._mapped(student_PD, pair)
        teacher_rows = teacher_BSE.detach().flatten(0, 1)

        def teacher_of(block: slice) -> Tensor:
            return projector.of_teacher(teacher_rows.index_select(0, positions.teacher_P[block]))

        wants_gradient = torch.is_grad_enabled() and mapped_PF.requires_grad
        result: Tensor = _BlockSum.apply(mapped_PF, teacher_of, ROW_LOSSES[self.loss], blocks, wants_gradient)
        return result


class _BlockSum(torch.autograd.Function):
    """Σ over blocks of loss(student rows, teacher rows), with the gradient made block by block on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_PF: Tensor,
        teacher_of: Callable[[slice], Tensor],
        loss: RowLoss,
        blocks: tuple[slice, ...],
        wants_gradient: bool,
    ) -> Tensor:
        total = student_PF.new_zeros((), dtype=torch.promote_types(student_PF.dtype, torch.float32))
        gradient_PF = torch.zeros_like(student_PF) if wants_gradient else None
        for block in blocks:
            teacher_NF = at_least_float32(teacher_of(block))
            student_NF = at_least_float32(student_PF[block].detach()).requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                value = loss(student_NF, teacher_NF.to(student_NF.dtype))
            total += value.detach()
            if gradient_PF is not None:
                gradient_PF[block] = torch.autograd.grad(value, student_NF)[0]
        ctx.save_for_backward(gradient_PF)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_PF,) = ctx.saved_tensors
        scaled_PF = torch.empty_like(gradient_PF)
        for start in range(0, len(gradient_PF), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            # The product is taken in the scale's dtype: a loss scale overflows half precision.
            scaled_PF[rows] = gradient_PF[rows].to(scale.dtype) * scale
        return scaled_PF, None, None, None, None


def mse(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Σ_n (1/F)·‖s − t‖²."""
    return F.mse_loss(student_NF, teacher_NF, reduction="sum") / student_NF.shape[-1]


def normalised_mse(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Σ_n (1/F)·‖ŝ − t̂‖² with x̂ = (x − mean x)/√(var x + VARIANCE_EPSILON) over F; it is 2 − 2·correlation."""
    width = student_NF.shape[-1:]
    student_NF = F.layer_norm(student_NF, width, eps=VARIANCE_EPSILON)
    return mse(student_NF, F.layer_norm(teacher_NF, width, eps=VARIANCE_EPSILON))


def cosine(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Σ_n 1 − ⟨s, t⟩ / (‖s‖·‖t‖), norms at least NORM_FLOOR."""
    norms_N = vector_norm(student_NF, dim=-1).clamp_min(NORM_FLOOR) * vector_norm(teacher_NF, dim=-1).clamp_min(
        NORM_FLOOR
    )
    return (1.0 - (student_NF * teacher_NF).sum(-1) / norms_N).sum()


def cka(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """1 − linear CKA of one sample's positions (arXiv 1905.00414)."""
    return 1.0 - linear_cka(student_NF, teacher_NF)


def predictive(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Σ_n 2 − 2·cos(s, t) of the predictor's output s: Grill et al. 2020 (BYOL), arXiv 2006.07733, equation 2."""
    return 2.0 * cosine(student_NF, teacher_NF)


ROW_LOSSES: Mapping[str, RowLoss] = {
    "mse": mse,
    "normalised_mse": normalised_mse,
    "cosine": cosine,
    "cka": cka,
    "predictive": predictive,
}


def _name_of(pair: LayerPair) -> str:
    return f"{pair.student}_{pair.teacher}"
