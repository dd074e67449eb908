"""The first weights of a student of another shape: which rule makes them, and of what."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedModel

from largekd.config.initialise import InitialiseConfig
from largekd.distillation.default_rules import settled
from largekd.errors import ConfigError
from largekd.initialisation.axes import StudentMaps
from largekd.initialisation.derive import Derivation, Prepare, as_stored, derivations, rule_of_names
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.expert_shapes import (
    check_experts,
    experts_of,
    has_experts,
    mapped_sizes,
    needs_loads,
    same_family,
)
from largekd.initialisation.experts import corresponding_experts, expert_derivations
from largekd.initialisation.fill import fill_from
from largekd.initialisation.importance import check_importance, importance_maps
from largekd.initialisation.kinds import check_agreement, choose_layers, drops_head
from largekd.initialisation.report import InitialisationReport, shape_of
from largekd.initialisation.rotation import check_positions, check_rotatable, fold_norms, rotated_ends, rotated_maps
from largekd.initialisation.sizes import Sizes, sizes_of
from largekd.initialisation.statistics import Statistics
from largekd.initialisation.width import check_neurons, check_sizes, plain_maps
from largekd.models.build import skeleton
from largekd.models.source import ModelFolder
from largekd.runtime.ranks import Ranks, Together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a rule is given: both shapes, the teacher's layers that are kept, and the configuration; the statistics of
    the teacher for the rules that need some."""

    config: InitialiseConfig
    model: PreTrainedModel
    teacher_config: PretrainedConfig
    teacher: Sizes
    student: Sizes
    layers: tuple[int, ...]
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Plan:
    """What a rule answers; the last two are for `derivations`."""

    maps: StudentMaps
    prepare: Prepare = as_stored
    given: Mapping[str, Derivation | None] = field(default_factory=dict)


def _truncate(request: Request) -> Plan:
    return Plan(_plain(request, even=False))


def _interpolate(request: Request) -> Plan:
    return Plan(_plain(request, even=True))


def _plain(request: Request, *, even: bool) -> StudentMaps:
    return plain_maps(
        teacher=request.teacher,
        student=request.student,
        layers=request.layers,
        even=even,
        gain=request.config.gain,
    )


def _importance(request: Request) -> Plan:
    return Plan(_important(request, width=True))


def _pca(request: Request) -> Plan:
    """Neurons and heads by importance, hidden units by rotation, which changes all that touches the stream."""
    assert request.statistics is not None
    assert request.statistics.moment_DD is not None
    check_positions(request.statistics.positions, width=request.student.width)
    maps = rotated_maps(
        _important(request, width=False), moment_DD=request.statistics.moment_DD, width=request.student.width
    )
    ends = rotated_ends(request.model, maps=maps, teacher_config=request.teacher_config)
    return Plan(maps, prepare=fold_norms(request.model), given=ends)


def _important(request: Request, *, width: bool) -> StudentMaps:
    assert request.statistics is not None
    return importance_maps(
        request.statistics, layers=request.layers, teacher=request.teacher, student=request.student, width=width
    )


RULES: Mapping[str, Callable[[Request], Plan]] = {
    "truncate": _truncate,
    "interpolate": _interpolate,
    "importance": _importance,
    "pca": _pca,
}
"""student.initialise.width -> the rule."""


class Measures(Protocol):
    """What rules can ask of the teacher; the first two are collective calls."""

    def statistics(self, *, moment: bool) -> Statistics:
        """The teacher's activations; `moment`: the second moment of its stream among them."""
        ...

    def loads(self) -> Mapping[int, LayerLoads]:
        """How much the teacher's routers use each expert, by layer."""
        ...

    def release(self) -> None:
        """Free what was loaded for measuring: nothing is asked any more."""
        ...


def needs_statistics(config: InitialiseConfig) -> bool:
    """Whether one of the rules, as `settled` names them, looks at the teacher's activations."""
    return config.layers == "block_influence" or config.width in ("importance", "pca")


