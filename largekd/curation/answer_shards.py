"""Answers on disk: files of JSON lines {"ask": …, "written": …}, each written once, whole, and never changed.

`shard_000012.0123456789abcdef.jsonl`: the number says nothing but when it was written; the digits begin the SHA-256 of
the content. A folder's answers are the union of its shards, whatever their number and order; where an ask has several,
because it failed and was asked again, the newest counts.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from largekd.curation.records import Ask, Draw, Item, Written
from largekd.errors import DataError
from largekd.runtime.files import atomic_write

RAW_FOLDER = "raw"
_NAME = re.compile(r"shard_(?P<number>\d{6,})\.(?P<digest>[0-9a-f]{16})\.jsonl")


class Answer(NamedTuple):
    """What was asked, and what was written."""

    ask: Ask
    written: Written


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a folder, the oldest first; unfinished files are none."""
    return [path for _, path in sorted(_numbered(folder))]


def next_number(folder: Path) -> int:
    """One more than the largest number of a shard in the folder."""
    return max((number for number, _ in _numbered(folder)), default=-1) + 1


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("shard_*.jsonl"):
        if match := _NAME.fullmatch(path.name):
            yield int(match["number"]), path


def write_shard(folder: Path, *, number: int, answers: Sequence[Answer]) -> Path:
    """Commit answers as one file. Errors: OSError, and then nothing is there."""
    lines = [
        json.dumps({"ask": asdict(ask), "written": asdict(written)}, ensure_ascii=False) for ask, written in answers
    ]
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="backslashreplace")
    path = folder / f"shard_{number:06d}.{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    atomic_write(path, data=data)
    return path


def read_shard(path: Path) -> list[Answer]:
    """The answers in a shard. Errors: DataError when the file is not what was written."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != match["digest"]:
        raise DataError(
            f"{path}: the content is not what was written (its SHA-256 does not begin with {match['digest']}). Restore "
            "it from a copy, or move it away to have its answers written again."
        )
    return [_answer(json.loads(line)) for line in data.decode().split("\n") if line]


def read_answers(folder: Path) -> Iterator[Answer]:
    """All answers of a folder of shards, each key once, the newest. Errors: DataError for a damaged shard."""
    seen: set[str] = set()
    for path in reversed(shard_paths(folder)):
        for answer in read_shard(path):
            if answer.written.key not in seen:
                seen.add(answer.written.key)
                yield answer


def _answer(record: Mapping[str, Any]) -> Answer:
    ask = dict(record["ask"])
    draw = dict(ask["draw"])
    draw["stop"] = tuple(draw["stop"])
    ask |= {"item": Item(**ask["item"]), "draw": Draw(**draw), "messages": tuple(ask["messages"])}
    return Answer(Ask(**ask), Written(**record["written"]))
