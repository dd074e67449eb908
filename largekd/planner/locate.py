"""Finding a model's config.json on this machine, without a network and without the hub's library."""

import json
import os
from pathlib import Path
from typing import Any

from largekd.planner.errors import PlanUnavailableError


def read_model_config(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder, a .json file, or a hub model that is in the local cache.

    Errors: PlanUnavailableError with the command that fetches the model.
    """
    path = find_model_config(name, revision=revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanUnavailableError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise PlanUnavailableError(f"{path} is not a JSON object")
    return config


def find_model_config(name: str, *, revision: str | None = None) -> Path:
    """Where that config.json is; a model's other files stand beside it. Errors: as `read_model_config`."""
    path = _find(name, revision=revision)
    if path is None:
        raise PlanUnavailableError(_remedy(name))
    return path


def _find(name: str, *, revision: str | None) -> Path | None:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if not _is_hub_name(name):
        return None
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else wanted
    cached = repository / "snapshots" / commit / "config.json"
    return cached if cached.is_file() else None


def _hub_cache() -> Path:
    """Where huggingface_hub keeps its downloads (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, ~/.cache)."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def _is_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~", "assets/")) and name.count("/") <= 1


def _remedy(name: str) -> str:
    if name.startswith("assets/"):
        return f"{name} not fetched, run `python tools/fetch_assets.py {Path(name).name}`"
    if _is_hub_name(name):
        return f"{name} not fetched, run `hf download {name}`"
    return f"{name} is not a folder with a config.json"
