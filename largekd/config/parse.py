"""From nested mappings to a record: what pydantic finds, in one readable line each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ValidationError

from largekd.config.problems import problems, shown
from largekd.config.run import RunConfig


def read_record(mapping: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """The record and no line, or None and one line per problem; rules that join keys are not asked here.

    Errors: TypeError, RecursionError for what is not plain data.
    """
    # Strict JSON mode: lists become tuples, but no text becomes a number and no boolean a count.
    text = json.dumps(_with_kind(mapping), default=_plain)
    try:
        return RunConfig.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, problems(error, record=RunConfig, data=json.loads(text))


def _with_kind(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """A teacher without a kind is an online one, also among several: a union of records is told apart by what is
    written."""
    teacher = mapping.get("teacher")
    if not isinstance(teacher, Mapping):
        return mapping
    members = teacher.get("members")
    if isinstance(members, Sequence) and not isinstance(members, str):
        teacher = {**teacher, "members": [_with_kind(m) if isinstance(m, Mapping) else m for m in members]}
    return {**mapping, "teacher": {"kind": "online", **teacher}}


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; numbers, text, lists and mappings are expected")
