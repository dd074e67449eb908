"""JSON of numbers that may be NaN or infinite, and files that are replaced whole or not at all."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from largekd.errors import LargeKDError
from largekd.runtime.files import fsync_path, temporary_sibling


def encode_record(*, step: int, values: Mapping[str, float]) -> str:
    """One line of JSON: `step`, then `values` by name, without a newline.

    JSON has no NaN or infinity. Such a value is written as null, and the object gains `nonfinite`, which maps its name
    to "nan", "inf" or "-inf".
    """
    record: dict[str, Any] = {"step": step}
    record.update((name, finite_or_none(value)) for name, value in values.items())
    nonfinite = {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return json.dumps(record, allow_nan=False, ensure_ascii=False)


def finite_or_none(value: float) -> float | None:
    """`value`, or None for NaN and infinities."""
    return value if math.isfinite(value) else None


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends; if the block raises, `path` stays as it was.

    The new content is on disk before the old is gone. Raises LargeKDError naming the file when it cannot be written.
    """
    aside = temporary_sibling(path, label=path.name)
    with writing(path):
        try:
            with aside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_path(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block (no space, no permission) into a LargeKDError that names `path`."""
    try:
        yield
    except OSError as error:
        raise LargeKDError(
            f"cannot write {path}: {error.strerror or error}; free or allow the space, or set run.dir to another folder"
        ) from error
