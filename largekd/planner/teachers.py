"""The teachers of a run as the plan sees them, and what each kind keeps in memory beside a model's forward.

Letters in the formulas: P parameters, R ranks, b bytes of the compute dtype, E teacher width, W teacher vocabulary, K
kept entries, T tokens of a micro-batch on one rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from largekd.config.adapters import SelfSharedTeacherConfig
from largekd.config.divergence import SampledSignalConfig, TopKSignalConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import (
    CachedTeacherConfig,
    EMATeacherConfig,
    MixtureTeacherConfig,
    OnlineTeacherConfig,
    RemoteTeacherConfig,
)
from largekd.planner.errors import PlanUnavailableError
from largekd.planner.locate import read_model_config
from largekd.planner.memory import MemoryTerm, Side
from largekd.planner.shapes import ModelShape, read_shape

CACHED_CONFIG = "teacher/config.json"
"""Where a cache keeps its teacher's configuration."""

_FLOAT_BYTES = 4
_ID_BYTES = 8

SingleConfig = OnlineTeacherConfig | CachedTeacherConfig | RemoteTeacherConfig | EMATeacherConfig


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher: `name` as users call it, `key` its place in the configuration, `model` where its shape is from."""

    name: str
    key: str
    config: SingleConfig
    model: str
    side: Side


def find_teachers(
    config: RunConfig, *, placements: Placements, world_size: int, dtype_bytes: int
) -> tuple[TeacherPlan, ...]:
    """Every teacher with its shape. Errors: PlanUnavailableError when a model's configuration is not here."""
    teacher = config.teacher
    if isinstance(teacher, MixtureTeacherConfig):
        entries: list[tuple[str, str, SingleConfig]] = [
            (member.name, f"teacher.members.{index}.teacher", member.teacher)
            for index, member in enumerate(teacher.members)
        ]
    elif isinstance(teacher, SelfSharedTeacherConfig):
        raise PlanUnavailableError("adapters beside a frozen backbone (teacher.kind 'self_shared') are not counted")
    else:
        entries = [("teacher", "teacher", teacher)]
    found = []
    for name, key, entry in entries:
        model, shape = _shape(entry, config=config)
        placement = placements.teachers.get(f"{key}.deepspeed", {})
        label = name if len(entries) > 1 else ""
        side = Side("teacher", shape, placement, world_size, dtype_bytes, label)
        found.append(TeacherPlan(name, key, entry, model, side))
    return tuple(found)


def kind_terms(
    teachers: Sequence[TeacherPlan], *, objective: ObjectiveConfig, tokens: int, accumulation: int
) -> tuple[MemoryTerm, ...]:
    """What the teachers keep because of their kinds; `tokens` of a micro-batch on one rank."""
    terms: list[MemoryTerm] = []
    for teacher in teachers:
        match teacher.config:
            case EMATeacherConfig():
                terms += _average(teacher.side)
            case CachedTeacherConfig() | RemoteTeacherConfig():
                terms += _received(teacher.side, objective=objective, tokens=tokens, accumulation=accumulation)
    return tuple(term for term in terms if term.bytes)


def _shape(entry: SingleConfig, *, config: RunConfig) -> tuple[str, ModelShape]:
    match entry:
        case EMATeacherConfig():
            # The checks of the configuration require it.
            assert config.student.model is not None
            model, revision = config.student.model, config.student.revision
            shape = read_shape(read_model_config(model, revision=revision))
            return model, shape if config.student.layers is None else shape.with_layers(config.student.layers)
        case CachedTeacherConfig(model=None):
            model, revision = str(Path(entry.path).expanduser() / CACHED_CONFIG), None
        case _:
            assert entry.model is not None
            model, revision = entry.model, entry.revision
    return model, read_shape(read_model_config(model, revision=revision))


def _average(side: Side) -> Iterator[MemoryTerm]:
    """The shards themselves are the model's weights, P/R · b; beside them a float32 remainder, P/R · 4."""
    place = side.place("offload_param")
    yield side.term("float32 remainder of the average, own shard", place, "always", side.shard(_FLOAT_BYTES))
    largest = -(-side.shape.largest_tensor // side.world_size)
    # Old value, difference, and the student's weight where it must be brought from host memory.
    yield side.term("update of one tensor's average", place, "update", 3 * _FLOAT_BYTES * largest)


def _received(side: Side, *, objective: ObjectiveConfig, tokens: int, accumulation: int) -> Iterator[MemoryTerm]:
    """Signals of a whole step wait in host memory, those of a micro-batch are on the accelerator.

    Hidden states are T · E · b and need the teacher's head, W · E · b, whole on every rank; ids with log-probabilities
    are T · K · 12, which the plan counts with the signals of a few ids.
    """
    shape, b = side.shape, side.dtype_bytes
    match objective.signal:
        case TopKSignalConfig(k=k):
            per_token = k * (_ID_BYTES + _FLOAT_BYTES)
        case SampledSignalConfig(draws=draws):
            per_token = draws * (_ID_BYTES + 2 * _FLOAT_BYTES)
        case _:
            per_token = shape.width * b
            yield side.term("vocabulary head, whole", "accelerator", "always", shape.vocab_size * shape.width * b)
            yield side.term("hidden states", "accelerator", "student", tokens * per_token)
    yield side.term("signals of the whole step", "host", "always", accumulation * tokens * per_token)
