"""Building the teacher that `teacher.kind` names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import CachedTeacherConfig, EMATeacherConfig, OnlineTeacherConfig
from largekd.distillation.cache_binding import open_cached_teacher
from largekd.distillation.models import Sources, build_average, build_teacher
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
from largekd.teachers.average import ShardAverage
from largekd.teachers.ema import EMATeacher
from largekd.teachers.online import OnlineTeacher
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's weights in this job, before its engine: alignment looks at them while the student is built."""

    decoder: Decoder
    ds_config: dict[str, Any]


def build_teacher_model(
    config: RunConfig, *, sources: Sources, placements: Placements, ranks: Ranks
) -> TeacherModel | None:
    """The sharded teacher with its weights; None where it has none in this job. A collective call."""
    if not isinstance(config.teacher, OnlineTeacherConfig | EMATeacherConfig):
        return None
    assert placements.teacher is not None
    ds_config = frozen_ds_config(placements.teacher, train=config.train, world_size=ranks.world_size)
    if isinstance(config.teacher, EMATeacherConfig):
        decoder = build_average(config, sources=sources, ds_config=ds_config, ranks=ranks)
        return TeacherModel(decoder=decoder, ds_config=ds_config)
    decoder = build_teacher(
        config.teacher,
        folder=sources.teacher,
        precision=config.train.precision,
        ds_config=ds_config,
        ranks=ranks,
        key="teacher",
    )
    return TeacherModel(decoder=decoder, ds_config=ds_config)


def serve_teacher(
    config: RunConfig, *, model: TeacherModel | None, sources: Sources, ranks: Ranks, student: Decoder
) -> Teacher:
    """The teacher, ready for its first signals. A collective call. Errors: LargeKDError."""
    match config.teacher:
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
    raise ConfigError(f"teacher.kind = {config.teacher.kind!r}: cannot be built.")


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
    return {} if model is None else {"teacher": model.ds_config}
