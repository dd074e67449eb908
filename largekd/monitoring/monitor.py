"""Where the numbers of a run go: one object that the loop hands its records to."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from largekd.config.output import LogConfig
from largekd.monitoring.names import REQUIRED, check_name
from largekd.monitoring.sinks import ConsoleSink, JsonlSink, Sink, TensorBoardSink

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Monitor:
    """Writes records to `folder` and the terminal; on ranks other than the main one it writes nothing.

    A record belongs to one step and each step has at most one, in ascending order: what a step has to say (terms,
    health, an evaluation at that step) is merged before `log`. Numbers are floats of the host: they are read from the
    device by whoever computes them.

    Opening it after a resume cuts all files back to `resume_step` (0: a new run, its files start empty), so the record
    of a step must be logged before the step's checkpoint is committed.
    Raises LargeKDError when a file cannot be written.
    """

    def __init__(self, *, config: LogConfig, folder: Path, resume_step: int, is_main: bool, total_steps: int) -> None:
        self._config = config
        self._total_steps = total_steps
        self._last_step = resume_step
        self._records: list[Sink] = []
        self._evaluations: list[Sink] = []
        self._tensorboard: TensorBoardSink | None = None
        self._closing = ExitStack()
        if is_main:
            with ExitStack() as opened:
                self._open_sinks(folder=folder, resume_step=resume_step, opened=opened)
                self._closing = opened.pop_all()

    def is_log_step(self, step: int) -> bool:
        """Whether `step` has a record: every `log.every_steps` steps, and the last step. The same on all ranks."""
        return step % self._config.every_steps == 0 or step == self._total_steps

    def is_health_step(self, step: int) -> bool:
        """Whether `step` computes health figures: every `log.health_every_steps` steps. The same on all ranks."""
        return self._config.health_every_steps > 0 and step % self._config.health_every_steps == 0

    def log(self, *, step: int, values: Mapping[str, float]) -> None:
        """Writes the record of a training step; `values` has at least `loss` and `tokens`."""
        missing = [name for name in REQUIRED if name not in values]
        assert not missing, f"the record of step {step} lacks {missing}; an evaluation alone goes to log_evaluation"
        assert step > self._last_step, f"step {step} is not after {self._last_step}: one record per step, in order"
        _check(values)
        self._last_step = step
        ordered = {name: values[name] for name in (*REQUIRED, *(n for n in values if n not in REQUIRED))}
        for sink in self._records:
            sink.write(step=step, values=ordered)

    def log_texts(self, *, step: int, texts: Mapping[str, str]) -> None:
        """Shows texts (Markdown, by `area/name`) in TensorBoard, and nowhere else."""
        for name in texts:
            check_name(name)
        if texts and self._tensorboard is not None:
            self._tensorboard.write_texts(step=step, texts=texts)

    def log_images(self, *, step: int, images: Mapping[str, Tensor]) -> None:
        """Shows images (3, height, width) of uint8, by `area/name`, in TensorBoard, and nowhere else."""
        for name in images:
            check_name(name)
        if images and self._tensorboard is not None:
            self._tensorboard.write_images(step=step, images=images)

    def log_evaluation(self, *, step: int, values: Mapping[str, float]) -> None:
        """Writes an evaluation that is not part of a training step's record, such as the one before step 1.

        It goes to TensorBoard and `evaluation.jsonl`, because each line of `metrics.jsonl` is a training step.
        """
        _check(values)
        for sink in self._evaluations:
            sink.write(step=step, values=values)

    def close(self) -> None:
        """Flushes and closes everything; calling it again is harmless."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_sinks(self, *, folder: Path, resume_step: int, opened: ExitStack) -> None:
        metrics = JsonlSink(folder / METRICS_FILE, resume_step=resume_step)
        opened.callback(metrics.close)
        evaluation = JsonlSink(folder / EVALUATION_FILE, resume_step=resume_step)
        opened.callback(evaluation.close)
        self._records.append(metrics)
        self._evaluations.append(evaluation)
        if self._config.tensorboard:
            tensorboard = TensorBoardSink(folder / TENSORBOARD_FOLDER, resume_step=resume_step)
            opened.callback(tensorboard.close)
            self._tensorboard = tensorboard
            self._records.append(tensorboard)
            self._evaluations.append(tensorboard)
        if self._config.progress:
            console = ConsoleSink(total_steps=self._total_steps, resume_step=resume_step)
            opened.callback(console.close)
            self._records.append(console)


def _check(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        check_name(name)
        # A tensor here would make every sink wait for the device.
        assert isinstance(value, int | float), f"metric {name!r} must be a number of the host, got {type(value)}"
