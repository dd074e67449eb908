"""Bytes on one rank for what is captured inside of layers, for projectors, and for signals of a few ids.

Letters in the formulas: T tokens of a micro-batch on one rank, b bytes of the compute dtype, D student width, E teacher
width, F width of a comparison, Q query width, K key width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from largekd.config.alignment import (
    AdaptiveLayersConfig,
    AttentionConfig,
    ClosestLayersConfig,
    ExplicitLayersConfig,
    FeatureConfig,
    LastLayersConfig,
    LayersConfig,
    LinearProjectorConfig,
    LowRankProjectorConfig,
    MLPProjectorConfig,
    PoolProjectorConfig,
    SkipLayersConfig,
    UniformLayersConfig,
)
from largekd.config.divergence import SampledSignalConfig, TopKSignalConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes
from largekd.planner.memory import MemoryTerm, Place, Side
from largekd.planner.shapes import ModelShape

TAP_LIMIT_BYTES = 4_000_000_000
"""What the teacher's captured layers of a step may take on a rank before the plan warns."""

_MASTER_BYTES = 4
_MOMENT_BYTES = 8
_GRADIENT_BYTES = 4
_ID_BYTES = 8
_FLOAT_BYTES = 4
# Tokens whose logits exist at one time while ids are read off a teacher.
_READOUT_TOKENS = 256
# Maps of a block of queries that exist together: scores, maps and their gradients of the student, maps of the teacher.
_LIVE_MAPS = 6

Entry = TypeVar("Entry", bound=FeatureConfig | AttentionConfig)


@dataclass(frozen=True)
class Layers:
    """How many layers of each model a step captures, by kind: an upper estimate where terms' maps differ."""

    hidden: int
    attention: int


def alignment_terms(config: RunConfig, *, teacher: Side, student: Side, accumulation: int) -> tuple[MemoryTerm, ...]:
    """Every term of one rank's memory that an objective without alignment and partial signals does not have."""
    tokens, objective = config.train.micro_batch_size * config.train.sequence_length, config.objective
    return tuple(
        term
        for term in (
            *_teacher_taps(objective, teacher=teacher, student=student, tokens=accumulation * tokens),
            *_student_features(objective, teacher=teacher, student=student, tokens=tokens),
            *_student_attention(config, teacher=teacher, student=student, tokens=tokens),
            *_projectors(config, teacher=teacher, student=student),
            *_signal(objective, teacher=teacher, tokens=tokens),
        )
        if term.bytes
    )


def feature_terms(config: RunConfig, *, teacher: Side, student: Side) -> tuple[MemoryTerm, ...]:
    """Where both models' captured layers are activations of one pass: what comparing hidden states keeps besides."""
    tokens = config.train.micro_batch_size * config.train.sequence_length
    return (
        *_student_features(config.objective, teacher=teacher, student=student, tokens=tokens),
        *_projectors(config, teacher=teacher, student=student),
    )


def alignment_warnings(terms: Sequence[MemoryTerm]) -> tuple[str, ...]:
    """What the user should know of these terms, one line each."""
    taps = sum(term.bytes for term in terms if term.role == "teacher" and "captured" in term.name)
    # The same tensors stand in two phases of a step.
    taps //= 2
    if taps <= TAP_LIMIT_BYTES:
        return ()
    return (
        f"the teacher's captured layers of a step take {taps / 1e9:.1f} GB on each rank, more than "
        f"{TAP_LIMIT_BYTES / 1e9:.0f} GB: all micro-batches of a step are kept, so train.micro_batch_size changes "
        "nothing; lower train.global_batch_size, use more ranks, or capture fewer layers "
        "(objective.features and objective.attention: layers, sample_pairs)",
    )


def captured_layers(objective: ObjectiveConfig, *, depth: int, student_depth: int, teacher_depth: int) -> Layers:
    """The layers that a model of `depth` layers captures in a step."""

    def count(entries: Sequence[FeatureConfig] | Sequence[AttentionConfig]) -> int:
        # Terms with one map draw the same pairs.
        maps = {(entry.layers, entry.sample_pairs) for entry in _active(entries)}
        pairs = (drawn or pair_count(layers, student_depth, teacher_depth) for layers, drawn in maps)
        return min(depth, sum(pairs))

    return Layers(hidden=count(objective.features), attention=count(objective.attention))


