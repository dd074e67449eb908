"""What a phase is built from: its stage's checked sources and data, and what it takes over."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from largekd.config.checks import check_world
from largekd.config.placement import Placements, read_placements
from largekd.config.run import RunConfig
from largekd.distillation.cache_binding import check_teacher_data
from largekd.distillation.data import RunData, build_data
from largekd.distillation.groups import check_frozen, check_offload, check_parameters
from largekd.distillation.models import Sources, find_sources
from largekd.distillation.self_shared import check_shared, shared_objective
from largekd.distillation.teachers import TeacherModel
from largekd.engine.carried import Carried
from largekd.models.decoder import Decoder
from largekd.models.frozen_layers import FrozenLayers
from largekd.objectives.plugins import load_plugins
from largekd.objectives.terms import Objective, build_objective
from largekd.runtime.ranks import MainFirst, Ranks
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class Prepared:
    """What a stage is built from, checked and read before any weight is touched; `seed` is that of its draws."""

    config: RunConfig
    ranks: Ranks
    accumulation: int
    placements: Placements
    objective: Objective
    sources: Sources
    data: RunData
    seed: int


@dataclass(frozen=True)
class Inherited:
    """What a phase takes over from the one before: the student, what its weights carry, and a teacher that stays.

    gathered: within a stage, the states of `Parts.stateful` by name.
    """

    student: Decoder
    carried: Mapping[str, Carried]
    teacher: Teacher | None = None
    teacher_model: TeacherModel | None = None
    gathered: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Beginning:
    """How a phase begins.

    phase: its place in the run. frozen: the layers that do not learn in it. resumed: a checkpoint will be loaded into
    its parts, or an earlier phase of the stage has paired the layers. inherited: of the phase before; None: the run's
    first weights. updates: of a checkpoint, see Journal; with `inherited` they follow from that.
    """

    phase: int = 0
    frozen: FrozenLayers | None = None
    resumed: bool = False
    inherited: Inherited | None = None
    updates: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether nothing of this run has been built before."""
        return not self.resumed and self.inherited is None


def prepare(
    config: RunConfig,
    *,
    ranks: Ranks,
    folder: Path,
    control: dist.ProcessGroup | None = None,
    seed: int | None = None,
    begins: bool = True,
) -> Prepared:
    """Check a stage and read its data, cheapest first. A collective call; `control` is for what may take long.

    seed: decides the order of rows and all draws; None: train.seed. begins: no stage comes before.
    Errors: any LargeKDError; the message names the key to change.
    """
    accumulation = check_world(config, world_size=ranks.world_size)
    placements = read_placements(config)
    check_offload(config, placements=placements)
    objective = build_objective(config.objective, plugins=load_plugins(config.plugins), rollouts=config.rollouts)

    def first() -> MainFirst:
        return MainFirst(ranks=ranks, group=control)

    sources = find_sources(config, first=first, begins=begins)
    seed = config.train.seed if seed is None else seed
    check_parameters(config, model_config=sources.student_config)
    check_frozen(config, model_config=sources.student_config)
    if config.teacher.kind == "self_shared":
        check_shared(config, model_config=sources.student_config)
        objective = shared_objective(objective)
    data = build_data(config, sources=sources, ranks=ranks, folder=folder, first=first, row_seed=seed)
    check_teacher_data(config, sources=sources, samples=data.samples)
    return Prepared(config, ranks, accumulation, placements, objective, sources, data, seed)
