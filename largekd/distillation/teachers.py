"""Building the teacher that `teacher.kind` names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import OnlineTeacherConfig, RemoteTeacherConfig
from largekd.distillation.models import Sources, build_teacher
from largekd.distillation.remote import Surroundings, build_remote
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks
from largekd.sharding.accelerator import device
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
    if not isinstance(config.teacher, OnlineTeacherConfig):
        return None
    assert placements.teacher is not None
    ds_config = frozen_ds_config(placements.teacher, train=config.train, world_size=ranks.world_size)
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
    config: RunConfig,
    *,
    model: TeacherModel | None,
    sources: Sources,
    ranks: Ranks,
    around: Surroundings | None = None,
) -> Teacher:
    """The teacher, ready for its first signals. A collective call. Errors: LargeKDError."""
    match config.teacher:
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
        case RemoteTeacherConfig() as remote:
            around = Surroundings() if around is None else around
            return build_remote(remote, config=config, sources=sources, ranks=ranks, around=around)
    raise ConfigError(f"teacher.kind = {config.teacher.kind!r}: cannot be built.")


def teacher_ds_configs(model: TeacherModel | None) -> Mapping[str, Any]:
    """What is written to deepspeed.json beside the student's."""
    return {} if model is None else {"teacher": model.ds_config}
