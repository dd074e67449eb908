"""The student's frozen base as its teacher: one decoder in one engine, which each micro-batch passes twice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from largekd.contracts import Batch, HiddenSignal, OwnSignal, TapSignal, TeacherSignal
from largekd.distillation.model import NO_PLAN, DistillModel
from largekd.models.lora import base_alone
from largekd.objectives.alignment import AlignmentPlan


class BackboneModel(DistillModel):
    """The student with adapters learns from itself without them.

    The teacher's pass comes first, without gradients and so without anything that would be recomputed; it is a part of
    the engine's forward, so that the order in which weights are gathered is the same in every micro-batch.
    """

    def forward(
        self,
        *,
        batch: Batch,
        signal: TeacherSignal | None,
        scales: Tensor,
        plan: AlignmentPlan = NO_PLAN,
        temperature: Tensor | None = None,
        limit: Tensor | None = None,
        load: Tensor | None = None,
        measure: bool = False,
        term_gradients: bool = False,
        left_out: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """As DistillModel; `signal` says what the base is asked for, and without one it does not run.

        The base runs with all of its layers.
        """
        if signal is not None:
            assert isinstance(signal, OwnSignal), "the signal arises in here"
            signal = self._signal(batch, plan=plan, distribution=signal.distribution)
        options: dict[str, Any] = {"temperature": temperature, "limit": limit, "load": load, "measure": measure}
        return super().forward(
            batch=batch,
            signal=signal,
            scales=scales,
            plan=plan,
            term_gradients=term_gradients,
            left_out=left_out,
            **options,
        )

    def _signal(self, batch: Batch, *, plan: AlignmentPlan, distribution: bool) -> TeacherSignal:
        student = self.student
        with torch.no_grad(), base_alone(student.model):
            outputs = student(batch=batch, taps=plan.teacher)
        if not distribution:
            return TapSignal(student.taps_of(outputs))
        # The head itself, not an alias: it is whole only inside of the vocabulary pass.
        head = student.head_spec.with_weights(weight_VD=student.head_weight, bias_V=student.head_bias)
        return HiddenSignal(outputs["last"], head, taps=student.taps_of(outputs))
