"""Places that a record (a step and its numbers) is written to: JSON lines, TensorBoard, the terminal."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

from largekd.monitoring.event_files import cut_event_files
from largekd.monitoring.images import png
from largekd.monitoring.json_records import encode_record, replaced_file, writing
from largekd.monitoring.names import Tags
from largekd.runtime.progress_bar import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import FileWriter

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes records in order of their steps."""

    def write(self, *, step: int, values: Mapping[str, float]) -> None:
        """Writes one record; it survives a kill of the process from here on."""

    def close(self) -> None:
        """Releases files; calling it again is harmless."""


class JsonlSink:
    """One JSON object per record in `path` (see `encode_record`), flushed after each line.

    Opening it cuts the file back to the records with step <= `resume_step`, atomically. 0 means that nothing was
    resumed: such a run repeats its records of step 0 too, so that the file starts empty. Lines that are not records
    (the last one, torn by a kill) are dropped with a warning.
    Raises LargeKDError when the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_lines(path, resume_step=resume_step)
        with writing(path):
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, *, step: int, values: Mapping[str, float]) -> None:
        """Appends one line."""
        with writing(self._path):
            self._file.write(encode_record(step=step, values=values) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


class TensorBoardSink:
    """Scalars in an event file of `folder`, one event per record, under sanitised tags.

    Opening it removes from the folder's event files what was logged after `resume_step` (everything for 0), and marks
    the new file so that a TensorBoard that is running forgets those steps too.
    Raises LargeKDError when the folder cannot be written, ConfigError when two metrics would share a tag.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        # Imported here because it takes about a second and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._tags = Tags()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            cut_event_files(folder, last_step=resume_step if resume_step else -1)
            self._writer = SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, *, step: int, values: Mapping[str, float]) -> None:
        """Writes all numbers of the record as one event, and flushes it."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=self._tags.tag(name), simple_value=value) for name, value in values.items()]
        with writing(self._folder):
            cast("FileWriter", self._writer.file_writer).add_summary(Summary(value=scalars), step)
            self._writer.flush()

    def write_images(self, *, step: int, images: Mapping[str, "Tensor"]) -> None:
        """Writes images (3, height, width) of uint8, by name, and flushes them."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(
                tag=self._tags.tag(name),
                image=Summary.Image(
                    height=image.shape[1], width=image.shape[2], colorspace=3, encoded_image_string=png(image)
                ),
            )
            for name, image in images.items()
        ]
        with writing(self._folder):
            cast("FileWriter", self._writer.file_writer).add_summary(Summary(value=values), step)
            self._writer.flush()

    def write_texts(self, *, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, by name, for TensorBoard's text page, and flushes them."""
        with writing(self._folder):
            for name, text in texts.items():
                self._writer.add_text(self._tags.tag(name), text, step)
            self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        with writing(self._folder):
            self._writer.close()


class ConsoleSink:
    """The run's progress on the terminal: step, loss, tokens per second and the time that is left."""

    def __init__(self, *, total_steps: int, resume_step: int) -> None:
        self._bar = ProgressBar(label="distil", total=total_steps, initial=resume_step)

    def write(self, *, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to `step`."""
        figures = {"loss": f"{values['loss']:.4f}"}
        if "perf/tokens_per_s" in values:
            figures["tokens/s"] = f"{values['perf/tokens_per_s']:,.0f}"
        self._bar.advance(to=step, figures=figures)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def _cut_lines(path: Path, *, resume_step: int) -> None:
    """Keeps the records of `path` with step <= resume_step, none for 0."""
    with path.open("rb") as file, replaced_file(path) as target:
        for number, line in enumerate(file, start=1):
            step = _step_of(line)
            if step is None:
                logger.warning("%s, line %d is no record (was a run killed while writing it?); dropped", path, number)
            elif resume_step > 0 and step <= resume_step:
                target.write(line)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line of metrics.jsonl; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
