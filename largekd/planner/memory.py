"""Bytes on one rank, term by term: where each lives and in which phase of an optimizer step it exists.

Letters in the formulas: P parameters, R ranks, b bytes of the compute dtype, L layers, D width, Q query width, K key
width, I width of the MLP, V vocabulary, T tokens of a micro-batch on one rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from largekd.config.objective import ObjectiveConfig
from largekd.config.placement import offload_device
from largekd.config.placement_schema import PlacementConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes
from largekd.planner.shapes import ModelShape

Place = Literal["accelerator", "host", "nvme"]
Phase = Literal["always", "rollout", "teacher", "student", "update", "switch"]
Role = Literal["teacher", "student", "process"]

PLACES: tuple[Place, ...] = ("accelerator", "host", "nvme")

_PLACE_OF: Mapping[str, Place] = {"none": "accelerator", "cpu": "host", "nvme": "nvme"}
_MASTER_BYTES = 4
_ADAM_MOMENTS = 2
# A rank's interpreter with torch, DeepSpeed, transformers and datasets imported, measured as resident memory.
_PROCESS_BYTES = 500_000_000


@dataclass(frozen=True)
class MemoryTerm:
    """One entry of the plan. `phase` says when it exists: `always`, before a step, in one of three parts of it, or
    between two phases of a run."""

    role: Role
    name: str
    place: Place
    phase: Phase
    bytes: int


@dataclass(frozen=True)
class Side:
    """One model with its placement (empty: its weights are not in this job); `name` tells several teachers apart.

    adapters: elements of its adapters, which then are all that learns; None: it learns whole.
    """

    role: Literal["teacher", "student"]
    shape: ModelShape
    placement: dict[str, Any]
    world_size: int
    dtype_bytes: int
    name: str = ""
    adapters: int | None = None

    @property
    def has_weights(self) -> bool:
        """Whether its weights are in this job."""
        return bool(self.placement)

    @property
    def zero(self) -> Any:
        """The ZeRO section with DeepSpeed's defaults filled in."""
        return PlacementConfig.model_validate(self.placement).zero_optimization

    def place(self, offload: str) -> Place:
        """Where `offload_param` or `offload_optimizer` puts its data."""
        return _PLACE_OF[offload_device(self.placement, offload)]

    def shard(self, bytes_per_element: int) -> int:
        """This rank's share of all parameters."""
        return -(-self.shape.parameter_count // self.world_size) * bytes_per_element

    def trained(self, bytes_per_element: int) -> int:
        """This rank's share of what learns."""
        count = self.shape.parameter_count if self.adapters is None else self.adapters
        return -(-count // self.world_size) * bytes_per_element

    def term(self, name: str, place: Place, phase: Phase, count: int) -> MemoryTerm:
        """An entry of this model's."""
        return MemoryTerm(self.role, f"{self.name}: {name}" if self.name else name, place, phase, count)


def memory_terms(
    config: RunConfig, *, teachers: Sequence[Side], student: Side, accumulation: int
) -> tuple[MemoryTerm, ...]:
    """Every term of one rank's memory but what a teacher's kind, alignment and partial signals add."""
    tokens = config.train.micro_batch_size * config.train.sequence_length
    return tuple(
        term
        for term in (
            process(),
            *(
                term
                for teacher in teachers
                if teacher.has_weights
                for term in (*weights(teacher), *_teacher_forward(teacher, tokens=tokens, accumulation=accumulation))
            ),
            *weights(student),
            *optimizer(student, mixed=config.train.precision != "fp32"),
            *_student_pass(student, tokens=tokens, checkpointing=config.train.activation_checkpointing),
            *_vocabulary(config.objective, teachers=teachers, student=student, tokens=tokens),
            *_deep_supervision(config.objective, student=student, tokens=tokens),
        )
        if term.bytes
    )


def peak_bytes(terms: tuple[MemoryTerm, ...], *, place: Place) -> int:
    """What exists always, plus the most that exists at another time."""
    here = [term for term in terms if term.place == place]
    totals = {phase: sum(term.bytes for term in here if term.phase == phase) for phase in get_args(Phase)}
    return totals.pop("always") + max(totals.values())


def process() -> MemoryTerm:
    """What a rank's process is before it does anything."""
    return MemoryTerm("process", "interpreter and libraries", "host", "always", _PROCESS_BYTES)


def layer_activation_bytes(shape: ModelShape, *, dtype_bytes: int) -> int:
    """Bytes per token that autograd keeps of one layer, without checkpointing.

    (4b)I + (2b)(Q + K) + norms (4 + b)D + (2b)D, and (4 + b)(Q + K) where queries and keys are normalised; the 4 is the
    float32 copy inside a norm. Counted on the saved tensors of Llama and Qwen layers with SDPA attention. GPT-NeoX has
    no gate and plain LayerNorms: (2b)I + (10b)D + 4b + 4·heads; b·D more without use_parallel_residual.
    """
    b, query, key = dtype_bytes, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if not shape.gated:
        return 2 * b * shape.mlp_width + 10 * b * shape.width + 4 * b + 4 * shape.heads
    norm_sizes = [tensor.numel for tensor in shape.layers[0] if tensor.part == "norm"]
    width_norms = len(norm_sizes) - (2 if shape.qk_norm else 0)
    normalised = (4 + b) * (query + key) if shape.qk_norm else 0
    small = 4 * (shape.heads + width_norms + ((shape.heads + shape.kv_heads) if shape.qk_norm else 0))
    return (
        4 * b * shape.mlp_width
        + 2 * b * (query + key)
        + (width_norms * (4 + b) + 2 * b) * shape.width
        + normalised
        + small
    )


def weights(side: Side) -> Iterator[MemoryTerm]:
    """A model's parameters between its forwards."""
    b, zero = side.dtype_bytes, side.zero
    yield side.term("weights, own shard", side.place("offload_param"), "always", side.shard(b))
    adapters = -(-(side.adapters or 0) // side.world_size) * b
    yield side.term("adapters, own shard", side.place("offload_param"), "always", adapters)
    threshold = zero.stage3_param_persistence_threshold
    small = sum(tensor.numel for tensor in side.shape.tensors if tensor.numel <= threshold)
    if side.world_size > 1 or side.place("offload_param") != "accelerator":
        yield side.term("small parameters kept whole", "accelerator", "always", small * b)
    if side.place("offload_param") == "nvme":
        buffers = zero.offload_param.buffer_size * (zero.offload_param.buffer_count or 5) * b
        yield side.term("NVMe parameter buffers", "host", "always", buffers)


def _teacher_forward(side: Side, *, tokens: int, accumulation: int) -> Iterator[MemoryTerm]:
    b, shape = side.dtype_bytes, side.shape
    if _is_gathered(side):
        ahead = shape.largest_layer + side.zero.stage3_prefetch_bucket_size
        gathered = min(shape.parameter_count, max(ahead, shape.count_of("embedding")))
        yield side.term("gathered weights", "accelerator", "teacher", gathered * b)
    query = shape.heads * shape.head_dim
    per_token = (2 * b + 8) * shape.width + 2 * b * query + 3 * b * shape.mlp_width
    yield side.term("working set of one layer", "accelerator", "teacher", tokens * per_token)
    hidden = accumulation * tokens * shape.width * b
    yield side.term("hidden states of the whole step", "accelerator", "teacher", hidden)
    yield side.term("hidden states of the whole step", "accelerator", "student", hidden)


def optimizer(side: Side, *, mixed: bool) -> Iterator[MemoryTerm]:
    """Gradients and optimizer state of a model's parameters."""
    place, zero = side.place("offload_optimizer"), side.zero
    # DeepSpeed shares the master with the weights where dtype and device agree.
    if mixed or place != "accelerator" or side.place("offload_param") != "accelerator":
        yield side.term("float32 master weights", place, "always", side.trained(_MASTER_BYTES))
    yield side.term("Adam moments", place, "always", side.trained(_ADAM_MOMENTS * _MASTER_BYTES))
    resident: Place = "accelerator" if place == "accelerator" else "host"
    yield side.term("gradients, own shard", resident, "always", side.trained(_MASTER_BYTES))
    group = min(side.trained(1), zero.sub_group_size)
    yield side.term("gradients of the group being updated", resident, "update", group * _MASTER_BYTES)
    yield side.term("gradient reduce bucket", "accelerator", "always", zero.reduce_bucket_size * side.dtype_bytes)
    if place == "nvme":
        count = zero.offload_optimizer.buffer_count or 4
        yield side.term("NVMe optimizer buffers", "host", "always", count * group * _MASTER_BYTES)


def gathered_weights(side: Side) -> Iterator[MemoryTerm]:
    """The student's weights that are whole at one time of its pass."""
    b, shape, zero = side.dtype_bytes, side.shape, side.zero
    if _is_gathered(side):
        # A weight stays gathered while its next use (its layer's backward pass) is near enough: half of the distance
        # on the way up, half on the way down.
        kept = min(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance // 2)
        ahead = shape.largest_layer + zero.stage3_prefetch_bucket_size + shape.vocab_size * shape.width
        gathered = min(shape.parameter_count, max(kept, ahead))
        yield side.term("gathered weights", "accelerator", "student", gathered * b)


def _student_pass(side: Side, *, tokens: int, checkpointing: bool) -> Iterator[MemoryTerm]:
    b, shape = side.dtype_bytes, side.shape
    yield from gathered_weights(side)
    learning = -(-side.adapters // len(shape.layers)) if side.adapters is not None else shape.largest_layer
    yield side.term("weight gradients of one layer", "accelerator", "student", learning * b)
    layer = layer_activation_bytes(shape, dtype_bytes=b)
    depth = len(shape.layers)
    per_token = depth * shape.width * b + layer if checkpointing else depth * layer
    name = "activations, checkpointed" if checkpointing else "activations"
    yield side.term(name, "accelerator", "student", tokens * (per_token + (4 + 2 * b) * shape.width))


def _vocabulary(
    objective: ObjectiveConfig, *, teachers: Sequence[Side], student: Side, tokens: int
) -> Iterator[MemoryTerm]:
    b = student.dtype_bytes
    for teacher in teachers:
        if teacher.has_weights and _is_gathered(teacher):
            head = teacher.shape.vocab_size * teacher.shape.width
            yield teacher.term("vocabulary head, gathered", "accelerator", "student", head * b)
    width = student.shape.width
    # Adapters leave the head frozen.
    head = 0 if student.adapters is not None else student.shape.vocab_size * width * b
    yield student.term("vocabulary head's gradient", "accelerator", "student", head)
    yield from logit_chunks(objective, teachers=teachers, student=student, tokens=tokens)
    yield student.term("hidden states' gradient", "accelerator", "student", tokens * width * b)


def logit_chunks(
    objective: ObjectiveConfig, *, teachers: Sequence[Side], student: Side, tokens: int
) -> Iterator[MemoryTerm]:
    """The buffers of the vocabulary pass."""
    columns = max(side.shape.vocab_size for side in (*teachers, student))
    # One buffer for the student, and one for every teacher that is projected.
    buffers = 1 + len(teachers)
    name = "two chunks of logits" if buffers == 2 else f"{buffers} chunks of logits"
    chunk = min(objective.chunk_tokens, tokens)
    yield student.term(name, "accelerator", "student", buffers * chunk * columns * student.dtype_bytes)


def _deep_supervision(objective: ObjectiveConfig, *, student: Side, tokens: int) -> Iterator[MemoryTerm]:
    """Per layer what its vocabulary pass keeps until the backward pass: the gradient of the head, and that of the
    normed hidden states, with what the norm keeps."""
    deep = objective.deep_supervision
    if deep is None or extremes(deep.weight)[1] <= 0:
        return
    b, layers, width = student.dtype_bytes, len(deep.layers), student.shape.width
    head = 0 if student.adapters is not None else layers * student.shape.vocab_size * width * b
    yield student.term("head's gradients of supervised layers", "accelerator", "student", head)
    hidden = layers * tokens * width * (4 + 3 * b)
    yield student.term("hidden states of supervised layers", "accelerator", "student", hidden)


def _is_gathered(side: Side) -> bool:
    """One rank's resident shard is the whole model: a gather is then no copy worth counting."""
    return side.world_size > 1 or side.place("offload_param") != "accelerator"
