"""The keys of a run configuration: for the nearest name in a message, for `--help`, and as JSON schema for editors."""

import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from largekd.config.run import RunConfig

_KINDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true | false"}
_INDENT = 4


@dataclass(frozen=True)
class Key:
    """One key: its dotted name (`*` is a list index), what it holds, and its default as YAML, None if required."""

    name: str
    kind: str
    default: str | None
    description: str


def records_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The record classes that a value of this type may be, looking through unions and sequences."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(record for inner in typing.get_args(annotation) for record in records_in(inner))


def records_at(record: type[BaseModel], path: Sequence[str | int]) -> tuple[type[BaseModel], ...]:
    """The record classes at a path of field names and list indices below `record`; empty where there is none."""
    here: tuple[type[BaseModel], ...] = (record,)
    for part in path:
        if isinstance(part, int) or part.isdigit():
            continue
        fields = (candidate.model_fields.get(part) for candidate in here)
        here = tuple(inner for field in fields if field is not None for inner in records_in(field.annotation))
    return here


def run_keys(record: type[BaseModel] = RunConfig, *, prefix: str = "") -> Iterator[Key]:
    """Every key below `record` in declaration order; a record's fields follow in its place."""
    for name, field in record.model_fields.items():
        dotted = f"{prefix}{name}"
        inner = records_in(field.annotation)
        in_list = _is_sequence(field.annotation)
        if not inner or in_list or _may_be_plain(field.annotation):
            yield Key(dotted, _kind(field.annotation), _default(field), field.description or "")
        elif not field.is_required() and field.get_default(call_default_factory=True) is None:
            yield Key(dotted, "mapping", "null", field.description or "")
        below = f"{dotted}.*." if in_list else f"{dotted}."
        yield from _merged([key for candidate in inner for key in run_keys(candidate, prefix=below)])


def key_reference(record: type[BaseModel] = RunConfig, *, width: int = 100) -> str:
    """All keys as text for a terminal, one group per top-level key; a record that appears again is referred to."""
    lines: list[str] = []
    for group, field in record.model_fields.items():
        inner = records_in(field.annotation)
        if not inner:
            lines += ["", *_entry(Key(group, _kind(field.annotation), _default(field), field.description or ""), width)]
            continue
        for part in inner:
            # One of several records is told by the only value that its first key may have.
            title = group if len(inner) == 1 else f"{group}, kind {_kind(part.model_fields['kind'].annotation)}"
            about = textwrap.wrap(f"{title}: {(part.__doc__ or '').strip()}", width=width, subsequent_indent="  ")
            lines += ["", *about, *_record_lines(part, group=group, width=width)]
    return "\n".join(lines[1:])


def _record_lines(record: type[BaseModel], *, group: str, width: int) -> Iterator[str]:
    repeated = _repeated(record, prefix=f"{group}.", first={})
    told: set[str] = set()
    for key in run_keys(record, prefix=f"{group}."):
        again = next((name for name in repeated if key.name.startswith(f"{name}.")), None)
        if again is None:
            told.add(key.name)
            known = repeated.get(key.name)
            yield from _entry(replace(key, kind=f"as {known}") if known else key, width)
        elif again not in told:
            told.add(again)
            yield f"  {again}  (as {repeated[again]})"


def _entry(key: Key, width: int) -> list[str]:
    """A key with its kind and default, and below it what it means."""
    note = "required" if key.default is None else f"default {key.default}"
    indent = " " * (2 + _INDENT)
    return [
        *textwrap.wrap(
            f"{key.name}  ({key.kind}; {note})", width=width, initial_indent="  ", subsequent_indent=indent + "  "
        ),
        *textwrap.wrap(key.description, width=width, initial_indent=indent, subsequent_indent=indent),
    ]


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; a data source may also be written as its path alone."""
    schema = RunConfig.model_json_schema()
    source = schema["$defs"]["SourceConfig"]
    schema["$defs"]["SourceConfig"] = {
        "title": source.pop("title"),
        "description": source.pop("description"),
        "anyOf": [{"type": "string"}, source],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def json_schema_text() -> str:
    """The content of recipes/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def record_schema_text(record: type[BaseModel]) -> str:
    """JSON schema of another record than a run's, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | record.model_json_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _merged(keys: Sequence[Key]) -> list[Key]:
    """Keys of the same name, from the records of a union, as one with all their kinds."""
    merged: dict[str, Key] = {}
    for key in keys:
        before = merged.get(key.name)
        kind = key.kind if before is None or before.kind == key.kind else f"{before.kind} | {key.kind}"
        merged[key.name] = replace(before or key, kind=kind)
    return list(merged.values())


def _repeated(record: type[BaseModel], *, prefix: str, first: dict[tuple[type[BaseModel], ...], str]) -> dict[str, str]:
    """Key -> an earlier key that holds the same record; `first` gains the keys that are the earlier ones."""
    repeated: dict[str, str] = {}
    for name, field in record.model_fields.items():
        inner = records_in(field.annotation)
        dotted = f"{prefix}{name}"
        if not inner:
            continue
        if first.setdefault(inner, dotted) != dotted:
            repeated[dotted] = first[inner]
            continue
        below = f"{dotted}.*." if _is_sequence(field.annotation) else f"{dotted}."
        for candidate in inner:
            repeated |= _repeated(candidate, prefix=below, first=first)
    return repeated


def _may_be_plain(annotation: Any) -> bool:
    """Whether a value of this type may be a number or text instead of a record."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _may_be_plain(typing.get_args(annotation)[0])
    return annotation in _KINDS or (_is_union(annotation) and any(map(_may_be_plain, typing.get_args(annotation))))


def _is_sequence(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (tuple, list):
        return True
    return _is_union(annotation) and any(_is_sequence(inner) for inner in typing.get_args(annotation))


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if _is_union(annotation):
        kinds = [_kind(inner) for inner in arguments if inner is not types.NoneType]
        return " | ".join(dict.fromkeys(kinds))
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{_plural(_kind(arguments[0]))}"
    return "mapping"


def _plural(kind: str) -> str:
    if kind.startswith("list of "):
        return kind.replace("list", "lists", 1)
    return f"({kind})" if " | " in kind else f"{kind}s"


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "")
