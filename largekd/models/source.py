"""Finding a model: a Hugging Face folder, or a hub name that is fetched once per host."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from largekd.errors import ConfigError

# Configuration and tokenizer; Python files come only where the user trusts them.
_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this host's disk and how it may be opened."""

    path: Path
    config: PretrainedConfig
    trust_remote_code: bool


def find_model(
    name: str,
    *,
    key: str,
    revision: str | None,
    trust_remote_code: bool,
    first: Callable[[], AbstractContextManager[None]],
    weights: bool = True,
) -> ModelFolder:
    """The folder and configuration of `name`; `key` is the configuration key that named it, for messages.

    `first` lets one rank of each host run ahead, so that a hub model is fetched once per host; without `weights` its
    configuration and tokenizer alone are fetched.
    Errors: ConfigError when it cannot be had or cannot be read.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _fetch(
            name, key=key, revision=revision, trust_remote_code=trust_remote_code, first=first, weights=weights
        )
    return ModelFolder(
        path=path,
        config=read_config(path, key=key, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
    )


def read_config(path: Path, *, key: str, trust_remote_code: bool) -> PretrainedConfig:
    """The Hugging Face configuration in a folder or a JSON file. Errors: ConfigError."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = " Set trust_remote_code only if you trust that code." if "trust_remote_code" in str(error) else ""
        raise ConfigError(f"{key} = {str(path)!r}: no usable config.json there ({reason}).{hint}") from error


def _fetch(
    name: str,
    *,
    key: str,
    revision: str | None,
    trust_remote_code: bool,
    first: Callable[[], AbstractContextManager[None]],
    weights: bool,
) -> Path:
    if not _HUB_NAME.match(name) or name.startswith((".", "assets/")):
        hint = f" `python tools/fetch_assets.py {Path(name).name}` may bring it." if name.startswith("assets/") else ""
        raise ConfigError(f"{key} = {name!r}: no such folder, and not a hub name (owner/model).{hint}")
    if trust_remote_code and revision is None:
        place = key.rpartition(".")[0]
        raise ConfigError(
            f"{place}.trust_remote_code = true for the hub model {name!r} needs {place}.revision: without it, "
            "code that nobody has looked at could run tomorrow. Give the commit that you trust."
        )
    patterns = [*_PATTERNS, *(_WEIGHT_PATTERNS if weights else ()), *(["*.py"] if trust_remote_code else ())]
    try:
        with first():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{key} = {name!r}: no such folder, and the hub did not give it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Check the name, or fetch it first with `hf download {name}`."
        ) from error
