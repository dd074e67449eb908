"""What every teacher offers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from largekd.contracts import Batch, SignalRequest, TeacherSignal


class Teacher(Protocol):
    """A source of signals. A new kind of teacher is a new file in this room and a line in the builder."""

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError when this teacher cannot serve the request; called before the first step."""

    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> AbstractContextManager[Iterator[TeacherSignal | None]]:
        """One signal per micro-batch of the step, in order, valid until the next is asked for or the block ends.

        The whole step is shown at once, so that a teacher may reorder, batch or read ahead. A collective call.
        """

    def after_step(self) -> None:
        """Called once after each optimizer step that was applied; a teacher that learns does it here."""

    def close(self) -> None:
        """Release what the teacher holds."""
