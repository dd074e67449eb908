"""Building the teacher that `teacher.kind` names; several of them one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import (
    CachedTeacherConfig,
    EMATeacherConfig,
    MixtureTeacherConfig,
    OnlineTeacherConfig,
    TeacherConfig,
)
from largekd.distillation.cache_binding import open_cached_teacher
from largekd.distillation.models import Sources, build_average, build_teacher, main_member, member_key
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
from largekd.teachers.average import ShardAverage
from largekd.teachers.ema import EMATeacher
from largekd.teachers.mixture import Member, MixtureTeacher
from largekd.teachers.online import OnlineTeacher
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's weights in this job, before its engine: alignment looks at them while the student is built.

    members: of several teachers each one's own, None where it has no weights here; the decoder and the placement then
    are those of one of them.
    """

    decoder: Decoder
    ds_config: dict[str, Any]
    members: tuple["TeacherModel | None", ...] = ()


def build_teacher_model(
    config: RunConfig, *, sources: Sources, placements: Placements, ranks: Ranks
) -> TeacherModel | None:
    """The sharded teacher, or several, with its weights; None where none has any in this job. A collective call."""
    if not isinstance(config.teacher, MixtureTeacherConfig):
        return _build_one(
            config,
            config.teacher,
            folder=sources.teacher,
            sources=sources,
            placements=placements,
            ranks=ranks,
            key="teacher",
        )
    members = tuple(
        _build_one(
            config,
            member.teacher,
            folder=sources.members[index],
            sources=sources,
            placements=placements,
            ranks=ranks,
            key=member_key(index),
        )
        for index, member in enumerate(config.teacher.members)
    )
    main = members[main_member(config.teacher.members)]
    return None if main is None else TeacherModel(main.decoder, main.ds_config, members)


def _build_one(
    config: RunConfig,
    teacher: TeacherConfig,
    *,
    folder: ModelFolder,
    sources: Sources,
    placements: Placements,
    ranks: Ranks,
    key: str,
) -> TeacherModel | None:
    """One teacher's weights; `key` is its place in the configuration."""
    if not isinstance(teacher, OnlineTeacherConfig | EMATeacherConfig):
        return None
    placement = placements.teachers[f"{key}.deepspeed"]
    ds_config = frozen_ds_config(placement, train=config.train, world_size=ranks.world_size)
    if isinstance(teacher, EMATeacherConfig):
        decoder = build_average(config, sources=sources, ds_config=ds_config, ranks=ranks)
        return TeacherModel(decoder=decoder, ds_config=ds_config)
    decoder = build_teacher(
        teacher, folder=folder, precision=config.train.precision, ds_config=ds_config, ranks=ranks, key=key
    )
    return TeacherModel(decoder=decoder, ds_config=ds_config)


def serve_teacher(
    config: RunConfig, *, model: TeacherModel | None, sources: Sources, ranks: Ranks, student: Decoder
) -> Teacher:
    """The teacher, ready for its first signals. A collective call. Errors: LargeKDError."""
    teacher = config.teacher
    if not isinstance(teacher, MixtureTeacherConfig):
        return _serve_one(teacher, config=config, model=model, sources=sources, ranks=ranks, student=student)
    models = (None,) * len(teacher.members) if model is None else model.members
    members = [
        Member(
            name=member.name,
            weight=member.weight,
            teacher=_serve_one(member.teacher, config=config, model=own, sources=sources, ranks=ranks, student=student),
        )
        for member, own in zip(teacher.members, models, strict=True)
    ]
    return MixtureTeacher(
        members,
        weighting=teacher.weighting,
        ranks=ranks,
        device=device(),
        taps_from=None if model is None else main_member(teacher.members),
    )


def _serve_one(
    teacher: TeacherConfig,
    *,
    config: RunConfig,
    model: TeacherModel | None,
    sources: Sources,
    ranks: Ranks,
    student: Decoder,
) -> Teacher:
    """One teacher of the configuration."""
    match teacher:
        case OnlineTeacherConfig() as online:
            assert model is not None
            return _online(model, gather_head=online.gather_head, sources=sources, ranks=ranks)
        case EMATeacherConfig() as ema:
            assert model is not None
            return EMATeacher(
                online=_online(model, gather_head=ema.gather_head, sources=sources, ranks=ranks),
                average=ShardAverage(
                    source=student.model, target=model.decoder.model, decay=ema.decay, warmup=ema.warmup
                ),
                model=model.decoder.model,
                ranks=ranks,
            )
        case CachedTeacherConfig() as cached:
            return open_cached_teacher(cached, config=config, sources=sources, ranks=ranks)
    raise ConfigError(f"teacher.kind = {teacher.kind!r}: cannot be built.")


def _online(model: TeacherModel, *, gather_head: str, sources: Sources, ranks: Ranks) -> OnlineTeacher:
    return OnlineTeacher(
        engine=FrozenEngine(module=model.decoder, ds_config=model.ds_config),
        decoder=model.decoder,
        gather_head_once=gather_head == "step",
        shared_ids=sources.shared_vocab_size,
        student_of_W=None if sources.student_of_teacher is None else sources.student_of_teacher.to(device()),
        rank=ranks.rank,
    )


def teacher_ds_configs(model: TeacherModel | None) -> Mapping[str, Any]:
    """What is written to deepspeed.json beside the student's."""
    if model is None:
        return {}
    if not model.members:
        return {"teacher": model.ds_config}
    return {member_key(index): member.ds_config for index, member in enumerate(model.members) if member is not None}
