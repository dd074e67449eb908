"""When each part of a run begins and ends, and which layers are frozen in it.

A stage without progressive freezing is one phase; with it, a stage is as many phases as `freezing.parts`. A phase is
one engine's life. Schedules, rows and the teacher belong to the stage and go on from one of its phases to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from largekd.config.freezing import FreezingConfig
from largekd.config.run import RunConfig
from largekd.config.staging import Stage
from largekd.contracts import Progress
from largekd.errors import CheckpointError, ConfigError
from largekd.models.frozen_layers import FrozenLayers


@dataclass(frozen=True)
class Phase:
    """One engine's life: the run's steps `first` to `end` - 1, in a stage of `stage_steps` from `stage_first` on."""

    index: int
    stage: Stage
    name: str
    first: int
    end: int
    stage_first: int
    stage_steps: int
    frozen: FrozenLayers | None = None

    @property
    def config(self) -> RunConfig:
        """The stage's whole configuration."""
        return self.stage.config

    @property
    def begins_stage(self) -> bool:
        """Whether no phase of the same stage comes before."""
        return self.first == self.stage_first

    @property
    def ends_stage(self) -> bool:
        """Whether no phase of the same stage follows."""
        return self.end == self.stage_first + self.stage_steps

    @property
    def keep_optimizer(self) -> bool:
        """Whether moments of the phase before are kept."""
        return not self.begins_stage or self.stage.keep_optimizer

    def enter(self, progress: Progress, *, total: int) -> Progress:
        """The progress with this phase's place in the run. The last phase of a run that was shortened may be over.

        Errors: CheckpointError for a step that is not in this phase.
        """
        is_over = self.end == total and progress.step > total
        if not (self.first <= progress.step <= self.end or is_over):
            raise CheckpointError(
                f"the checkpoint of step {progress.step} belongs to phase {self.index} ({self.name}), which now has "
                f"the steps {self.first} to {self.end}: a phase that is followed by another one may not change its "
                "length on resume. Restore train.max_steps, train.max_epochs and the stages, or set run.fresh=true."
            )
        return replace(
            progress,
            max_steps=total,
            phase=self.index,
            phase_end=self.end,
            stage=self.stage.index,
            stage_first=self.stage_first,
            stage_steps=self.stage_steps,
        )


def plan_phases(stages: Sequence[Stage], *, steps: Sequence[int], depth: int) -> tuple[Phase, ...]:
    """The phases of a run whose stages have these many steps, for a student of `depth` layers.

    Errors: ConfigError for more blocks than layers, or a phase without a step.
    """
    phases: list[Phase] = []
    first = 0
    for stage, count in zip(stages, steps, strict=True):
        freezing = stage.config.freezing
        bounds = [0, count] if freezing is None else _bounds(freezing, steps=count, stage=stage)
        for part, (begin, end) in enumerate(pairwise(bounds)):
            name = stage.name if freezing is None else f"{stage.name}, phase {part + 1} of {freezing.parts}"
            phases.append(
                Phase(
                    index=len(phases),
                    stage=stage,
                    name=name,
                    first=first + begin,
                    end=first + end,
                    stage_first=first,
                    stage_steps=count,
                    frozen=None if freezing is None else frozen_in(freezing, part=part, depth=depth),
                )
            )
        first += count
    return tuple(phases)


def frozen_in(freezing: FreezingConfig, *, part: int, depth: int) -> FrozenLayers:
    """What is frozen in phase `part`. Errors: ConfigError for more blocks than the student has layers."""
    parts = freezing.parts
    if parts > depth:
        raise ConfigError(f"freezing.parts = {parts}: the student has {depth} layers; choose at most as many parts.")
    blocks = [range(block * depth // parts, (block + 1) * depth // parts) for block in range(parts)]
    if freezing.order == "top_down":
        blocks.reverse()
    chosen = blocks[:part] if freezing.mode == "freeze" else blocks[part + 1 :]
    layers = tuple(sorted(layer for block in chosen for layer in block))
    return FrozenLayers(layers=layers, embeddings=freezing.embeddings and 0 in layers)


def describe_phases(phases: Sequence[Phase]) -> str:
    """A table of the phases for the log."""
    lines = ["stages:"]
    for phase in phases:
        frozen = "" if phase.frozen is None else f", {phase.frozen}"
        lines.append(f"  {phase.name}: steps {phase.first + 1} to {phase.end}{frozen}")
    return "\n".join(lines)


def _bounds(freezing: FreezingConfig, *, steps: int, stage: Stage) -> list[int]:
    shares = freezing.at or tuple(part / freezing.parts for part in range(1, freezing.parts))
    bounds = [0, *(round(share * steps) for share in shares), steps]
    if any(end <= begin for begin, end in pairwise(bounds)):
        raise ConfigError(
            f"freezing.parts = {freezing.parts}: {steps} steps ({stage.name}) leave a phase without a step; "
            "choose fewer parts, other freezing.at, or more steps."
        )
    return bounds
