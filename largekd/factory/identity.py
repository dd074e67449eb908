"""What makes a job the same job: a folder holds answers of one writer, one set of prompts and one way of drawing."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from largekd.config.generate import GenerateConfig, RowSourceConfig, SeedSourceConfig
from largekd.config.render import config_to_mapping
from largekd.errors import ConfigError, DataError
from largekd.factory.asks import Asker
from largekd.factory.prompts import load_prompter
from largekd.runtime.files import read_json, write_json

JOB_FILE = "job.json"
FORMAT = 1
# What may change: more samples, rows, topics or templates make further asks and leave the others as they are.
_FREE_SAMPLING = {"samples"}
_FREE_PROMPTS = {"templates", "few_shot"}
_COLUMNS = {"question", "answer", "tests", "id"}
_FREE_SOURCE = {"topics", "tasks", "personas", "per_combination", "rows", "rounds", "path", "licence"}
# Decides no text, only which prompts fail.
_FREE_KEYS = {"sampling.max_prompt_tokens"}


def identity_of(config: GenerateConfig, *, asker: Asker, writer: Mapping[str, Any]) -> dict[str, Any]:
    """JSON: everything that decides an answer, beside the row itself. Errors: ConfigError, DataError."""
    source = config.source.model_dump(mode="json")
    # Each prompt shows some of them.
    seeds = {}
    if isinstance(config.source, SeedSourceConfig):
        seeds["seeds"] = _file_digest(config.source.path, key="source.path")
    if isinstance(config.source, RowSourceConfig):
        source = {name: source[name] for name in ("kind", *sorted(_COLUMNS))}
    else:
        source = {name: value for name, value in source.items() if name not in _FREE_SOURCE}
    return {
        "format": FORMAT,
        "writer": dict(writer),
        "source": source,
        "prompts": config.prompts.model_dump(mode="json", exclude=_FREE_PROMPTS),
        "templates": {**asker.digests(), **_source_template(config)},
        "few_shot": _file_digest(config.prompts.few_shot, key="prompts.few_shot"),
        **seeds,
        "sampling": config.sampling.model_dump(mode="json", exclude=_FREE_SAMPLING),
    }


def claim(folder: Path, *, config: GenerateConfig, identity: Mapping[str, Any]) -> None:
    """Make the folder this job's. Errors: ConfigError naming what differs from the job that it holds."""
    path = folder / JOB_FILE
    if path.is_file():
        try:
            earlier = read_json(path)["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); choose another output.dir.") from error
        found = list(differences(earlier, identity))
        if found:
            raise ConfigError(
                f"output.dir = {str(folder)!r} holds answers of another job (old -> new):\n  "
                + "\n  ".join(found)
                + "\nRestore these to go on with it, choose another output.dir, or output.fresh=true to move it aside."
            )
    write_json(path, value={"identity": dict(identity), "config": config_to_mapping(config)})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """`key: old -> new` for what may not differ. A template that is new, or is used no more, is no difference."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in dict.fromkeys([*before, *after]):
        one_has_it = (key in before) != (key in after)
        if key in _FREE_KEYS or (key.startswith("templates.") and one_has_it):
            continue
        if before.get(key) != after.get(key):
            yield f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"


def _leaves(mapping: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _source_template(config: GenerateConfig) -> dict[str, str]:
    if isinstance(config.source, RowSourceConfig):
        return {}
    return {"source.template": load_prompter(config.source.template, key="source.template").digest}


def _file_digest(name: str | None, *, key: str) -> str | None:
    if name is None:
        return None
    try:
        return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{key} = {name!r}: cannot be read ({error}).") from error
