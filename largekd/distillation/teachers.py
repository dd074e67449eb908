"""Building the teacher that `teacher.kind` names; several of them one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import (
    BackboneTeacherConfig,
    CachedTeacherConfig,
    EMATeacherConfig,
    MixtureMemberConfig,
    MixtureTeacherConfig,
    OnlineTeacherConfig,
    RemoteTeacherConfig,
)
from largekd.distillation.cache_binding import open_cached_teacher
from largekd.distillation.models import Sources, build_average, build_teacher, member_key
from largekd.distillation.remote import Surroundings, build_remote
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
from largekd.teachers.average import ShardAverage
from largekd.teachers.backbone import BackboneTeacher
from largekd.teachers.ema import EMATeacher
from largekd.teachers.mixture import Member, MixtureTeacher
from largekd.teachers.online import OnlineTeacher
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's weights in this job, before its engine: alignment looks at them while the student is built.

    members: of several teachers those with weights in this job, by their place; the decoder and the placement are then
    those of the first teacher, None and empty where it has none.
    """

    decoder: Decoder | None
    ds_config: dict[str, Any]
    members: Mapping[int, "TeacherModel"] = field(default_factory=dict)


def build_teacher_model(
    config: RunConfig, *, sources: Sources, placements: Placements, ranks: Ranks
) -> TeacherModel | None:
    """The sharded teacher, or several, with its weights; None where none has any in this job. A collective call."""

    def placed(key: str) -> dict[str, Any]:
        placement = placements.teachers[f"{key}.deepspeed"]
        return frozen_ds_config(placement, train=config.train, world_size=ranks.world_size)

    def online(teacher: OnlineTeacherConfig, *, folder: ModelFolder, key: str) -> TeacherModel:
        ds_config, precision = placed(key), config.train.precision
        decoder = build_teacher(teacher, folder=folder, precision=precision, ds_config=ds_config, ranks=ranks, key=key)
        return TeacherModel(decoder, ds_config)

    match config.teacher:
        case OnlineTeacherConfig() as teacher:
            return online(teacher, folder=sources.teacher, key="teacher")
        case EMATeacherConfig():
            ds_config = placed("teacher")
            return TeacherModel(build_average(config, sources=sources, ds_config=ds_config, ranks=ranks), ds_config)
        case MixtureTeacherConfig(members=members):
            built = {
                index: online(member.teacher, folder=folder, key=member_key(index))
                for index, (member, folder) in enumerate(zip(members, sources.members, strict=True))
                if isinstance(member.teacher, OnlineTeacherConfig)
            }
            leading = built.get(0, TeacherModel(None, {}))
            return replace(leading, members=built) if built else None
    return None


def serve_teacher(
    config: RunConfig,
    *,
    model: TeacherModel | None,
    sources: Sources,
    ranks: Ranks,
    student: Decoder,
    around: Surroundings | None = None,
) -> Teacher:
    """The teacher, ready for its first signals. A collective call. Errors: LargeKDError."""

    online = partial(_online, sources=sources, ranks=ranks)

    def cached(teacher: CachedTeacherConfig, *, folder: ModelFolder, key: str) -> Teacher:
        shared = sources.shared_vocab_size
        return open_cached_teacher(teacher, model=folder, config=config, shared_ids=shared, ranks=ranks, key=key)

    def member(index: int, *, entry: MixtureMemberConfig) -> Member:
        if isinstance(entry.teacher, CachedTeacherConfig):
            teacher = cached(entry.teacher, folder=sources.members[index], key=member_key(index))
        else:
            assert model is not None
            teacher = online(model.members[index], gather_head=entry.teacher.gather_head)
        return Member(name=entry.name, weight=entry.weight, teacher=teacher)

    match config.teacher:
        case OnlineTeacherConfig(gather_head=gather_head):
            return online(model, gather_head=gather_head)
        case EMATeacherConfig() as ema:
            assert model is not None and model.decoder is not None
            average = ShardAverage(source=student.model, target=model.decoder.model, decay=ema.decay, warmup=ema.warmup)
            teacher = online(model, gather_head=ema.gather_head)
            return EMATeacher(online=teacher, average=average, model=model.decoder.model, ranks=ranks)
        case MixtureTeacherConfig() as mixture:
            members = [member(index, entry=entry) for index, entry in enumerate(mixture.members)]
            return MixtureTeacher(members, weighting=mixture.weighting, ranks=ranks, device=device(), taps_from=0)
        case BackboneTeacherConfig():
            return BackboneTeacher(student.model)
        case CachedTeacherConfig() as stored:
            return cached(stored, folder=sources.teacher, key="teacher")
        case RemoteTeacherConfig() as remote:
            return build_remote(remote, config=config, sources=sources, ranks=ranks, around=around or Surroundings())
    raise ConfigError(f"teacher.kind = {config.teacher.kind!r}: has no teacher of its own.")


def _online(own: TeacherModel | None, *, gather_head: str, sources: Sources, ranks: Ranks) -> OnlineTeacher:
    assert own is not None and own.decoder is not None
    return OnlineTeacher(
        engine=FrozenEngine(module=own.decoder, ds_config=own.ds_config),
        decoder=own.decoder,
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
    return {member_key(index): member.ds_config for index, member in model.members.items()}
