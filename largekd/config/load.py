"""From a YAML file and dotted overrides to a checked RunConfig."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from largekd.config.checks import check_config
from largekd.config.data import SourceConfig
from largekd.config.problems import problems, shown
from largekd.config.run import RunConfig
from largekd.config.schema import records_at
from largekd.errors import ConfigError

Record = TypeVar("Record", bound=BaseModel)


def load_config(path: str | PurePath, *, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's configuration in a YAML file, see `load_record`; keys that contradict each other are refused too."""
    config = load_record(RunConfig, path=path, overrides=overrides)
    return _checked(config, source=str(path))


def load_record(record: type[Record], *, path: str | PurePath, overrides: Sequence[str] = ()) -> Record:
    """The `record` in a YAML file, with overrides such as `train.max_steps=10` applied in order.

    An override's value is YAML: `a.b=[1, 2]`, `a.b=null`, `a.b="007"`; it replaces what was there, a mapping too.
    `a.0.b` reaches into a list. Interpolations (`${train.seed}`, `${oc.env:HOME}`) are resolved after the overrides.
    Errors: ConfigError for a file, override, key or value that cannot be used, all problems in one message.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override, record=record)
    return _parse(_resolve(tree, source=str(path)), record=record, source=str(path))


def parse_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The configuration in nested mappings, as a YAML file holds them. Errors: ConfigError."""
    return _checked(parse_record(RunConfig, mapping=mapping), source="configuration")


def parse_record(record: type[Record], *, mapping: Mapping[str, Any]) -> Record:
    """The `record` in nested mappings, as a YAML file holds them. Errors: ConfigError."""
    return _parse(mapping, record=record, source="configuration")


def _parse(mapping: Mapping[str, Any], *, record: type[Record], source: str) -> Record:
    try:
        # Strict JSON mode: lists become tuples, but no text becomes a number and no boolean a count.
        text = json.dumps(_with_kinds(mapping, record=record), default=_plain)
        return record.model_validate_json(text, strict=True)
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"{source}: not plain data ({error}).") from error
    except ValidationError as error:
        lines = problems(error, record=record, data=json.loads(text))
        raise ConfigError(_together(lines, source=source)) from None


def _checked(config: RunConfig, *, source: str) -> RunConfig:
    found = check_config(config)
    if found:
        raise ConfigError(_together(found, source=source))
    return config


def _with_kinds(mapping: Mapping[str, Any], *, record: type[BaseModel]) -> Mapping[str, Any]:
    """A union of records is told apart by what is written: a teacher without a kind is an online one, and so on."""
    kinds: Mapping[str, str] = getattr(record, "default_kinds", {})
    named = {
        key: {"kind": kind, **mapping[key]} for key, kind in kinds.items() if isinstance(mapping.get(key), Mapping)
    }
    return {**mapping, **named}


def _together(lines: Sequence[str], *, source: str) -> str:
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return "\n  ".join([f"{source}: {len(lines)} problems", *lines])


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; numbers, text, lists and mappings are expected")


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML ({error.problem or error.context}).") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({_first_line(error)}).") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file; recipes/ holds those of the project.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({error.strerror or error}).") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not a list.")
    tree = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(tree, dict)
    return tree


def _resolve(tree: dict[Any, Any], *, source: str) -> dict[Any, Any]:
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{source}: {f'{key}: ' if key else ''}{_first_line(error)}") from error
    assert isinstance(resolved, dict)
    return resolved


def _apply(tree: dict[Any, Any], override: str, *, record: type[BaseModel]) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: must be key=value, for example train.max_steps=100.")
    here: Any = tree
    for depth, part in enumerate(parts[:-1]):
        child = _entry(here, part, override=override)
        known = ".".join(parts[: depth + 1])
        if child is None:
            child = {}
        elif isinstance(child, str) and SourceConfig in records_at(record, parts[: depth + 1]):
            child = {"path": child}
        elif not isinstance(child, dict | list):
            raise ConfigError(f"override {override!r}: {known} is {shown(child)}, which has no keys below it.")
        _store(here, part, child, override=override)
        here = child
    _store(here, parts[-1], _value(text, override=override), override=override)


def _value(text: str, *, override: str) -> Any:
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except yaml.YAMLError as error:
        # A plain word such as *.jsonl is no YAML, and needs none; broken brackets or quotes are a slip.
        if text[:1] not in ("[", "{", "'", '"'):
            return text
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({_first_line(error)}).") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from error
    tree = OmegaConf.to_container(parsed, resolve=False)
    assert isinstance(tree, dict)
    return tree["value"]


def _entry(container: Any, part: str, *, override: str) -> Any:
    if isinstance(container, list):
        return container[_index(container, part, override=override)]
    return container.get(part)


def _store(container: Any, part: str, value: Any, *, override: str) -> None:
    if isinstance(container, list):
        container[_index(container, part, override=override)] = value
    else:
        container[part] = value


def _index(container: list[Any], part: str, *, override: str) -> int:
    if not part.isdigit() or int(part) >= len(container):
        raise ConfigError(
            f"override {override!r}: {part!r} is not an index of a list with {len(container)} entries; "
            "write the whole list, for example a.b=[1, 2]."
        )
    return int(part)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
