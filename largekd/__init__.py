"""Distillation of large language models on DeepSpeed ZeRO-3."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largekd.config.run import RunConfig

__version__ = "0.1.0"


def distill(config: "RunConfig | Mapping[str, Any] | str | PurePath") -> dict[str, Any] | None:
    """Run one distillation from a configuration, a mapping of its keys, or the path of a YAML file.

    Every rank calls it, as `launch/train.py` does. Returns the run's summary, or None when it was stopped and saved.
    Errors: ConfigError before anything is loaded, and the other LargeKDErrors.
    """
    from largekd.config.load import load_config, parse_config

    if isinstance(config, str | PurePath):
        checked = load_config(config)
    elif isinstance(config, Mapping):
        checked = parse_config(config)
    else:
        # A record that was built or copied in Python has not met the rules that join several keys.
        checked = parse_config(config.model_dump(mode="json"))

    from largekd.distillation.run import distill as run

    return run(checked)
