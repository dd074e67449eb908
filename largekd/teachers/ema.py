"""The EMA teacher: the exponential moving average of the student's own weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from largekd.contracts import Batch, SignalRequest, TeacherSignal
from largekd.errors import CheckpointError
from largekd.runtime.ranks import Ranks
from largekd.teachers.average import ShardAverage
from largekd.teachers.online import OnlineTeacher


class EMATeacher:
    """An online teacher whose weights follow the student's after every applied step; a skipped step changes nothing.

    `model` has the averaged weights.

    After Tarvainen and Valpola 2017 (Mean Teacher).
    """

    def __init__(self, *, online: OnlineTeacher, average: ShardAverage, model: PreTrainedModel, ranks: Ranks) -> None:
        self._online = online
        self.model = model
        self._average = average
        self._state = _AverageState(average=average, ranks=ranks)

    def check(self, request: SignalRequest) -> None:
        """See OnlineTeacher.check."""
        self._online.check(request)

    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> AbstractContextManager[Iterator[TeacherSignal | None]]:
        """See Teacher.signals: those of the average as it was when the step began."""
        return self._online.signals(micro_batches, request=request)

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        """Take in the student's new weights."""
        self._average.update()

    @property
    def state(self) -> "_AverageState":
        """The average's shards and the number of its updates."""
        return self._state

    @property
    def metrics(self) -> Mapping[str, float]:
        """The share of the average that the next step keeps."""
        return {"teacher/decay": self._average.decay}

    def close(self) -> None:
        """Remove the engine's hooks."""
        self._online.close()


class _AverageState:
    """One safetensors file for each rank."""

    def __init__(self, *, average: ShardAverage, ranks: Ranks) -> None:
        self._average = average
        self._ranks = ranks

    def _path(self, folder: Path) -> Path:
        return folder / f"rank_{self._ranks.rank:05d}.safetensors"

    def save(self, folder: Path) -> None:
        """Write this rank's shards."""
        self._average.save(path=self._path(folder))

    def load(self, folder: Path) -> None:
        """Read them back. Errors: CheckpointError."""
        path = self._path(folder)
        if not path.is_file():
            raise CheckpointError(f"{path}: this rank has no part of the teacher's average there.")
        self._average.load(path=path)
