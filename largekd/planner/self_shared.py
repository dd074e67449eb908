"""The plan of a self-shared teacher: one frozen backbone, adapters of both models, both models' activations.

Letters in the formulas: L layers, b bytes of the compute dtype, T tokens of a micro-batch on one rank, D width, Q query
width, K key width, I width of the MLP, R ranks of both models' adapters together.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from largekd.config.adapters import AdaptersConfig, SelfSharedTeacherConfig
from largekd.config.run import RunConfig
from largekd.planner.alignment import feature_terms
from largekd.planner.memory import MemoryTerm, Side, gathered_weights, logit_chunks, optimizer, process, weights
from largekd.planner.shapes import ModelShape, Tensor

_FLOAT_BYTES = 4
# Linear layers of a decoder layer, as models/adapters.py knows them, by what their input and their output are.
_LINEARS = {
    "self_attn.q_proj": ("width", "query"),
    "self_attn.k_proj": ("width", "key"),
    "self_attn.v_proj": ("width", "key"),
    "self_attn.o_proj": ("query", "width"),
    "mlp.gate_proj": ("width", "mlp"),
    "mlp.up_proj": ("width", "mlp"),
    "mlp.down_proj": ("mlp", "width"),
}


@dataclass(frozen=True)
class Adapter:
    """One linear layer's adapters: the names and widths of input and output."""

    layer: int
    name: str
    in_width: int
    out_width: int

    def tensors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A and B of one model."""
        return Tensor("adapter", rank * self.in_width), Tensor("adapter", self.out_width * rank)


@dataclass(frozen=True)
class SharedShapes:
    """The backbone with the adapters of the student, of the teacher and of both, and those of both alone."""

    student: ModelShape
    teacher: ModelShape
    both: ModelShape
    adapters: ModelShape


def find_adapters(shape: ModelShape, *, config: AdaptersConfig) -> tuple[Adapter, ...]:
    """The linear layers that get adapters."""
    widths, pattern = _widths(shape), re.compile(config.pattern)
    return tuple(
        Adapter(layer, name, widths[into], widths[out])
        for layer in range(len(shape.layers))
        for name, (into, out) in _LINEARS.items()
        if pattern.search(f"model.layers.{layer}.{name}")
    )


def shared_shapes(backbone: ModelShape, *, config: AdaptersConfig) -> SharedShapes:
    """The models as they are sharded and gathered; a student's adapter has room for its largest rank."""
    found = find_adapters(backbone, config=config)

    def own(layer: int, *rooms: int) -> tuple[Tensor, ...]:
        return tuple(t for adapter in found if adapter.layer == layer for room in rooms for t in adapter.tensors(room))

    def adapted(*rooms: int) -> ModelShape:
        layers = (tensors + own(index, *rooms) for index, tensors in enumerate(backbone.layers))
        return replace(backbone, layers=tuple(layers))

    room, rank = config.largest_rank, config.rank
    alone = tuple(own(index, room, rank) for index in range(len(backbone.layers)))
    return SharedShapes(
        student=adapted(room),
        teacher=adapted(rank),
        both=adapted(room, rank),
        adapters=replace(backbone, outer=(), layers=alone),
    )


def shared_terms(config: RunConfig, *, student: Side, shapes: SharedShapes) -> tuple[MemoryTerm, ...]:
    """Every term of one rank's memory; `student` is the backbone with the student's placement."""
    assert isinstance(config.teacher, SelfSharedTeacherConfig)
    tokens = config.train.micro_batch_size * config.train.sequence_length
    both, trained = replace(student, shape=shapes.both), replace(student, shape=shapes.adapters)
    found = (
        process(),
        *weights(both),
        *optimizer(trained, mixed=config.train.precision != "fp32"),
        *_masks(student, adapters=config.teacher.adapters),
        *gathered_weights(both),
        *_pass(config, student=student, trained=trained, tokens=tokens),
        *logit_chunks(config.objective, teachers=[student], student=student, tokens=tokens),
        *feature_terms(config, teacher=student, student=student),
    )
    return tuple(term for term in found if term.bytes)


