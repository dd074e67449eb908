"""The memory plan of a run: what its configuration will need on each rank, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from largekd.config.adapters import AdaptersConfig, SelfSharedTeacherConfig
from largekd.config.checks import check_world
from largekd.config.placement import Placements, read_placements
from largekd.config.run import RunConfig
from largekd.errors import ConfigError
from largekd.planner.adapters import adapter_count
from largekd.planner.alignment import alignment_terms, alignment_warnings
from largekd.planner.design import design_student
from largekd.planner.locate import read_model_config
from largekd.planner.memory import PLACES, MemoryTerm, Place, Side, memory_terms, peak_bytes
from largekd.planner.rollouts import rollout_terms
from largekd.planner.self_shared import shared_shapes, shared_terms
from largekd.planner.shapes import ModelShape, read_shape
from largekd.planner.teachers import TeacherPlan, find_teachers, kind_terms

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Plan:
    """Sizes of the models and one rank's memory; `accumulation` is micro-batches per optimizer step.

    teachers: (name, shape) of each.
    """

    world_size: int
    accumulation: int
    tokens_per_step: int
    teachers: tuple[tuple[str, ModelShape], ...]
    student: ModelShape
    terms: tuple[MemoryTerm, ...]
    warnings: tuple[str, ...] = ()

    @property
    def peaks(self) -> dict[Place, int]:
        """Peak bytes of one rank in each place."""
        return {place: peak_bytes(self.terms, place=place) for place in PLACES}


def plan(config: RunConfig, *, world_size: int) -> Plan:
    """What a run on `world_size` ranks needs.

    Errors: ConfigError for a batch that the ranks do not divide, rows longer than a model's positions, layers that the
    teacher does not have and NVMe buffers that are too small; PlanUnavailableError when a model is not here.
    """
    accumulation = check_world(config, world_size=world_size)
    placements = read_placements(config)
    dtype_bytes = _BYTES[config.train.precision]
    if isinstance(config.teacher, SelfSharedTeacherConfig):
        return _shared_plan(config, adapters=config.teacher.adapters, placements=placements, world_size=world_size)
    found = find_teachers(config, placements=placements, world_size=world_size, dtype_bytes=dtype_bytes)
    # Only a single teacher can lend its layers.
    student = _student_shape(config, teacher=found[0])
    for teacher in found:
        _check_positions(config, key=teacher.model_key, shape=teacher.side.shape)
    student_key = "student.design" if config.student.design is not None else "student.model"
    _check_positions(config, key=student_key, shape=student)
    adapters = adapter_count(student, config=config.student.lora)
    student_side = Side("student", student, placements.student, world_size, dtype_bytes, adapters=adapters)
    for teacher in found:
        if teacher.side.has_weights:
            _check_buffers(teacher.side, key=f"{teacher.key}.deepspeed")
    _check_buffers(student_side, key="student.deepspeed")
    sides = [teacher.side for teacher in found]
    tokens = config.train.micro_batch_size * config.train.sequence_length
    aligned: tuple[MemoryTerm, ...] = ()
    if len(sides) == 1:
        aligned = alignment_terms(config, teacher=sides[0], student=student_side, accumulation=accumulation)
    return Plan(
        world_size=world_size,
        accumulation=accumulation,
        tokens_per_step=config.train.global_batch_size * config.train.sequence_length,
        teachers=tuple((teacher.name, teacher.side.shape) for teacher in found),
        student=student,
        terms=(
            *memory_terms(config, teachers=sides, student=student_side, accumulation=accumulation),
            *kind_terms(found, objective=config.objective, student=student, tokens=tokens, accumulation=accumulation),
            *aligned,
            *rollout_terms(config, teacher=sides[0], student=student_side),
        ),
        warnings=alignment_warnings(aligned),
    )


def _shared_plan(config: RunConfig, *, adapters: AdaptersConfig, placements: Placements, world_size: int) -> Plan:
    """The plan of a backbone that is both models."""
    assert config.student.model is not None, "the checks of the configuration require it"
    backbone = read_shape(read_model_config(config.student.model, revision=config.student.revision))
    if config.student.layers is not None:
        backbone = _with_layers(
            backbone, layers=config.student.layers, key="student.layers", model=config.student.model
        )
    _check_positions(config, key="student.model", shape=backbone)
    side = Side("student", backbone, placements.student, world_size, _BYTES[config.train.precision])
    _check_buffers(side, key="student.deepspeed")
    shapes = shared_shapes(backbone, config=adapters)
    return Plan(
        world_size=world_size,
        accumulation=check_world(config, world_size=world_size),
        tokens_per_step=config.train.global_batch_size * config.train.sequence_length,
        teachers=(("teacher", shapes.teacher),),
        student=shapes.student,
        terms=shared_terms(config, student=side, shapes=shapes),
    )


def _student_shape(config: RunConfig, *, teacher: TeacherPlan) -> ModelShape:
    student = config.student
    if student.design is not None:
        described = read_model_config(teacher.model, revision=getattr(teacher.config, "revision", None))
        return design_student(described, design=student.design, model=teacher.model_key).shape
    if student.model is not None:
        whole = read_shape(read_model_config(student.model, revision=student.revision))
        if student.layers is None:
            return whole
        return _with_layers(whole, layers=student.layers, key="student.layers", model=student.model)
    if student.config is not None:
        return read_shape(read_model_config(student.config, revision=student.revision))
    layers = student.teacher_layers or ()
    return _with_layers(teacher.side.shape, layers=layers, key="student.teacher_layers", model=teacher.model)


def _with_layers(whole: ModelShape, *, layers: Sequence[int], key: str, model: str) -> ModelShape:
    depth = len(whole.layers)
    beyond = [index for index in layers if index >= depth]
    if beyond:
        raise ConfigError(f"{key}: {beyond[0]} is not a layer of {model}, whose layers are 0 to {depth - 1}.")
    return whole.with_layers(tuple(layers))


def _check_positions(config: RunConfig, *, key: str, shape: ModelShape) -> None:
    length = config.train.sequence_length
    if shape.max_positions is not None and length > shape.max_positions:
        raise ConfigError(
            f"train.sequence_length = {length}: the model of {key} has {shape.max_positions} positions "
            "(max_position_embeddings); make the rows shorter or choose another model."
        )


def _check_buffers(side: Side, *, key: str) -> None:
    offload = side.zero.offload_param
    if offload is None or offload.device != "nvme":
        return
    shard = -(-side.shape.largest_tensor // side.world_size)
    if shard > offload.buffer_size:
        raise ConfigError(
            f"{key}: offload_param.buffer_size = {offload.buffer_size} elements, but the {side.role}'s largest tensor "
            f"has {side.shape.largest_tensor}, a shard of {shard} on {side.world_size} ranks; "
            "raise buffer_size to that."
        )
