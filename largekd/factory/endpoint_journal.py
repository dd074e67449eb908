"""What a server was paid for, on the disk before anything else is done with it.

A line for every exchange that may have cost something: 16 digits of the SHA-256 of the rest, and JSON {"key", "cost",
"written"}; `written` is null where nothing of use came back. The job's shards hold the texts for good; what they hold
is left out when the journal is next opened or closed, and its cost is carried in one line.
"""

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from largekd.curation.records import Written
from largekd.runtime.files import atomic_write

_CARRIED = "carried"

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    key: str
    cost: float
    written: Written | None


class Journal:
    """Answers that were received and are perhaps not in a shard yet. One process at a time has it open.

    Keys are those of attempts. committed: those of all answers that are in the job's shards; asked when it is opened
    and closed, if it holds an answer. `spent`: cost of everything before it was opened. A line that a crash cut off is
    dropped; lines that are damaged otherwise are told in the log.
    """

    def __init__(self, path: Path, *, committed: Callable[[], Collection[str]]) -> None:
        self._path, self._committed, self._lock = path, committed, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._compact()
        self.spent = sum(entry.cost for entry in entries)
        self._received = {entry.key: entry.written for entry in entries if entry.written is not None}
        self._stream = path.open("ab", buffering=0)

    def received(self, key: str) -> Written | None:
        """The answer that an earlier start had received but not committed."""
        return self._received.get(key)

    def put(self, key: str, *, cost: float, written: Written | None) -> None:
        """Append one exchange; on the disk when this returns. Calls come from several threads.

        Errors: OSError, such as a full disk.
        """
        line = _line(_Entry(key, cost, written))
        with self._lock:
            if self._stream.closed:
                raise OSError(errno.EBADF, "the journal is closed", str(self._path))
            # The break in front keeps this line whole where the one before it was cut off.
            self._stream.write(b"\n" + line)
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Drop what the job has committed; safe to call twice."""
        with self._lock:
            if not self._stream.closed:
                self._stream.close()
                self._compact()

    def _compact(self) -> list[_Entry]:
        """What is left, written anew: one entry of carried cost, and the answers that are in no shard."""
        found = self._read()
        committed = self._committed() if any(entry.written is not None for entry in found) else ()
        carried, kept = 0.0, []
        for entry in found:
            if entry.written is None or entry.key in committed:
                carried += entry.cost
            else:
                kept.append(entry)
        entries = [_Entry(_CARRIED, carried, None), *kept]
        atomic_write(self._path, data=b"".join(map(_line, entries)))
        return entries

    def _read(self) -> list[_Entry]:
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        found = [_parsed(line) for line in lines[:-1] if line]
        entries = [entry for entry in found if entry is not None]
        if len(entries) < len(found):
            damaged = len(found) - len(entries)
            logger.warning("%s: %d damaged lines; their answers are asked for again", self._path, damaged)
        return entries


def _line(entry: _Entry) -> bytes:
    written = None if entry.written is None else asdict(entry.written)
    body = json.dumps({"key": entry.key, "cost": entry.cost, "written": written}).encode()
    return _digest(body) + b" " + body + b"\n"


def _parsed(line: bytes) -> _Entry | None:
    digest, _, body = line.partition(b" ")
    if _digest(body) != digest:
        return None
    record = json.loads(body)
    return _Entry(record["key"], record["cost"], None if record["written"] is None else Written(**record["written"]))


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
