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
        if not inner or in_list:
            yield Key(dotted, _kind(field.annotation), _default(field), field.description or "")
        elif not field.is_required() and field.get_default(call_default_factory=True) is None:
            yield Key(dotted, "mapping", "null", field.description or "")
        below = f"{dotted}.*." if in_list else f"{dotted}."
        yield from _merged([key for candidate in inner for key in run_keys(candidate, prefix=below)])


def key_reference(*, width: int = 100) -> str:
    """All keys as text for a terminal, one group per top-level key; a record that appears again is referred to."""
    lines: list[str] = []
    for group, field in RunConfig.model_fields.items():
        (record,) = records_in(field.annotation)
        lines += ["", f"{group}: {(record.__doc__ or '').strip()}"]
        repeated = _repeated(record, prefix=f"{group}.")
        for key in run_keys(record, prefix=f"{group}."):
            if any(key.name.startswith(f"{again}.") for again in repeated):
                continue
            kind = f"as {repeated[key.name]}" if key.name in repeated else key.kind
            note = "required" if key.default is None else f"default {key.default}"
            lines.append(f"  {key.name}  ({kind}; {note})")
            if key.description:
                indent = " " * (2 + _INDENT)
                lines += textwrap.wrap(key.description, width=width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines[1:])


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


def _merged(keys: Sequence[Key]) -> list[Key]:
    """Keys of the same name, from the records of a union, as one with all their kinds."""
    merged: dict[str, Key] = {}
    for key in keys:
        before = merged.get(key.name)
        kind = key.kind if before is None or before.kind == key.kind else f"{before.kind} | {key.kind}"
        merged[key.name] = replace(before or key, kind=kind)
    return list(merged.values())


def _repeated(record: type[BaseModel], *, prefix: str) -> dict[str, str]:
    """Key -> an earlier key that holds the same record."""
    first: dict[tuple[type[BaseModel], ...], str] = {}
    repeated: dict[str, str] = {}
    for name, field in record.model_fields.items():
        inner = records_in(field.annotation)
        if inner and inner in first:
            repeated[f"{prefix}{name}"] = first[inner]
        elif inner:
            first[inner] = f"{prefix}{name}"
    return repeated


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
        if arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}s"
        return f"list of {len(arguments)} {_kind(arguments[0])}s"
    return "mapping"


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "")
