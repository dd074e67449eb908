"""What pydantic found wrong, in one readable line per problem: dotted key, value, rule."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from largekd.config.data import SourceConfig
from largekd.config.schema import records_at, run_keys

_MAX_VALUE_CHARS = 60

_RULES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "must match the regular expression {pattern}",
    "too_long": "has {actual_length} entries, at most {max_length} are allowed",
    "too_short": "has {actual_length} entries, at least {min_length} are needed",
}


def problems(error: ValidationError, *, record: type[BaseModel], data: Any) -> list[str]:
    """One line per problem in `data`, which was to become a `record`."""
    return [_problem(details, record=record, data=data) for details in error.errors(include_url=False)]


def nearest_key(path: Sequence[str | int], *, record: type[BaseModel]) -> str | None:
    """The dotted name most like the unknown one at `path`: a sibling first, else a key of that name elsewhere."""
    *parents, wrong = path
    siblings = [name for owner in records_at(record, parents) for name in owner.model_fields]
    close = difflib.get_close_matches(str(wrong), siblings, n=1)
    if close:
        return dotted([*parents, close[0]])
    elsewhere = {key.name.rsplit(".", 1)[-1]: key.name for key in reversed(list(run_keys(record)))}
    close = difflib.get_close_matches(str(wrong), list(elsewhere), n=1, cutoff=0.8)
    return elsewhere[close[0]] if close else None


def dotted(path: Sequence[str | int]) -> str:
    """A path of field names and list indices as it is written on the command line."""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value as it is shown in a message: YAML's words for null and booleans, long text cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 1] + "…"


def _problem(details: ErrorDetails, *, record: type[BaseModel], data: Any) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = _real_path(details["loc"], data=data, missing=kind == "missing")
    key = dotted(path)
    if kind == "extra_forbidden":
        near = nearest_key(path, record=record)
        return f"{key}: unknown key" + (f"; did you mean {near}?" if near else "")
    if kind == "missing":
        return f"{key}: required, but not set{_description(path, record=record)}"
    if kind == "union_tag_invalid":
        tag_key = f"{key}.{context['discriminator'].strip(chr(39))}"
        return f"{tag_key} = {context['tag']!r}: must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{key}.{context['discriminator'].strip(chr(39))}: required, but not set"
    rule = _RULES[kind].format(**_numbers(context)) if kind in _RULES else str(context.get("error") or details["msg"])
    if kind == "string_type" and isinstance(value, int | float):
        rule += "; put quotes around it in the YAML"
    if context.get("class_name") == SourceConfig.__name__:
        rule = "must be a path or a mapping of keys"
    if isinstance(value, Mapping):
        # A rule about several keys names them itself; beside them may stand what must not be shown.
        return f"{key}: {rule}" if key else rule
    return f"{key} = {shown(value)}: {rule}" if key else rule


def _real_path(location: Sequence[str | int], *, data: Any, missing: bool) -> list[str | int]:
    """The location without the tags that pydantic inserts where a union was discriminated."""
    path: list[str | int] = []
    here = data
    for depth, part in enumerate(location):
        is_last = depth == len(location) - 1
        if isinstance(here, Mapping) and part not in here and not (is_last and missing):
            continue
        if path and not isinstance(here, Mapping | list | tuple):
            continue
        path.append(part)
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            here = None
    return path


def _description(path: Sequence[str | int], *, record: type[BaseModel]) -> str:
    *parents, name = path
    for owner in records_at(record, parents):
        field = owner.model_fields.get(str(name))
        if field is not None and field.description:
            return f" ({field.description.rstrip('.')})"
    return ""


def _numbers(context: Mapping[str, Any]) -> dict[str, Any]:
    """1.0 is shown as 1: the bound of a whole number is a whole number."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in context.items()
    }
