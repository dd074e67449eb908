"""The run folder: what an earlier start left in it, and the files that describe this one."""

import logging
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from largekd.config.load import load_config
from largekd.config.problems import shown
from largekd.config.render import MAY_DIFFER, config_differences, render_config
from largekd.config.run import RunConfig
from largekd.config.staging import stages_of
from largekd.errors import ConfigError, LargeKDError
from largekd.monitoring.summary import SUMMARY_FILE
from largekd.planner.report import plan_record
from largekd.runtime.files import atomic_write, read_json, write_json
from largekd.runtime.ranks import Ranks, broadcast_object, raise_together
from largekd.sharding.accelerator import device

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
DONE_FILE = "DONE"
CHECKPOINT_FOLDER = "checkpoints"
_PACKAGES = ("largekd", "torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors")
# Longer or shorter runs of the same recipe are a wish, not a mistake; the learning-rate schedule follows the new end.
_LENGTH = ("train.max_steps", "train.max_epochs")


def open_folder(folder: Path, *, config: RunConfig, ranks: Ranks) -> dict[str, Any] | None:
    """Make the folder this run's; the summary when it holds the finished run already, else None. A collective call.

    An earlier run is moved aside if `run.fresh` asks for it; otherwise it must be the same run. A finished run is only
    looked at; one that goes on loses its marker first, so that nobody takes it for a whole one.
    Errors: ConfigError naming every key that differs from the run that the folder holds, or what cannot be written.
    """
    error: Exception | None = None
    summary = None
    if ranks.is_main:
        try:
            summary = _open(folder, config=config, ranks=ranks)
        except LargeKDError as raised:
            error = raised
        except OSError as raised:
            error = ConfigError(f"run.dir={folder}: cannot be written ({raised}); choose another run.dir.")
    raise_together(error)
    return broadcast_object(summary)


def _open(folder: Path, *, config: RunConfig, ranks: Ranks) -> dict[str, Any] | None:
    if config.run.fresh:
        move_aside(folder, key="run.fresh")
    _check_same_run(folder, config=config)
    summary = _finished(folder, config=config)
    if summary is None:
        for name in (DONE_FILE, SUMMARY_FILE):
            (folder / name).unlink(missing_ok=True)
        atomic_write(folder / CONFIG_FILE, data=render_config(config).encode())
        write_json(folder / "environment.json", value=_environment(ranks))
        write_json(folder / "plan.json", value=plan_record(config, world_size=ranks.world_size))
    return summary


def _finished(folder: Path, *, config: RunConfig) -> dict[str, Any] | None:
    if not (folder / DONE_FILE).is_file() or not (folder / SUMMARY_FILE).is_file():
        return None
    return read_json(folder / SUMMARY_FILE) if read_json(folder / DONE_FILE)["length"] == _length(config) else None


def mark_done(folder: Path, *, step: int, config: RunConfig, ranks: Ranks) -> None:
    """Write the marker of a finished run, last of all."""
    if ranks.is_main:
        write_json(folder / DONE_FILE, value={"step": step, "length": _length(config)})


def _length(config: RunConfig) -> dict[str, Any]:
    length: dict[str, Any] = {"max_steps": config.train.max_steps, "max_epochs": config.train.max_epochs}
    if config.stages:
        length["stages"] = [[stage.steps, stage.tokens, stage.epochs] for stage in config.stages]
    return length


def move_aside(folder: Path, *, key: str) -> None:
    """Leave the folder empty: what it holds goes to a new folder next to it. `key` asked for it."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".lock")]
    if not entries:
        return
    aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for entry in entries:
        shutil.move(entry, aside / entry.name)
    logger.warning("%s: what was there was moved to %s", key, aside)


def _check_same_run(folder: Path, *, config: RunConfig) -> None:
    path = folder / CONFIG_FILE
    # A start that got no further than a mistake in its configuration left nothing that could be mixed up.
    has_results = (folder / DONE_FILE).exists() or any((folder / CHECKPOINT_FOLDER).glob("step_*"))
    if not path.is_file() or not has_results:
        return
    try:
        earlier = load_config(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path} is not a configuration that this version reads ({error}). "
            "Choose another run.dir, or run.fresh=true to move that run aside."
        ) from error
    differences = _differences(earlier, config)
    if differences:
        listed = "\n  ".join(differences)
        raise ConfigError(
            f"run.dir = {str(folder)!r} holds a run with another configuration (old -> new):\n  {listed}\n"
            "Restore these keys to go on with it, choose another run.dir, or run.fresh=true to move it aside."
        )
    if _length(earlier) != _length(config):
        logger.warning("the run's length changed: the learning-rate schedule now ends at the new last step")


def _differences(earlier: RunConfig, config: RunConfig) -> list[str]:
    """What keeps a run from going on with another configuration: of stages, what differs once they are merged."""
    before, after = stages_of(earlier), stages_of(config)
    names = [stage.name for stage in before], [stage.name for stage in after]
    if names[0] != names[1]:
        return [f"stages: {', '.join(names[0])} -> {', '.join(names[1])}"]
    found: dict[str, list[str]] = {}
    for old, new in zip(before, after, strict=True):
        # Only what comes last can become longer or shorter: all the rest has its place in the run.
        free = (*MAY_DIFFER, *_LENGTH) if new is after[-1] else MAY_DIFFER
        lines = [*config_differences(old.config, new.config, may_differ=free)]
        if old.keep_optimizer != new.keep_optimizer:
            lines.append(f"keep_optimizer: {shown(old.keep_optimizer)} -> {shown(new.keep_optimizer)}")
        for line in lines:
            found.setdefault(line, []).append(new.name)
    return [line if len(where) == len(after) else f"stage {', '.join(where)}: {line}" for line, where in found.items()]


def _environment(ranks: Ranks) -> dict[str, Any]:
    return {
        "ranks": ranks.world_size,
        "device": str(device()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch": {"num_threads": torch.get_num_threads(), "cuda": torch.version.cuda},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
