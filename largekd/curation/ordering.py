"""Raw answers, row by row, in an order that depends on the rows and a seed alone: not on shards, ranks or time.

Rows come in the order of a hash, which is a random one: the first n rows are a fair choice of n rows. Memory holds a
few numbers for each answer, never the texts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from largekd.curation.answer_shards import RAW_FOLDER, Answer, read_shard, shard_paths
from largekd.errors import DataError

_ANSWER = TypeAdapter(Answer)
_PLACE = np.dtype([("order", "<u8"), ("shard", "<u4"), ("offset", "<u8")])


class OrderedAnswers:
    """The answers of a job. Errors: DataError for a folder without answers, and for a damaged shard."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self._shards = shard_paths(folder / RAW_FOLDER)
        self._seed = seed
        self.repeated = 0
        """Answers left out by `rows` because their key came before."""
        self._places = self._index()
        if not len(self._places):
            raise DataError(
                f"{folder} has no answers (files shard_*.jsonl in {folder / RAW_FOLDER}): generate some, or name the "
                "folder of another job."
            )

    def __len__(self) -> int:
        return len(self._places)

    def rows(self) -> Iterator[list[Answer]]:
        """All answers of one row at a time, by sample, template and key; each key once, and no failure of what was
        answered later."""
        starts = np.flatnonzero(np.diff(self._places["order"], prepend=self._places["order"][:1] + 1))
        for start, stop in zip(starts, [*starts[1:], len(self._places)], strict=True):
            found = _without_superseded([self._read(place) for place in self._places[start:stop]])
            first: dict[str, Answer] = {}
            for answer in sorted(found, key=_in_row):
                first.setdefault(answer.written.key, answer)
            answers = list(first.values())
            self.repeated += len(found) - len(answers)
            # Two rows with the same hash are still two rows.
            for name in dict.fromkeys(answer.ask.item.id for answer in answers):
                yield [answer for answer in answers if answer.ask.item.id == name]

    def _index(self) -> np.ndarray:
        parts = [np.zeros(0, _PLACE)]
        for shard, path in enumerate(self._shards):
            answers = read_shard(path)
            lines = [len(line) + 1 for line in path.read_bytes().split(b"\n") if line]
            part = np.zeros(len(answers), _PLACE)
            part["order"] = [self._hash(answer.ask.item.id) for answer in answers]
            part["shard"] = shard
            part["offset"] = np.concatenate([[0], np.cumsum(lines)[:-1]]) if lines else []
            parts.append(part)
        return np.sort(np.concatenate(parts), order=["order", "shard", "offset"])

    def _hash(self, row_id: str) -> int:
        digest = hashlib.blake2b(f"{self._seed} {row_id}".encode(errors="backslashreplace"), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _read(self, place: np.void) -> Answer:
        with self._shards[int(place["shard"])].open("rb") as stream:
            stream.seek(int(place["offset"]))
            return _ANSWER.validate_python(json.loads(stream.readline()))


def canonical(answer: Answer) -> bytes:
    """The same bytes for equal answers."""
    record = {"ask": asdict(answer.ask), "written": asdict(answer.written)}
    return json.dumps(record, sort_keys=True).encode()


def _without_superseded(answers: list[Answer]) -> list[Answer]:
    """`answers`, the oldest first, without failed ones of a sample that was tried again; a revision names the template
    of what it revises first."""
    kept: list[Answer] = []
    for place, answer in enumerate(answers):
        item, template, sample = answer.ask.item.id, answer.ask.template, answer.ask.sample
        again = answer.written.finish == "failed" and any(
            (ask.item.id, ask.sample) == (item, sample) and f"{ask.template}+".startswith(f"{template}+")
            for ask, _ in answers[place + 1 :]
        )
        if not again:
            kept.append(answer)
    return kept


def _in_row(answer: Answer) -> tuple[str, int, str, str, str]:
    ask, written = answer
    return ask.item.id, ask.sample, ask.template, written.key, written.text
