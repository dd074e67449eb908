"""Cutting TensorBoard event files back to a step.

A resumed run repeats steps that an earlier process already logged. A purge mark in the new event file hides them from
readers that honour it and read the files in order; the order comes from file names (second, host, process id), which a
second host or a restart within a second upsets. Removing the records makes it true for every reader.

A file is a sequence of records: length (uint64), checksum (uint32), an Event message, checksum (uint32), little-endian.
"""

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from largekd.monitoring.json_records import replaced_file

if TYPE_CHECKING:
    from typing import BinaryIO

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4


def cut_event_files(folder: Path, *, last_step: int) -> None:
    """Removes from every event file of `folder` what was logged after `last_step`, and a record torn by a crash.

    Files that have nothing to remove are left untouched, files without any number left are deleted. Each file is
    replaced atomically.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept, numbers, whole = [], 0, 0
        with path.open("rb") as file:
            for offset, size, event in _records(file):
                whole = offset + size
                # Purge marks of earlier resumes have done their work, and would hide newer records if read late.
                if event.HasField("session_log") or (event.HasField("summary") and event.step > last_step):
                    continue
                kept.append((offset, size))
                numbers += event.HasField("summary")
        if sum(size for _, size in kept) == path.stat().st_size and numbers:
            continue
        if whole < path.stat().st_size:
            logger.warning("%s ends in a torn record (a run was killed while it was written); dropped", path)
        if numbers:
            _copy(path, ranges=kept)
        else:
            path.unlink()


def _records(file: "BinaryIO") -> Iterator[tuple[int, int, Event]]:
    """Offset, size and message of each whole record; stops at the first that is not whole (torn or zero-filled)."""
    offset = 0
    while len(header := file.read(_HEADER.size)) == _HEADER.size:
        length, _ = _HEADER.unpack(header)
        body = file.read(length + _FOOTER_BYTES)
        if length == 0 or len(body) < length + _FOOTER_BYTES:
            return
        try:
            event = Event.FromString(body[:length])
        except DecodeError:
            return
        size = _HEADER.size + len(body)
        yield offset, size, event
        offset += size


def _copy(path: Path, *, ranges: list[tuple[int, int]]) -> None:
    with path.open("rb") as source, replaced_file(path) as target:
        for offset, size in ranges:
            source.seek(offset)
            target.write(source.read(size))
