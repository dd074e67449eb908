"""What every teacher offers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from largekd.contracts import Batch, SignalRequest, TeacherSignal
from largekd.errors import TeacherError


class StoppedWaitingError(Exception):
    """The ranks were told to stop while they waited for a teacher's signals; raised on all of them, before any forward
    of the step."""


class TeacherGoneError(TeacherError):
    """A teacher did not come back in time; raised on all ranks, before any forward of the step."""


class TeacherState(Protocol):
    """State of a teacher that learns; both methods run on every rank, see the owners of a checkpoint's parts."""

    def save(self, folder: Path) -> None:
        """Write all of it under `folder`; files of one rank carry its number."""

    def load(self, folder: Path) -> None:
        """Become what was saved."""


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

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        """Called once after each optimizer step that was applied; a teacher that learns does it here.

        figures: what the step's passes gave beside the loss, this rank's sums over its micro-batches. A collective
        call.
        """

    @property
    def state(self) -> "TeacherState | None":
        """What a checkpoint must keep of this teacher; None where it does not learn."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures for the step's record, such as the weights of several teachers."""

    def close(self) -> None:
        """Release what the teacher holds."""


class LearnsNothing:
    """What the protocol asks of a teacher that stays as it is."""

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        """It does not learn."""

    @property
    def state(self) -> None:
        """Nothing that a checkpoint must keep."""
        return None

    @property
    def metrics(self) -> Mapping[str, float]:
        """None, unless a teacher has some."""
        return {}


@runtime_checkable
class CountsSkips(Protocol):
    """A teacher whose schedule counts the steps that were skipped too."""

    def after_skipped_step(self) -> None:
        """Called in place of `after_step` once the ranks have skipped a step. Not a collective call."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A teacher that can begin with a step's signals before they are asked for."""

    def prepare(self, micro_batches: Sequence[Batch], *, request: SignalRequest) -> None:
        """Begin with the signals that `signals` will be asked for soon. Returns at once; not a collective call."""
