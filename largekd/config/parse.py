"""From nested mappings to a record: what pydantic finds, in one readable line each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from largekd.config.problems import problems, shown

Record = TypeVar("Record", bound=BaseModel)


def read_record(record: type[Record], *, mapping: Mapping[str, Any]) -> tuple[Record | None, list[str]]:
    """The record and no line, or None and one line per problem; rules that join keys are not asked here.

    Errors: TypeError, RecursionError for what is not plain data.
    """
    # Strict JSON mode: lists become tuples, but no text becomes a number and no boolean a count.
    text = json.dumps(_with_kinds(mapping, kinds=getattr(record, "default_kinds", {})), default=_plain)
    try:
        return record.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, problems(error, record=record, data=json.loads(text))


def _with_kinds(mapping: Mapping[str, Any], *, kinds: Mapping[str, str]) -> Mapping[str, Any]:
    """A union of records is told apart by what is written: a teacher without a kind is an online one, also among
    several, and so on for the keys of `kinds`."""
    named: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = mapping.get(key)
        if not isinstance(value, Mapping):
            continue
        members = value.get("members")
        if isinstance(members, Sequence) and not isinstance(members, str):
            own = [_with_kinds(member, kinds=kinds) if isinstance(member, Mapping) else member for member in members]
            value = {**value, "members": own}
        named[key] = {"kind": kind, **value}
    return {**mapping, **named}


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; numbers, text, lists and mappings are expected")
