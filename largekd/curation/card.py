"""The data set's card: where it comes from, how it was made, what is in it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

CARD_FILE = "README.md"
_NOT_GIVEN = "not given"
# Keys of the job's configuration that tell nothing of what was written; the curation's have a block of their own.
_NOT_OF_THE_TEXTS = ("output", "log", "curation", "collective_timeout_s")


@dataclass(frozen=True)
class Split:
    """A split's file."""

    name: str
    file: str
    records: int
    sha256: str


def write_card(
    folder: Path,
    *,
    title: str,
    splits: Sequence[Split],
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    job: Mapping[str, Any] | None,
) -> None:
    """Writes README.md, whose head tells `datasets.load_dataset` which file is which split.

    Args: job: `config` and `identity` of the generation, None where it is not known.
    """
    if job is not None:
        config = {name: value for name, value in job.get("config", {}).items() if name not in _NOT_OF_THE_TEXTS}
        job = {**job, "config": config}
    environment = Environment(
        loader=PackageLoader("largekd.curation"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    page = environment.get_template("card.md.jinja").render(
        title=title,
        splits=splits,
        summary=summary,
        licences={"rows": _licence(job, "source"), "model": _licence(job, "backend")},
        job=None if job is None else _block(job),
        settings=_block(settings),
    )
    (folder / CARD_FILE).write_bytes(page.encode("utf-8", errors="replace"))


def _licence(job: Mapping[str, Any] | None, part: str) -> str:
    found = (job or {}).get("config", {}).get(part)
    return str(found.get("licence") or _NOT_GIVEN) if isinstance(found, Mapping) else _NOT_GIVEN


def _block(value: Mapping[str, Any]) -> str:
    """JSON that cannot end a fenced block."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).replace("```", "``\\u0060")


def _cell(text: object) -> str:
    """Text that cannot end a cell or begin markup."""
    return re.sub(r"([|<>`\\\[\]])", r"\\\1", " ".join(str(text).split()))
