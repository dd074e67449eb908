"""Rows in: files and hub data sets as Items."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from largekd.config.generate import RowSourceConfig
from largekd.curation.records import Item
from largekd.errors import DataError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ID_DIGITS = 16


def read_items(source: RowSourceConfig) -> list[Item]:
    """The rows of a source in their order. Errors: DataError for what cannot be read, naming row and column."""
    items: list[Item] = []
    seen: dict[str, int] = {}
    stop = None if source.max_rows is None else source.skip_rows + source.max_rows
    for number, row in islice(enumerate(_rows(source)), source.skip_rows, stop):
        item = _item(row, source=source, number=number)
        if item.id in seen:
            if source.id is None:
                continue  # The same content twice: one row.
            raise DataError(
                f"source.id = {source.id!r}: rows {seen[item.id]} and {number} of {source.path} are both {item.id!r}; "
                "name a column whose values are all different, or none."
            )
        seen[item.id] = number
        items.append(item)
    if not items:
        raise DataError(f"source.path = {source.path!r}: no row was read; look at source.skip_rows and max_rows.")
    return items


def _rows(source: RowSourceConfig) -> Iterator[Mapping[str, Any]]:
    try:
        yield from _dataset(source)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise DataError(f"source.path = {source.path!r}: cannot be read: {cause}") from error


def _dataset(source: RowSourceConfig) -> IterableDataset:
    found = _files(source.path)
    if found is None:
        return load_dataset(source.path, source.subset, split=source.split, streaming=True)
    kinds = {READERS[path.suffix] for path in found}
    if len(kinds) > 1:
        raise DataError(
            f"source.path = {source.path!r}: files of several kinds ({', '.join(sorted(kinds))}); name one."
        )
    return load_dataset(kinds.pop(), data_files=[str(path) for path in found], split="train", streaming=True)


def _files(name: str) -> list[Path] | None:
    """The files that a path, folder or pattern names; None: it can only be a hub data set."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(inner for inner in path.rglob("*") if inner.suffix in READERS)
    elif any(letter in name for letter in "*?["):
        found = sorted(inner for inner in Path(path.anchor or ".").glob(str(path).removeprefix(path.anchor)))
    elif path.is_file():
        found = [path]
    elif path.suffix in READERS:
        raise DataError(f"source.path = {name!r}: there is no such file.")
    else:
        return None
    unknown = [inner for inner in found if inner.suffix not in READERS]
    if unknown or not found:
        what = f"{unknown[0]} is not one of" if unknown else "there is no file of the kinds"
        raise DataError(f"source.path = {name!r}: {what} {', '.join(READERS)}.")
    return found


def _item(row: Mapping[str, Any], *, source: RowSourceConfig, number: int) -> Item:
    def text(column: str | None, key: str) -> str | None:
        if column is None:
            return None
        if row.get(column) is None:
            have = ", ".join(map(str, row))
            what = "is empty in" if column in row else "is missing in"
            raise DataError(f"source.{key} = {column!r}: the column {what} row {number} of {source.path} ({have}).")
        value = row[column]
        if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
            value = _of_conversation(value, role="user" if key == "question" else "assistant")
            if value is None:
                raise DataError(f"source.{key} = {column!r}: row {number} of {source.path} has no such message.")
        return _clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))

    question = text(source.question, "question")
    assert question is not None
    named = {source.question, source.answer, source.tests, source.id}
    fields = {name: _plain(value) for name, value in row.items() if name not in named and value is not None}
    answer, tests, own = text(source.answer, "answer"), text(source.tests, "tests"), text(source.id, "id")
    return Item(own or content_id(question, answer or "", tests or ""), question, answer, tests, fields)


def _of_conversation(messages: Sequence[Mapping[str, Any]], *, role: str) -> str | None:
    """A chat record's question is its first message of the user, its answer the next of the assistant."""
    return next((message.get("content") for message in messages if message["role"] == role), None)


def content_id(*parts: str) -> str:
    """A name for a row that has none: a hash of its content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_ID_DIGITS]


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which no file and no tokenizer takes, are replaced."""
    return text.encode("utf-8", errors="replace").decode()


def _plain(value: Any) -> Any:
    """JSON for the shards; dates and the like as text."""
    return json.loads(_clean(json.dumps(value, ensure_ascii=False, default=str)))
