"""What two configurations say of their experts, and whether one model's can be made of the other's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from largekd.config.experts import ExpertsConfig
from largekd.errors import ConfigError
from largekd.initialisation.sizes import Sizes, sizes_of

_DENSE_OF: Mapping[str, tuple[str, ...]] = {"mixtral": ("llama", "mistral"), "qwen3_moe": ("qwen3",), "olmoe": ()}
"""Families with a router over experts -> dense families with the same attention and norms."""

_ALWAYS_RENORMALISED = frozenset({"mixtral"})


@dataclass(frozen=True)
class ExpertShape:
    """Experts of a layer, how many a token is sent to, and whether the weights of these are made to add up to 1."""

    experts: int
    active: int
    renormalised: bool


def experts_of(config: PretrainedConfig) -> ExpertShape | None:
    """The experts of a model; None for one without."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return None
    return ExpertShape(
        experts=int(experts),
        active=int(config.num_experts_per_tok),
        renormalised=config.model_type in _ALWAYS_RENORMALISED or bool(getattr(config, "norm_topk_prob", False)),
    )


def has_experts(config: PretrainedConfig, *, layer: int) -> bool:
    """Whether this layer of the model is a mixture: some families have ordinary MLPs among them."""
    if experts_of(config) is None or layer in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    return (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0


def same_family(teacher: PretrainedConfig, student: PretrainedConfig) -> bool:
    """Whether every tensor beside the MLPs means the same in both."""
    types = (teacher.model_type, student.model_type)
    return len(set(types)) == 1 or any(types in ((m, d), (d, m)) for m, dense in _DENSE_OF.items() for d in dense)


def slices_of(neurons: int, *, width: int, experts: int) -> int:
    """How many experts of the student hold one copy of a dense MLP, when it is split: as many as fit into its neurons
    and divide the experts. Neurons beyond that are left to the rule of the width."""
    return max((count for count in range(1, neurons // width + 1) if experts % count == 0), default=0)


def mapped_sizes(
    config: ExpertsConfig, *, teacher: PretrainedConfig, student: PretrainedConfig, layers: Sequence[int]
) -> Sizes:
    """The student's sizes with as many neurons, layer by layer, as the map of neurons has to give.

    Splitting and concatenation keep whole slices and experts, and deal them out afterwards. layers: the teacher's layer
    of each of the student's.
    """
    theirs, ours, after = sizes_of(teacher), sizes_of(student), experts_of(student)
    whole, mlps = ours.ffn, []
    for new, old in enumerate(layers):
        was, becomes = has_experts(teacher, layer=old), has_experts(student, layer=new)
        neurons = ours.neurons(new)
        if becomes and not was and config.from_dense == "split":
            assert after is not None
            neurons *= slices_of(theirs.neurons(old), width=neurons, experts=after.experts)
            whole = neurons
        elif was and not becomes and config.to_dense == "concatenate":
            whole = neurons = theirs.neurons(old)
        mlps.append(neurons)
    return replace(ours, ffn=whole, mlps=tuple(mlps))


def needs_loads(config: ExpertsConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> bool:
    """Whether the teacher's routers have to be watched on some text."""
    before, after = experts_of(teacher), experts_of(student)
    if before is None:
        return False
    if after is None:
        return True
    return after.experts < before.experts and isinstance(config.fewer, str)


def check_experts(config: ExpertsConfig, *, teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Errors: ConfigError when the student's experts or MLPs cannot be made of the teacher's."""
    before, after = experts_of(teacher), experts_of(student)
    if before is None and after is None:
        return
    for config_of, shape, place in ((teacher, before, "the teacher"), (student, after, "student.config")):
        # Equal experts need no map: the rules of the other axes make them, in any family they know.
        if shape is not None and before != after and config_of.model_type not in _DENSE_OF:
            raise ConfigError(
                f"student.initialise: {place} is a {config_of.model_type!r} model; experts are mapped for "
                f"{', '.join(sorted(_DENSE_OF))}. Remove student.initialise or choose one of these."
            )
        if shape is not None and shape.active > shape.experts:
            raise ConfigError(
                f"{place}: num_experts_per_tok = {shape.active} is more than its {shape.experts} experts."
            )
    if before is None and after is not None:
        _check_upcycling(config, teacher=teacher, student=student, after=after)
    elif before is not None and after is None:
        _check_dense(config, teacher=teacher, student=student, before=before)
    elif before is not None and after is not None:
        _check_counts(config, before=before, after=after)


def _check_upcycling(
    config: ExpertsConfig, *, teacher: PretrainedConfig, student: PretrainedConfig, after: ExpertShape
) -> None:
    if config.from_dense == "copy":
        return
    neurons, width = sizes_of(teacher).ffn, sizes_of(student).ffn
    if neurons != width and slices_of(neurons, width=width, experts=after.experts) < 2:
        raise ConfigError(
            f"student.initialise.experts.from_dense = 'split': the teacher's {neurons} neurons and {after.experts} "
            f"experts of {width}: two or more experts must fit into the neurons, and the number of experts must be a "
            "multiple of some such number. Change num_experts (num_local_experts) or the experts' intermediate size in "
            "student.config (student.design: experts, mlp_width), or use 'copy'."
        )


def _check_dense(
    config: ExpertsConfig, *, teacher: PretrainedConfig, student: PretrainedConfig, before: ExpertShape
) -> None:
    width, neurons = sizes_of(teacher).ffn, sizes_of(student).ffn
    joined = config.to_dense == "concatenate"
    if joined and not width <= neurons <= before.experts * width:
        raise ConfigError(
            f"student.initialise.experts.to_dense = 'concatenate': intermediate_size = {neurons} of student.config "
            f"must be 1 to {before.experts} times the width of the teacher's experts, {width}, or between."
        )
    if not joined and neurons > width:
        raise ConfigError(
            f"student.initialise.experts.to_dense = {config.to_dense!r}: one MLP is made of the teacher's experts of "
            f"{width} neurons, and the student's has {neurons}. Set it to 'concatenate', which puts experts side "
            f"by side, or give the student at most {width} (student.design.mlp_width, or intermediate_size of "
            "student.config)."
        )


def _check_counts(config: ExpertsConfig, *, before: ExpertShape, after: ExpertShape) -> None:
    if after.experts > before.experts and after.experts % before.experts:
        raise ConfigError(
            f"student.config has {after.experts} experts and the teacher {before.experts}: more experts must be a "
            "multiple of the teacher's, which are then repeated. Change num_experts (num_local_experts)."
        )
    if isinstance(config.fewer, str) or after.experts >= before.experts:
        return
    key = f"student.initialise.experts.fewer = {list(config.fewer)}"
    if len(config.fewer) != after.experts:
        raise ConfigError(f"{key}: names {len(config.fewer)} experts, but student.config has {after.experts}.")
    wrong = next((index for index in config.fewer if not 0 <= index < before.experts), None)
    if wrong is not None:
        raise ConfigError(f"{key}: the teacher has experts 0 to {before.experts - 1}; {wrong} is not one of them.")
    if len(set(config.fewer)) != len(config.fewer):
        raise ConfigError(f"{key}: an expert is named twice; every index must be another.")