def pair_count(layers: LayersConfig, student_depth: int, teacher_depth: int) -> int:
    """The number of pairs of a layer map."""
    match layers:
        case ExplicitLayersConfig():
            return len(layers.pairs)
        case UniformLayersConfig() | AdaptiveLayersConfig():
            return layers.count or student_depth
        case LastLayersConfig():
            return layers.count
        case SkipLayersConfig():
            return (student_depth - 1) // layers.stride + 1
        case ClosestLayersConfig():
            return teacher_depth


def projector_sizes(entry: FeatureConfig, *, student_width: int, teacher_width: int) -> tuple[int, int]:
    """Parameters of one projector, and of one predictor."""
    width, inner = teacher_width, 0
    match entry.projector:
        case LinearProjectorConfig(bias=bias):
            inner = student_width * teacher_width + bias * teacher_width
        case MLPProjectorConfig(hidden=hidden):
            inner = _two_layers(student_width, hidden or teacher_width, teacher_width)
        case LowRankProjectorConfig(rank=rank):
            inner = rank * (student_width + teacher_width)
        case _:
            width = min(student_width, teacher_width)
    predictor = _two_layers(width, entry.predictor_hidden or teacher_width, width) if _predicts(entry) else 0
    return inner, predictor


def alignment_parameters(objective: ObjectiveConfig, *, student: ModelShape, teacher: ModelShape) -> int:
    """All parameters of projectors, predictors and learned head weights."""
    total = 0
    for entry in _active(objective.features):
        pairs = pair_count(entry.layers, len(student.layers), len(teacher.layers))
        projector, predictor = projector_sizes(entry, student_width=student.width, teacher_width=teacher.width)
        total += projector * (1 if getattr(entry.projector, "shared", False) else pairs) + predictor * pairs
    for attention in _active(objective.attention):
        if attention.head_importance == "learned":
            pairs = pair_count(attention.layers, len(student.layers), len(teacher.layers))
            total += pairs * _matched_heads(attention, student=student, teacher=teacher)
    return total


def _active(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if extremes(entry.weight)[1] > 0]


def _two_layers(first: int, hidden: int, last: int) -> int:
    return (first + 1) * hidden + (hidden + 1) * last


def _predicts(entry: FeatureConfig) -> bool:
    return entry.loss == "predictive"


def _matched_heads(entry: AttentionConfig, *, student: ModelShape, teacher: ModelShape) -> int:
    if entry.loss == "relation":
        return entry.relation_heads
    heads = (student.heads, teacher.heads)
    return max(heads) if entry.match_heads == "repeat" else min(heads)


def _captured(objective: ObjectiveConfig, *, depth: int, student: Side, teacher: Side) -> Layers:
    depths = {"student_depth": len(student.shape.layers), "teacher_depth": len(teacher.shape.layers)}
    return captured_layers(objective, depth=depth, **depths)


def attention_width(shape: ModelShape) -> int:
    """Values per token of a layer's queries, keys and values."""
    return (shape.heads + 2 * shape.kv_heads) * shape.head_dim


def _teacher_taps(objective: ObjectiveConfig, *, teacher: Side, student: Side, tokens: int) -> Iterator[MemoryTerm]:
    shape = teacher.shape
    if not teacher.has_weights:
        # It computes none of them; what is read of a cache is counted with it.
        return
    layers = _captured(objective, depth=len(shape.layers), student=student, teacher=teacher)
    phases: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")
    for phase in phases:
        hidden = tokens * layers.hidden * shape.width * teacher.dtype_bytes
        yield teacher.term("captured hidden states, whole step", "accelerator", phase, hidden)
        attention = tokens * layers.attention * attention_width(shape) * teacher.dtype_bytes
        yield teacher.term("captured attention, whole step", "accelerator", phase, attention)


def _student_features(objective: ObjectiveConfig, *, teacher: Side, student: Side, tokens: int) -> Iterator[MemoryTerm]:
    """Layer outputs are among the activations; here is what comparing them keeps until the backward pass.

    Per pair b·D for the compared rows, what projector and predictor keep, and the gradient of the loss: b·F, or 4·F
    where pooling makes it float32.
    """
    b, widths = student.dtype_bytes, (student.shape.width, teacher.shape.width)
    total = 0
    for entry in _active(objective.features):
        pairs = entry.sample_pairs or pair_count(entry.layers, len(student.shape.layers), len(teacher.shape.layers))
        width, kept, gradient = widths[1], 0, b
        match entry.projector:
            case MLPProjectorConfig(hidden=hidden):
                kept = 2 * b * (hidden or widths[1])
            case LowRankProjectorConfig(rank=rank):
                kept = b * rank
            case PoolProjectorConfig():
                width, gradient = min(widths), _FLOAT_BYTES
            case _:
                pass
        if _predicts(entry):
            kept += b * (width + 2 * (entry.predictor_hidden or widths[1]))
        total += pairs * (b * widths[0] + kept + gradient * width)
    yield student.term("compared hidden states", "accelerator", "student", tokens * total)


