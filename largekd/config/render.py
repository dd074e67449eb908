"""A configuration as plain data and as YAML, and what differs between two of them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel

from largekd.config.problems import shown
from largekd.config.run import RunConfig

# What a run may change when it is resumed: none of it alters the rows, the model or the optimizer's path.
MAY_DIFFER = (
    "run",
    "log",
    "checkpoint",
    "eval",
    "export",
    "cache",
    "train.collective_timeout_s",
    "data.num_proc",
    "teacher.gather_head",
)

_INTERPOLATION = re.compile(r"(\\*)\$\{")
_ABSENT = object()


def config_to_mapping(config: BaseModel) -> dict[str, Any]:
    """The configuration as nested dicts, lists, numbers and text, every default included."""
    return config.model_dump(mode="json")


def render_config(config: BaseModel) -> str:
    """The resolved configuration as YAML; loading it gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(config_to_mapping(config))))


def config_differences(old: RunConfig, new: RunConfig, *, may_differ: Sequence[str] = MAY_DIFFER) -> tuple[str, ...]:
    """`key: old -> new` for every key whose values differ, except the keys in `may_differ` and all below them."""
    return tuple(
        f"{key}: {_word(before)} -> {_word(after)}"
        for key, before, after in _unlike(config_to_mapping(old), config_to_mapping(new))
        if not any(key == free or key.startswith(f"{free}.") for free in may_differ)
    )


def _unlike(old: dict[str, Any], new: dict[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key and both values where they differ; equally long lists of records are compared entry by entry."""
    before, after = dict(_leaves(old, prefix=prefix)), dict(_leaves(new, prefix=prefix))
    for key in dict.fromkeys([*before, *after]):
        mine, theirs = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if mine == theirs:
            continue
        if _records(mine) and _records(theirs) and len(mine) == len(theirs):
            for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
                yield from _unlike(left, right, prefix=f"{key}.{index}.")
        else:
            yield key, mine, theirs


def _records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _leaves(mapping: dict[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from _leaves(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(value: Any) -> str:
    return "not set" if value is _ABSENT else shown(value)


def _escaped(value: Any) -> Any:
    """Text that looks like an interpolation is kept as text: each backslash before it doubles, and one is added."""
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda match: match.group(1) * 2 + r"\${", value)
    return value
