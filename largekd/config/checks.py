"""Rules that join several keys of a run configuration."""

import re
from collections.abc import Iterator

from largekd.config.design_checks import check_design
from largekd.config.freezing_checks import check_freezing
from largekd.config.group_checks import check_groups
from largekd.config.initialise_checks import check_initialisation
from largekd.config.lora_checks import check_lora
from largekd.config.objective_checks import check_objective
from largekd.config.remote_checks import check_remote
from largekd.config.rollout_checks import check_rollouts
from largekd.config.router_checks import check_router
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes
from largekd.config.teacher import CachedTeacherConfig, EMATeacherConfig, MixtureTeacherConfig
from largekd.config.teacher_checks import check_mixture
from largekd.errors import ConfigError


def check_config(config: RunConfig, *, begins: bool = True) -> list[str]:
    """The rules that the values break together, one line each; empty when the run can be built.

    begins: not a stage to which another one hands its student.
    """
    return [
        *_train(config),
        *check_mixture(config),
        *_student(config, begins=begins),
        *check_design(config),
        *check_initialisation(config, begins=begins),
        *_average(config),
        *_self_shared(config),
        *_depth(config),
        *_objective(config),
        *check_router(config),
        *_optim(config),
        *_data(config),
        *check_rollouts(config),
        *check_lora(config),
        *check_remote(config.teacher),
        *check_freezing(config),
    ]


def check_world(config: RunConfig, *, world_size: int) -> int:
    """Micro-batches per optimizer step: global_batch_size / (ranks * micro_batch_size).

    Errors: ConfigError when it does not come out whole.
    """
    train = config.train
    rows = world_size * train.micro_batch_size
    if train.global_batch_size % rows:
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise ConfigError(
            f"train.global_batch_size = {train.global_batch_size}: must be a multiple of {ranks} x "
            f"train.micro_batch_size = {train.micro_batch_size}, that is of {rows}. "
            "Change either key or the number of ranks."
        )
    return train.global_batch_size // rows


def _train(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.max_steps is None and train.max_epochs is None and not config.stages:
        yield "train.max_steps: set it or train.max_epochs, otherwise the run has no end"


def _student(config: RunConfig, *, begins: bool) -> Iterator[str]:
    student, averaged = config.student, isinstance(config.teacher, EMATeacherConfig)
    shapes = (student.model, student.config, student.teacher_layers, student.design)
    if all(shape is None for shape in shapes) and not averaged:
        yield (
            "student.model: set it, or student.config, student.teacher_layers or student.design, otherwise there is "
            "no student"
        )
    teacher, key = (config.teacher, "teacher")
    if isinstance(teacher, MixtureTeacherConfig):
        teacher, key = teacher.members[0].teacher, "teacher.members.0.teacher"
    weightless = isinstance(teacher, CachedTeacherConfig) and teacher.model is None
    if begins and weightless and student.teacher_layers is not None:
        yield f"student.teacher_layers: a cache has no weights; set {key}.model to the teacher that was cached"
    if student.layers is not None and student.model is None:
        yield "student.layers: it names layers of student.model; set that, or student.teacher_layers"
    for key, layers in (("student.teacher_layers", student.teacher_layers), ("student.layers", student.layers)):
        if layers is not None and not layers:
            yield f"{key} = []: name at least one layer"
        if layers and min(layers) < 0:
            yield f"{key}: {min(layers)} is not a layer; the first one is 0"


def _average(config: RunConfig) -> Iterator[str]:
    """Rules of a teacher that is the average of the student's own weights."""
    if not isinstance(config.teacher, EMATeacherConfig):
        if config.export.weights == "teacher_average":
            yield "export.weights = 'teacher_average': only teacher.kind = 'ema' has one; it must be student"
        return
    student, kind = config.student, "teacher.kind = 'ema'"
    if student.model is None:
        yield f"student.model: {kind} averages a student that has weights and a tokenizer; name its folder there"
    for key in ("config", "teacher_layers"):
        if getattr(student, key) is not None:
            yield f"student.{key}: {kind} has no other model that it could come from; remove it"
    if config.objective.translation is not None:
        yield f"objective.translation: {kind} has the student's own tokenizer; remove it"


def _self_shared(config: RunConfig) -> Iterator[str]:
    teacher, student = config.teacher, config.student
    if teacher.kind != "self_shared":
        return
    if student.model is None:
        yield "student.model: teacher.kind = 'self_shared' needs it: it names the backbone of both models"
    try:
        re.compile(teacher.adapters.pattern)
    except re.error as error:
        yield f"teacher.adapters.pattern = {teacher.adapters.pattern!r}: not a regular expression ({error})"
    adapters, pruning = teacher.adapters, teacher.pruning
    if adapters.max_rank is not None and adapters.max_rank < adapters.rank:
        yield f"teacher.adapters.max_rank = {adapters.max_rank}: must be at least the rank, {adapters.rank}"
    if pruning.end_frac <= pruning.begin_frac:
        yield (
            f"teacher.pruning.end_frac = {pruning.end_frac}: must be greater than teacher.pruning.begin_frac = "
            f"{pruning.begin_frac}"
        )


def _depth(config: RunConfig) -> Iterator[str]:
    """Rules of leaving layers out."""
    if config.student.layer_drop is not None:
        low, high = extremes(config.student.layer_drop.rate)
        if low < 0 or high >= 1:
            yield f"student.layer_drop.rate: goes from {low:g} to {high:g}; it must be at least 0 and less than 1"
        if config.objective.router is not None:
            yield "student.layer_drop: a layer that is left out has no router to balance; remove objective.router"
    if config.export.depth is not None and config.export.adapter:
        yield "export.depth: an adapter fits its whole base alone; remove export.depth or export.adapter"
    if config.teacher.kind == "self_shared":
        for key, value in (
            ("student.layer_drop", config.student.layer_drop),
            ("eval.depths", config.eval.depths or None),
            ("export.depth", config.export.depth),
        ):
            if value is not None:
                yield f"{key}: teacher.kind = 'self_shared' chooses by pruning which layers go; remove it"


def _objective(config: RunConfig) -> Iterator[str]:
    shared = config.teacher.kind == "self_shared"
    yield from check_objective(config.objective, student=config.student, plugins=config.plugins, self_shared=shared)
    for index, plugin in enumerate(config.plugins):
        if not plugin.strip():
            yield f"plugins.{index} = {plugin!r}: must be a module's dotted name or the path of a .py file"
        elif plugin in config.plugins[:index]:
            yield f"plugins.{index} = {plugin!r}: is named twice"


def _optim(config: RunConfig) -> Iterator[str]:
    optim, max_steps = config.optim, config.train.max_steps
    if max_steps is not None and optim.warmup_steps >= max_steps:
        yield f"optim.warmup_steps = {optim.warmup_steps}: must be less than train.max_steps = {max_steps}"
    yield from check_groups(optim)


def _data(config: RunConfig) -> Iterator[str]:
    if config.data.eval is None and config.eval.every_steps:
        yield f"eval.every_steps = {config.eval.every_steps}: there is nothing to evaluate on; set data.eval"
