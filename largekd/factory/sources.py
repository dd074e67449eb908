"""Rows in: files and hub data sets as Items.

JSON lines and CSV are read line by line, as they stand: a reader that infers columns makes 5 to 5.0 and "2020-01-01" to
a time of day because of another row, and with them other prompts, other keys and wrong answers.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from largekd.config.generate import RowSourceConfig
from largekd.curation.records import Item
from largekd.data.json_lines import stream_raw
from largekd.errors import DataError

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ID_DIGITS = 16


def read_items(source: RowSourceConfig) -> list[Item]:
    """The rows of a source in their order, those that are wholly alike once.

    Errors: DataError for what cannot be read, naming row and column.
    """
    items: dict[str, Item] = {}
    rows: dict[str, int] = {}
    doubles = 0
    stop = None if source.max_rows is None else source.skip_rows + source.max_rows
    for number, row in islice(enumerate(_rows(source)), source.skip_rows, stop):
        item = _item(row, source=source, number=number)
        if item.id in items and source.id is not None:
            raise DataError(
                f"source.id = {source.id!r}: rows {rows[item.id]} and {number} of {source.path} are both {item.id!r}; "
                "name a column whose values are all different, or none."
            )
        if item.id in items and item.fields != items[item.id].fields:
            # Another persona asks the same. The first row keeps its name, so that one may add such rows later.
            item = replace(item, id=content_id(item.id, json.dumps(item.fields, sort_keys=True)))
        doubles += item.id in items
        items.setdefault(item.id, item)
        rows[item.id] = number
    if not items:
        raise DataError(f"source.path = {source.path!r}: no row was read; look at source.skip_rows and max_rows.")
    if doubles:
        logger.info("%s: %d rows are left out, which repeat others in every column", source.path, doubles)
    return list(items.values())


def _rows(source: RowSourceConfig) -> Iterator[Mapping[str, Any]]:
    found = _files(source.path)
    try:
        yield from _records(source, files=found)
    except (DatasetsError, OSError, ValueError, RuntimeError, csv.Error) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        absent = "" if found is not None else "there is no such file or folder, and as a hub data set it "
        raise DataError(f"source.path = {source.path!r}: {absent}cannot be read: {cause}") from error


def _records(source: RowSourceConfig, *, files: Sequence[Path] | None) -> Iterator[Mapping[str, Any]]:
    if files is None:
        yield from load_dataset(source.path, source.subset, split=source.split, streaming=True)
        return
    kinds = {READERS[path.suffix] for path in files}
    if len(kinds) > 1:
        raise DataError(
            f"source.path = {source.path!r}: files of several kinds ({', '.join(sorted(kinds))}); name one."
        )
    match kinds.pop():
        case "json":
            yield from json_objects(files, key="source.path")
        case "csv":
            yield from _csv_rows(files)
        case kind:
            yield from load_dataset(kind, data_files=[str(path) for path in files], split="train", streaming=True)


def json_objects(files: Sequence[Path], *, key: str) -> Iterator[dict[str, Any]]:
    """The objects in files of JSON, an array or one to a line. Errors: DataError; `key` named the files."""
    for raw in stream_raw(files=tuple(map(str, files)), text_field=""):
        if raw.problem or not isinstance(raw.value, dict):
            raise DataError(f"{raw.origin} ({key}): {raw.problem or 'not an object with columns'}.")
        yield raw.value


def _csv_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of texts; nothing for an empty cell."""
    for path in files:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row:
                    raise DataError(f"{path}, line {reader.line_num} (source.path): more cells than columns.")
                yield {name: text or None for name, text in row.items()}


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
        value = row.get(column)
        # Not every row has a right answer, or tests.
        if value is None and column in row and key in ("answer", "tests"):
            return None
        if value is None or (isinstance(value, str) and not value.strip()):
            have = ", ".join(map(str, row))
            what = "is empty in" if column in row else "is missing in"
            raise DataError(f"source.{key} = {column!r}: the column {what} row {number} of {source.path} ({have}).")
        if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
            value = _of_conversation(value, role="user" if key == "question" else "assistant")
            if value is None:
                raise DataError(f"source.{key} = {column!r}: row {number} of {source.path} has no such message.")
        return _clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))

    question = text(source.question, "question")
    assert question is not None
    named = {source.question, source.answer, source.tests, source.id}
    fields = plain_record({name: value for name, value in row.items() if name not in named and value is not None})
    answer, tests, own = text(source.answer, "answer"), text(source.tests, "tests"), text(source.id, "id")
    return Item(own or content_id(question, answer or "", tests or ""), question, answer, tests, fields)


def _of_conversation(messages: Sequence[Mapping[str, Any]], *, role: str) -> str | None:
    """A chat record's question is its first message of the user, its answer the next of the assistant."""
    asked = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    return next((message.get("content") for message in messages[asked:] if message["role"] == role), None)


def content_id(*parts: str) -> str:
    """A name for a row that has none: a hash of its content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_ID_DIGITS]


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which no file and no tokenizer takes, are replaced."""
    return text.encode("utf-8", errors="replace").decode()


def plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON for the shards; dates and the like, and numbers that JSON does not have, as text."""
    text = _clean(json.dumps(record, ensure_ascii=False, default=str))
    return dict(json.loads(text, parse_constant=str))
