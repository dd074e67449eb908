"""The teachers of a run as the plan sees them, and what each kind keeps in memory beside a model's forward.

Letters in the formulas: P parameters, R ranks, b bytes of the compute dtype, E teacher width, W teacher vocabulary, K
kept entries, T tokens of a micro-batch on one rank.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from largekd.config.adapters import SelfSharedTeacherConfig
from largekd.config.cache import CodecConfig, SampledCodecConfig, TopKCodecConfig
from largekd.config.divergence import SampledSignalConfig, SignalConfig, TopKSignalConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.config.teacher import (
    BackboneTeacherConfig,
    CachedTeacherConfig,
    EMATeacherConfig,
    MixtureTeacherConfig,
    OnlineTeacherConfig,
    RemoteTeacherConfig,
)
from largekd.planner.alignment import attention_width, captured_layers, readout_term
from largekd.planner.locate import read_model_config
from largekd.planner.memory import MemoryTerm, Side
from largekd.planner.shapes import ModelShape, read_shape

CACHED_CONFIG = "teacher/config.json"
"""Where a cache keeps its teacher's configuration."""

CACHED_MANIFEST = "manifest.json"
"""Where a cache says what is stored."""

_FLOAT_BYTES = 4
_ID_BYTES = 8

SingleConfig = (
    OnlineTeacherConfig | CachedTeacherConfig | RemoteTeacherConfig | EMATeacherConfig | BackboneTeacherConfig
)


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher: `name` as users call it, `key` its place in the configuration, `model` where its shape is from."""

    name: str
    key: str
    config: SingleConfig
    model: str
    side: Side

    @property
    def model_key(self) -> str:
        """The configuration key that names its model."""
        match self.config:
            case EMATeacherConfig() | BackboneTeacherConfig():
                return "student.model"
            case CachedTeacherConfig(model=None):
                return f"{self.key}.path"
        return f"{self.key}.model"


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
    else:
        assert not isinstance(teacher, SelfSharedTeacherConfig), "it has no side of its own; see self_shared"
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
    teachers: Sequence[TeacherPlan],
    *,
    objective: ObjectiveConfig,
    student: ModelShape,
    tokens: int,
    accumulation: int,
) -> tuple[MemoryTerm, ...]:
    """What the teachers keep because of their kinds; `tokens` of a micro-batch on one rank."""
    terms: list[MemoryTerm] = []
    for teacher in teachers:
        match teacher.config:
            case EMATeacherConfig():
                terms += _average(teacher.side)
            case BackboneTeacherConfig():
                terms += _base(teacher.side, tokens=tokens)
            case CachedTeacherConfig() as cached:
                terms += _cached(cached, teacher.side, signal=objective.signal, tokens=tokens)
                if len(teachers) == 1:
                    terms += _cached_layers(cached, teacher.side, objective=objective, student=student, tokens=tokens)
            case RemoteTeacherConfig(protocol=protocol):
                terms += _remote(
                    teacher.side,
                    protocol=protocol,
                    signal=objective.signal,
                    tokens=tokens,
                    accumulation=accumulation,
                )
    return tuple(term for term in terms if term.bytes)


def _shape(entry: SingleConfig, *, config: RunConfig) -> tuple[str, ModelShape]:
    match entry:
        case EMATeacherConfig() | BackboneTeacherConfig():
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


def _base(side: Side, *, tokens: int) -> Iterator[MemoryTerm]:
    """No weights of its own: a micro-batch's last hidden states, D · b a token; its pass is smaller than the student's.

    Of the vocabulary head there is one, whole for both models.
    """
    yield side.term("hidden states", "accelerator", "student", tokens * side.shape.width * side.dtype_bytes)


def _remote(side: Side, *, protocol: str, signal: SignalConfig, tokens: int, accumulation: int) -> Iterator[MemoryTerm]:
    """Host memory has the signals of two steps, this one's and the next one's, which is asked for ahead.

    A hidden state is E · b, K ids with log-probabilities are K · 12. This project's own servers give the vocabulary
    head, W · E · b, whatever is asked of them; every rank has it whole.
    """
    per_token = _entry_bytes(signal)
    if protocol == "largekd":
        yield _head(side, dtype_bytes=side.dtype_bytes)
    if per_token is None:
        per_token = side.shape.width * side.dtype_bytes
        yield side.term("hidden states", "accelerator", "student", tokens * per_token)
    yield side.term("signals of two steps", "host", "always", 2 * accumulation * tokens * per_token)


def _cached(entry: CachedTeacherConfig, side: Side, *, signal: SignalConfig, tokens: int) -> Iterator[MemoryTerm]:
    """Host memory has the records of one micro-batch; what is stored decides, which may be more than is asked for.

    Stored hidden states are E · b with b of the stored dtype, and need the head, W · E · b, whole on every rank.
    Records of K ids are counted as K · 12, which is more than they are.
    """
    stored = _stored(entry)
    kept = signal if stored is None else stored.codec
    per_token, b = _entry_bytes(kept), side.dtype_bytes if stored is None else stored.dtype_bytes
    if per_token is None:
        per_token = side.shape.width * b
        yield _head(side, dtype_bytes=b)
        yield side.term("hidden states", "accelerator", "student", tokens * per_token)
        if _entry_bytes(signal) is not None:
            yield readout_term(side, tokens=tokens)
    yield side.term("records of a micro-batch", "host", "always", tokens * per_token)


def _cached_layers(
    entry: CachedTeacherConfig, side: Side, *, objective: ObjectiveConfig, student: ModelShape, tokens: int
) -> Iterator[MemoryTerm]:
    """Captured layers of one micro-batch, E and the attention's widths in the stored dtype, read into host memory."""
    stored, depth = _stored(entry), len(side.shape.layers)
    size = 2 if stored is None or stored.taps is None else stored.taps.dtype_bytes
    layers = captured_layers(objective, depth=depth, student_depth=len(student.layers), teacher_depth=depth)
    count = tokens * size * (layers.hidden * side.shape.width + layers.attention * attention_width(side.shape))
    yield side.term("captured layers of a micro-batch", "host", "always", count)
    yield side.term("captured layers of a micro-batch", "accelerator", "student", count)


def _head(side: Side, *, dtype_bytes: int) -> MemoryTerm:
    count = side.shape.vocab_size * side.shape.width
    return side.term("vocabulary head, whole", "accelerator", "always", count * dtype_bytes)


def _entry_bytes(signal: SignalConfig | CodecConfig) -> int | None:
    """Bytes of a token's ids with their numbers; None: its hidden state."""
    match signal:
        case TopKSignalConfig(k=k) | TopKCodecConfig(k=k):
            return k * (_ID_BYTES + _FLOAT_BYTES)
        case SampledSignalConfig(draws=draws) | SampledCodecConfig(draws=draws):
            return draws * (_ID_BYTES + 2 * _FLOAT_BYTES)
    return None


class _Values(BaseModel):
    precision: Literal["fp32", "bf16", "fp16"]

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2


class _Stored(BaseModel):
    """What the plan reads of a cache's manifest."""

    codec: CodecConfig
    teacher: _Values
    taps: _Values | None = None

    @property
    def dtype_bytes(self) -> int:
        return self.teacher.dtype_bytes


def _stored(entry: CachedTeacherConfig) -> _Stored | None:
    """None: there is no manifest that can be read; the run itself will say why."""
    path = Path(entry.path).expanduser() / CACHED_MANIFEST
    try:
        return _Stored.model_validate(json.loads(path.read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