def shared_layer_bytes(shape: ModelShape, *, layer: int, config: AdaptersConfig, dtype_bytes: int) -> int:
    """Bytes per token that autograd keeps of one layer for both models, without checkpointing.

    Twice (5b)I + b(3Q + 2K) + norms 4D + (2b)D, and 4(Q + K) where queries and keys are normalised. DeepSpeed's linear
    function keeps its input also where the matrix is frozen, and the inputs with masked units, I and Q wide, are copies
    of what is kept already. Adapters keep 2·b·R, and where such an input has one, the student's half of it once more.
    Frozen norms keep no copy of their inputs.
    """
    b, widths = dtype_bytes, _widths(shape)
    adapters = [adapter for adapter in find_adapters(shape, config=config) if adapter.layer == layer]
    names = {adapter.name.split(".")[1] for adapter in adapters}
    norm_sizes = [tensor.numel for tensor in shape.layers[layer] if tensor.part == "norm"]
    width_norms = len(norm_sizes) - (2 if shape.qk_norm else 0)
    heads = shape.heads + ((shape.heads + shape.kv_heads) if shape.qk_norm else 0)
    of_each = (
        5 * b * widths["mlp"]
        + b * (3 * widths["query"] + 2 * widths["key"])
        + _FLOAT_BYTES * (width_norms * (shape.width + 1) + heads)
        + (_FLOAT_BYTES * (widths["query"] + widths["key"]) if shape.qk_norm else 0)
        + 2 * b * shape.width
    )
    masked = b * (("o_proj" in names) * widths["query"] + ("down_proj" in names) * widths["mlp"])
    return 2 * of_each + masked + 2 * b * len(adapters) * (config.largest_rank + config.rank)


def _widths(shape: ModelShape) -> dict[str, int]:
    return {
        "width": shape.width,
        "query": shape.heads * shape.head_dim,
        "key": shape.kv_heads * shape.head_dim,
        "mlp": shape.mlp_width,
    }


def _masks(student: Side, *, adapters: AdaptersConfig) -> Iterator[MemoryTerm]:
    """A factor for each output of each linear layer and for the inputs whose units go, b each; a float32 sum of the
    gradients of the latter and of the student's ranks. Whole on every rank."""
    widths, depth = _widths(student.shape), len(student.shape.layers)
    units = widths["query"] + widths["mlp"]
    outputs = sum(widths[out] for _, out in _LINEARS.values())
    ranks = len(find_adapters(student.shape, config=adapters)) * adapters.largest_rank
    count = depth * (student.dtype_bytes * (outputs + units) + _FLOAT_BYTES * units) + 2 * _FLOAT_BYTES * ranks
    yield student.term("masks and saliences, whole", "accelerator", "always", count)


def _pass(config: RunConfig, *, student: Side, trained: Side, tokens: int) -> Iterator[MemoryTerm]:
    """Rows run once as the teacher's and once as the student's."""
    assert isinstance(config.teacher, SelfSharedTeacherConfig)
    b, shape, checkpointing = student.dtype_bytes, student.shape, config.train.activation_checkpointing
    yield student.term("adapters' gradients of one layer", "accelerator", "student", trained.shape.largest_layer * b)
    layers = [
        shared_layer_bytes(shape, layer=layer, config=config.teacher.adapters, dtype_bytes=b)
        for layer in range(len(shape.layers))
    ]
    per_token = 2 * len(layers) * shape.width * b + max(layers) if checkpointing else sum(layers)
    name = "activations of both models" + (", checkpointed" if checkpointing else "")
    last = 2 * (_FLOAT_BYTES + 2 * b) * shape.width
    yield student.term(name, "accelerator", "student", tokens * (per_token + last))
    gradients = 2 * tokens * shape.width * b
    yield student.term("both models' hidden states' gradients", "accelerator", "student", gradients)