def _student_attention(config: RunConfig, *, teacher: Side, student: Side, tokens: int) -> Iterator[MemoryTerm]:
    """Queries, keys and values are among the activations but with checkpointing; gradients are kept in float32."""
    objective, shape = config.objective, student.shape
    entries = _active(objective.attention)
    if not entries:
        return
    if config.train.activation_checkpointing:
        layers = _captured(objective, depth=len(shape.layers), student=student, teacher=teacher)
        captured = tokens * layers.attention * attention_width(shape) * student.dtype_bytes
        yield student.term("captured attention", "accelerator", "student", captured)
    gradients, maps = 0, 0
    for entry in entries:
        pairs = entry.sample_pairs or pair_count(entry.layers, len(shape.layers), len(teacher.shape.layers))
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        per_pair = 2 * query * len(entry.relations) if entry.loss == "relation" else query + key
        gradients += pairs * per_pair
        heads = entry.relation_heads if entry.loss == "relation" else max(shape.heads, teacher.shape.heads)
        maps = max(maps, heads * min(entry.query_block, config.train.sequence_length))
    yield student.term("gradients of attention inputs", "accelerator", "student", tokens * gradients * _FLOAT_BYTES)
    yield student.term("attention maps of a block", "accelerator", "student", tokens * maps * _LIVE_MAPS * _FLOAT_BYTES)


def _projectors(config: RunConfig, *, teacher: Side, student: Side) -> Iterator[MemoryTerm]:
    count = alignment_parameters(config.objective, student=student.shape, teacher=teacher.shape)
    shard, b = -(-count // student.world_size), student.dtype_bytes
    place = student.place("offload_optimizer")
    yield student.term("projectors' weights, own shard", student.place("offload_param"), "always", shard * b)
    shares = place == student.place("offload_param") == "accelerator" and config.train.precision == "fp32"
    state = _MOMENT_BYTES + (0 if shares else _MASTER_BYTES)
    yield student.term("projectors' optimizer state, own shard", place, "always", shard * state)
    resident: Place = "accelerator" if place == "accelerator" else "host"
    yield student.term("projectors' gradients, own shard", resident, "always", shard * _GRADIENT_BYTES)
    sizes = [
        size
        for entry in _active(config.objective.features)
        for size in projector_sizes(entry, student_width=student.shape.width, teacher_width=teacher.shape.width)
    ]
    # Whole in its pass, and its gradient before that is shared out.
    yield student.term("largest projector and its gradient", "accelerator", "student", 2 * max(sizes, default=0) * b)


def _signal(objective: ObjectiveConfig, *, teacher: Side, tokens: int) -> Iterator[MemoryTerm]:
    """Ids with their numbers for one micro-batch, if all of its tokens count."""
    if extremes(objective.alpha)[1] <= 0:
        return
    translation = objective.translation
    per_token = 0
    match objective.signal:
        case _ if translation is not None and translation.method == "spans":
            per_token = translation.top_k * (_ID_BYTES + _FLOAT_BYTES)
        case TopKSignalConfig(k=k):
            per_token = k * (_ID_BYTES + _FLOAT_BYTES)
        case SampledSignalConfig(draws=draws):
            per_token = draws * (_ID_BYTES + 2 * _FLOAT_BYTES)
    yield teacher.term("signal of a few ids", "accelerator", "student", tokens * per_token)
    if per_token and teacher.has_weights:
        yield readout_term(teacher, tokens=tokens)


def readout_term(teacher: Side, *, tokens: int) -> MemoryTerm:
    """What exists while ids are read off a teacher's hidden states."""
    logits = min(tokens, _READOUT_TOKENS) * teacher.shape.vocab_size * _FLOAT_BYTES
    return teacher.term("logits that they are read off", "accelerator", "student", 4 * logits)
