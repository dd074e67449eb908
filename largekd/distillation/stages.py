"""From one stage to the next: what is prepared before the run, and the change of engines between two phases."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from largekd.config.freezing_checks import check_switchable
from largekd.config.run import RunConfig
from largekd.config.staging import Stage, keeps_teacher, stages_of
from largekd.distillation.builder import Parts
from largekd.distillation.groups import check_phases
from largekd.distillation.phases import Phase, describe_phases, plan_phases
from largekd.distillation.prepared import Inherited, Prepared, prepare
from largekd.distillation.succession import check_succession
from largekd.engine.carried import release, take
from largekd.errors import CheckpointError, ConfigError
from largekd.runtime.ranks import Ranks, Together

logger = logging.getLogger(__name__)

STAGES_FOLDER = "stages"
_SEED_STRIDE = 0x9E3779B1


def prepare_stages(
    config: RunConfig, *, ranks: Ranks, folder: Path, control: dist.ProcessGroup | None
) -> tuple[tuple[Phase, ...], list[Prepared]]:
    """The phases of a run, and by stage what they are built from: all data are read and all models found by now.

    A collective call. Errors: any LargeKDError of any stage.
    """
    stages = stages_of(config)
    prepared = []
    for stage in stages:
        own = stage_folder(folder, stage=stage, config=config)
        with Together(group=control):
            if ranks.is_main:
                own.mkdir(parents=True, exist_ok=True)
        if ranks.is_main and len(stages) > 1:
            logger.info("stage %s: reading its data", stage.name)
        seed = row_seed(stage)
        begins = stage.index == 0
        prepared.append(prepare(stage.config, ranks=ranks, folder=own, control=control, seed=seed, begins=begins))
        check_succession(prepared[-1].sources, first=prepared[0].sources, stage=stage)
    depth = prepared[0].sources.student_config.num_hidden_layers
    phases = plan_phases(stages, steps=[made.data.loader.total_steps() for made in prepared], depth=depth)
    if len(phases) > 1:
        check_phases(phases, model_config=prepared[0].sources.student_config)
        reason = check_switchable(prepared[0].placements.student)
        if reason is not None:
            raise ConfigError(f"student.deepspeed = {config.student.deepspeed!r}: {reason}.")
        if ranks.is_main:
            logger.info("%s", describe_phases(phases))
    return phases, prepared


def stage_folder(folder: Path, *, stage: Stage, config: RunConfig) -> Path:
    """Where a stage's own files are: the run folder itself unless the run has stages."""
    return folder / STAGES_FOLDER / f"{stage.index:02d}_{stage.name}" if config.stages else folder


def row_seed(stage: Stage) -> int:
    """The seed of the stage's rows and draws: the run's own in the first stage, another one in each that follows."""
    return (stage.config.train.seed + stage.index * _SEED_STRIDE) % 2**32


def hand_over(parts: Parts, *, to: Phase) -> Inherited:
    """End a phase and take from it what the next one inherits. A collective call.

    Within a stage the teacher, and what was gathered about tokens, experts and rollouts, go on. Into another stage the
    teacher goes on where that has the same one; otherwise it is closed.
    """
    students = {id(parameter) for parameter in parts.student.parameters()}
    # A student's weight that did not learn is in the student already.
    named = [(n, p) for n, p in parts.named_trainables() if p.requires_grad or id(p) not in students]
    carried = take(named, moments=to.keep_optimizer)
    module = parts.engine.module
    kept = not to.begins_stage or keeps_teacher(parts.config, to.config)
    gathered = {} if to.begins_stage else {name: owner.state() for name, owner in parts.stateful.items()}
    parts.leave()
    if not kept:
        parts.teacher.close()
    release(module)
    return Inherited(
        student=parts.student,
        carried=carried,
        teacher=parts.teacher if kept else None,
        teacher_model=parts.teacher_model if kept else None,
        gathered=gathered,
    )


def phase_of(phases: Sequence[Phase], *, index: int, checkpoint: Path | None) -> Phase:
    """The phase that a run goes on with. Errors: CheckpointError where the run no longer has the checkpoint's."""
    if index >= len(phases):
        raise CheckpointError(f"{checkpoint} is of phase {index + 1}, and the run now has {len(phases)} of them.")
    return phases[index]
