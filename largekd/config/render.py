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
    before, after = dict(_leaves(config_to_mapping(old))), dict(_leaves(config_to_mapping(new)))
    return tuple(
        f"{key}: {_word(before.get(key, _ABSENT))} -> {_word(after.get(key, _ABSENT))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and not any(key == free or key.startswith(f"{free}.") for free in may_differ)
    )


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
