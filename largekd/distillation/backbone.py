"""The student's frozen base as its teacher: one decoder in one engine, which each micro-batch passes twice."""

import torch
from torch import Tensor

from largekd.contracts import Batch, HiddenSignal, OwnSignal, TapRequest, TapSignal, TeacherSignal
from largekd.distillation.model import DistillModel
from largekd.models.lora import base_alone
from largekd.objectives.options import PLAIN, PassOptions


class BackboneModel(DistillModel):
    """The student with adapters learns from itself without them.

    The teacher's pass comes first, without gradients and so without anything that would be recomputed; it is a part of
    the engine's forward, so that the order in which weights are gathered is the same in every micro-batch.
    """

    def forward(
        self, *, batch: Batch, signal: TeacherSignal | None, scales: Tensor, options: PassOptions = PLAIN
    ) -> dict[str, Tensor]:
        """As DistillModel; `signal` says what the base is asked for, and without one it does not run.

        The base runs with all of its layers.
        """
        if signal is not None:
            assert isinstance(signal, OwnSignal), "the signal arises in here"
            signal = self._signal(batch, taps=options.plan.teacher, distribution=signal.distribution)
        return super().forward(batch=batch, signal=signal, scales=scales, options=options)

    def _signal(self, batch: Batch, *, taps: TapRequest, distribution: bool) -> TeacherSignal:
        student = self.student
        with torch.no_grad(), base_alone(student.model):
            outputs = student(batch=batch, taps=taps)
        if not distribution:
            return TapSignal(student.taps_of(outputs))
        # The head itself, not an alias: it is whole only inside of the vocabulary pass.
        head = student.head_spec.with_weights(weight_VD=student.head_weight, bias_V=student.head_bias)
        return HiddenSignal(outputs["last"], head, taps=student.taps_of(outputs))
