"""Building the teacher that `teacher.kind` names; several of them one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import MixtureTeacherConfig, OnlineTeacherConfig, TeacherConfig
from largekd.distillation.models import Sources, build_teacher, main_member, member_key
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
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
            config, config.teacher, folder=sources.teacher, placements=placements, ranks=ranks, key="teacher"
        )
    members = tuple(
        _build_one(
            config,
            member.teacher,
            folder=sources.members[index],
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
    placements: Placements,
    ranks: Ranks,
    key: str,
) -> TeacherModel | None:
    """One teacher's weights; `key` is its place in the configuration."""
    if not isinstance(teacher, OnlineTeacherConfig):
        return None
    placement = placements.teachers[f"{key}.deepspeed"]
    ds_config = frozen_ds_config(placement, train=config.train, world_size=ranks.world_size)
    decoder = build_teacher(
        teacher, folder=folder, precision=config.train.precision, ds_config=ds_config, ranks=ranks, key=key
    )
    return TeacherModel(decoder=decoder, ds_config=ds_config)


def serve_teacher(config: RunConfig, *, model: TeacherModel | None, sources: Sources, ranks: Ranks) -> Teacher:
    """The teacher, ready for its first signals. A collective call. Errors: LargeKDError."""
    teacher = config.teacher
    if not isinstance(teacher, MixtureTeacherConfig):
        return _serve_one(teacher, model=model, sources=sources, ranks=ranks, key="teacher")
    models = (None,) * len(teacher.members) if model is None else model.members
    members = [
        Member(
            name=member.name,
            weight=member.weight,
            teacher=_serve_one(member.teacher, model=own, sources=sources, ranks=ranks, key=member_key(index)),
        )
        for index, (member, own) in enumerate(zip(teacher.members, models, strict=True))
    ]
    return MixtureTeacher(
        members,
        weighting=teacher.weighting,
        ranks=ranks,
        device=device(),
        taps_from=None if model is None else main_member(teacher.members),
    )


def _serve_one(
    teacher: TeacherConfig, *, model: TeacherModel | None, sources: Sources, ranks: Ranks, key: str
) -> Teacher:
    """One teacher; `key` is its place in the configuration."""
    match teacher:
        case OnlineTeacherConfig() as online:
            assert model is not None
            return OnlineTeacher(
                engine=FrozenEngine(module=model.decoder, ds_config=model.ds_config),
                decoder=model.decoder,
                gather_head_once=online.gather_head == "step",
                shared_ids=sources.shared_vocab_size,
                student_of_W=None if sources.student_of_teacher is None else sources.student_of_teacher.to(device()),
                rank=ranks.rank,
            )
    raise ConfigError(f"{key}.kind = {teacher.kind!r}: cannot be built.")


def teacher_ds_configs(model: TeacherModel | None) -> Mapping[str, Any]:
    """What is written to deepspeed.json beside the student's."""
    if model is None:
        return {}
    if not model.members:
        return {"teacher": model.ds_config}
    return {member_key(index): member.ds_config for index, member in enumerate(model.members) if member is not None}
