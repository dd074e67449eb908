"""JSON, JSON-lines and text files as streams of records that know the file and line they come from.

The `datasets` library's own JSON reader infers one schema for all files: it turns numbers into strings when a later
file disagrees with an earlier one, fills absent message keys with nulls, and does not say which line is broken. Here
each line is judged alone, and the library stores and caches the result.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from largekd.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Raw:
    """One record as it stands in a file: a parsed value, or the problem that kept it from being parsed."""

    origin: str
    value: Any = None
    problem: str = ""


def stream_records(
    *,
    files: tuple[str, ...],
    text_field: str,
    messages_field: str,
    max_samples: int | None,
    skip_samples: int = 0,
    weight_field: str | None = None,
    teacher_field: str | None = None,
    spans_field: str | None = None,
) -> Iterator[dict[str, str | float | None]]:
    """Rows of the columns `text`, `messages` (as JSON), `origin` and `problem`, at most `max_samples` of them
    after the first `skip_samples`.

    With `weight_field` also `weight`; one that is no number is the record's problem, a missing one is None. With
    `teacher_field` also `teacher`, a name in the same way. With `spans_field` also `spans`, as JSON; None where it is
    missing.
    """
    stop = None if max_samples is None else skip_samples + max_samples
    for raw in islice(stream_raw(files=files, text_field=text_field), skip_samples, stop):
        text, messages, problem = None, None, raw.problem
        if not problem:
            text, messages, problem = _select(raw.value, text_field=text_field, messages_field=messages_field)
        extra: dict[str, str | float | None] = {}
        if weight_field is not None:
            extra["weight"], wrong = _number(raw.value, field=weight_field)
            problem = problem or wrong
        if teacher_field is not None:
            extra["teacher"], wrong = _name(raw.value, field=teacher_field)
            problem = problem or wrong
        if spans_field is not None:
            spans = raw.value.get(spans_field) if isinstance(raw.value, dict) else None
            extra["spans"] = spans if spans is None or isinstance(spans, str) else json.dumps(spans)
        yield {"text": text, "messages": messages, "origin": raw.origin, "problem": problem, **extra}


def stream_raw(*, files: tuple[str, ...], text_field: str) -> Iterator[Raw]:
    """Every record of the files in order; a text file is one record whose only column is `text_field`."""
    return chain.from_iterable(_read_file(Path(name), text_field=text_field) for name in files)


def _read_file(path: Path, *, text_field: str) -> Iterator[Raw]:
    if path.suffix == ".txt":
        yield _read_text(path, text_field=text_field)
    elif path.suffix == ".json" and _starts_with_bracket(path):
        yield from _read_array(path)
    else:
        yield from _read_lines(path)


def _read_text(path: Path, *, text_field: str) -> Raw:
    try:
        return Raw(origin=str(path), value={text_field: path.read_bytes().removeprefix(UTF8_BOM).decode("utf-8")})
    except UnicodeDecodeError as error:
        return Raw(origin=str(path), problem=f"is not valid UTF-8 at byte {error.start}")


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4096).removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _read_array(path: Path) -> Iterator[Raw]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8 at byte {error.start}: save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON array: {error.msg} at column {error.colno}.") from error
    for index, value in enumerate(values):
        yield Raw(origin=f"{path}: element {index}", value=value)


def _read_lines(path: Path) -> Iterator[Raw]:
    # Bytes are split at \n alone: str.splitlines would also cut at U+2028, which is legal inside a JSON string.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(UTF8_BOM) if number == 1 else line
            if line.strip():
                yield _parse_line(line, origin=f"{path}:{number}", is_json=path.suffix == ".json" and number == 1)


def _parse_line(line: bytes, *, origin: str, is_json: bool) -> Raw:
    try:
        return Raw(origin=origin, value=json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Raw(origin=origin, problem=f"is not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        hint = "; a .json file holds an array of objects, or one object per line" if is_json else ""
        return Raw(origin=origin, problem=f"broken JSON: {error.msg} at column {error.colno}{hint}")
    except RecursionError:
        return Raw(origin=origin, problem="broken JSON: nested too deeply")


def _select(value: Any, *, text_field: str, messages_field: str) -> tuple[str | None, str | None, str]:
    """The record's text or its messages as JSON, and the problem if it has neither."""
    if not isinstance(value, dict):
        return None, None, f"is a JSON {type(value).__name__}, expected an object"
    if value.get(messages_field) is not None:
        return None, json.dumps(value[messages_field]), ""
    text = value.get(text_field)
    if text is None:
        names = ", ".join(map(repr, value)) or "none"
        return None, None, f"has neither {messages_field!r} nor {text_field!r} (its columns: {names})"
    if not isinstance(text, str):
        return None, None, f"{text_field!r} is a {type(text).__name__}, expected a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, None, f"{text_field!r} holds half of a surrogate pair, which is not a character"
    return text, None, ""


def _name(value: Any, *, field: str) -> tuple[str | None, str]:
    """The text in column `field`, and the problem if something else is there."""
    found = value.get(field) if isinstance(value, dict) else None
    if found is None or isinstance(found, str):
        return found, ""
    return None, f"column {field!r} holds a {type(found).__name__}, expected a teacher's name"


def _number(value: Any, *, field: str) -> tuple[float | None, str]:
    """The number in column `field`, and the problem if something else is there."""
    found = value.get(field) if isinstance(value, dict) else None
    if found is None:
        return None, ""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None, f"column {field!r} holds a {type(found).__name__}, expected a number of at least 0"
    try:
        return float(found), ""
    except OverflowError:
        return None, f"column {field!r} holds a number that is too large"
