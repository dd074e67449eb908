"""The student's frozen base as its teacher, seen from the step: the signal arises in the student's engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from largekd.contracts import Batch, OwnSignal, SignalRequest, TeacherSignal
from largekd.errors import TeacherError
from largekd.models.taps import check_layers
from largekd.teachers.protocol import LearnsNothing


class BackboneTeacher(LearnsNothing):
    """The model that the student's adapters were added to; it has no weights of its own and never learns."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for less than the whole distribution; ConfigError for a layer that does not exist."""
        if request.distribution not in (None, "full"):
            raise TeacherError(
                "teacher.kind = 'base': serves its whole distribution, hidden states and attention; set "
                "objective.signal.kind to full and take rollouts.policy_gradient out."
            )
        check_layers(request.taps, model=self._model, key="teacher")

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """The student's forward makes the signal itself, where one is asked for."""
        asked = request.distribution is not None or bool(request.taps)
        signal = OwnSignal(distribution=request.distribution is not None) if asked else None
        yield iter([signal] * len(micro_batches))

    def close(self) -> None:
        """Nothing is held that the student's engine does not hold."""
