"""Stages: parts of a run, each with its own engine."""

from typing import Any

from pydantic import Field

from largekd.config.common import Frozen


class StageConfig(Frozen):
    """One stage: how long, and which keys of the run differ in it."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name in logs and folders.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps of the stage.")
    tokens: int | None = Field(None, ge=1, description="Or positions: steps = ceil(tokens / positions of a step).")
    epochs: int | None = Field(None, ge=1, description="Or passes over the stage's data.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the run that differ, nested or dotted; lists, other kinds and curves of another shape "
        "replace, the rest merges.",
    )
    keep_optimizer: bool = Field(
        False, description="Keep the moments of parameters that were trained in the stage before."
    )