def check_initialise(config: InitialiseConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """What can be told from the two configurations, before any weight is read.

    Errors: ConfigError for another family, a shape that cannot be made of the teacher's, or layers that do not exist.
    """
    if config.width is not None and config.width not in RULES:
        raise ConfigError(f"student.initialise.width = {config.width!r}: must be null or one of {', '.join(RULES)}.")
    if not same_family(teacher, student):
        raise ConfigError(
            f"student.initialise: a {student.model_type!r} student cannot be made of a {teacher.model_type!r} teacher; "
            f"set model_type of student.config to {teacher.model_type!r} or remove student.initialise."
        )
    check_agreement(teacher=teacher, student=student)
    if config.width == "pca":
        check_rotatable(student)
    check_experts(config.experts, teacher=teacher, student=student)
    config = settled(config, teacher=teacher, student=student)
    assert config.layers is not None
    layers = choose_layers(config.layers, teacher=teacher, student=student)
    shapes = {
        "teacher": sizes_of(teacher),
        "student": mapped_sizes(config.experts, teacher=teacher, student=student, layers=layers),
    }
    check_sizes(**shapes)
    # Layers of one kind are alike, but between a mixture and a dense model their kinds may differ.
    alike = (experts_of(teacher) is None) == (experts_of(student) is None)
    if alike or config.layers != "block_influence":
        check_neurons(**shapes, layers=layers)
    if config.width in ("importance", "pca"):
        experts = [has_experts(teacher, layer=layer) for layer in range(teacher.num_hidden_layers)]
        check_importance(**shapes, layers=layers, experts=experts)


def initialise_student(
    model: PreTrainedModel,
    *,
    config: InitialiseConfig,
    teacher: ModelFolder,
    seed: int,
    ranks: Ranks,
    measures: Measures,
) -> InitialisationReport:
    """Fill the sharded student with what its teacher's checkpoint gives. A collective call. Errors: ConfigError.

    measures: asked once for what `needs_statistics` and `needs_loads` say.
    """
    check_initialise(config, teacher=teacher.config, student=model.config)
    config = settled(config, teacher=teacher.config, student=model.config)
    assert config.layers is not None
    assert config.width is not None
    statistics = None
    if needs_statistics(config):
        statistics = measures.statistics(moment=config.width == "pca")
    layers = choose_layers(
        config.layers,
        teacher=teacher.config,
        student=model.config,
        influence_N=None if statistics is None else statistics.influence_N,
    )
    request = Request(
        config=config,
        model=model,
        teacher_config=teacher.config,
        teacher=sizes_of(teacher.config),
        student=mapped_sizes(config.experts, teacher=teacher.config, student=model.config, layers=layers),
        layers=layers,
        statistics=statistics,
    )
    watched = needs_loads(config.experts, teacher=teacher.config, student=model.config)
    loads = measures.loads() if watched else {}
    measures.release()
    plan = RULES[config.width](request)
    made = derivations(
        model,
        maps=plan.maps,
        teacher_config=teacher.config,
        seed=seed,
        prepare=plan.prepare,
        given={**plan.given, **_experts(request, plan=plan, loads=loads, seed=seed)},
    )
    report = fill_from(
        model, derivations=made, folder=teacher.path, rank=ranks.rank, seed=seed, teacher=_names(model, teacher)
    )
    report = replace(
        report,
        expert_map=corresponding_experts(
            config.experts, teacher_config=teacher.config, student_config=model.config, layers=layers, loads=loads
        ),
        plan={
            "teacher": str(teacher.path),
            "teacher_shape": shape_of(teacher.config),
            "layers": list(layers),
            "layer_rule": config.layers if isinstance(config.layers, str) else "given",
            "gains": dict(plan.maps.gains),
            **config.model_dump(mode="json", exclude={"layers"}),
        },
    )
    if ranks.is_main:
        if drops_head(teacher=teacher.config, student=model.config):
            logger.warning(
                "student.initialise: the student's head is its embedding, and the head that the teacher trained apart "
                "is dropped; set tie_word_embeddings (student.design.tied) to false to keep it"
            )
        logger.info("student: layers %s, width %s; %s", config.layers, config.width, report.in_words())
    return report


def _experts(request: Request, *, plan: Plan, loads: Mapping[int, LayerLoads], seed: int) -> dict[str, Derivation]:
    """The MLPs of layers in which teacher and student differ in their experts."""
    return expert_derivations(
        request.model,
        config=request.config.experts,
        teacher_config=request.teacher_config,
        layers=request.layers,
        rule=rule_of_names(request.model, maps=plan.maps, teacher_config=request.teacher_config, prepare=plan.prepare),
        loads=loads,
        seed=seed,
    )


def _names(model: PreTrainedModel, teacher: ModelFolder) -> PreTrainedModel | None:
    """Something that names the teacher's tensors, where the student does not."""
    if teacher.config.model_type == model.config.model_type:
        return None
    return skeleton(teacher.config, trust_remote_code=teacher.trust_remote_code)


def write_report(report: InitialisationReport, *, folder: Path, ranks: Ranks) -> None:
    """initialisation.json, and expert_map.json where experts were chosen or merged, in a run's folder. A collective
    call."""
    with Together():
        if ranks.is_main:
            report.write(folder)
