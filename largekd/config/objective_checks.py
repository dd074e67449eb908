"""Rules that join several keys of the objective."""

from collections import Counter
from collections.abc import Iterator

from largekd.config.alignment import AttentionConfig, ClosestLayersConfig, FeatureConfig
from largekd.config.divergence import BidirectionalKLConfig, DivergenceConfig, PluginConfig
from largekd.config.model import StudentConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.schedule import CurveConfig, extremes

# They read ranks or logits of all ids, so that kept ids alone do not define them.
_WHOLE_DISTRIBUTION = ("sorted_distance", "logit_mse", "ranking_hinge", "plugin")

# Names that the loss and its records use themselves.
DEEP_PREFIX = "deep_supervision."
TEACHER_LOSS = "teacher_cross_entropy"
"""Name of the last summand with a self-shared teacher: the teacher's own task loss, with factor 1."""
_RESERVED = ("cross_entropy", "kept_frac")


def check_objective(
    objective: ObjectiveConfig, *, student: StudentConfig, plugins: tuple[str, ...], self_shared: bool = False
) -> Iterator[str]:
    """The rules that the objective's values break, one line each. self_shared: both models are one backbone."""
    yield from _curves(objective)
    yield from _ranges(objective)
    yield from _names(objective, reserved=(*_RESERVED, TEACHER_LOSS) if self_shared else _RESERVED)
    yield from _unread(objective)
    yield from _divergences(objective, plugins=plugins)
    yield from _signal(objective)
    yield from _translation(objective)
    yield from _selection(objective)
    yield from _self_shared(objective) if self_shared else _layers(objective, student=student)
    yield from _deep_supervision(objective)


def _scheduled(objective: ObjectiveConfig) -> Iterator[tuple[str, float | CurveConfig]]:
    """(key, value) of everything that may be a curve."""
    yield "objective.alpha", objective.alpha
    yield "objective.temperature", objective.temperature
    for index, term in enumerate(objective.divergences):
        yield f"objective.divergences.{index}.weight", term.weight
    for key, aligned in _aligned(objective):
        yield f"{key}.weight", aligned.weight
    if objective.deep_supervision is not None:
        yield "objective.deep_supervision.weight", objective.deep_supervision.weight


def _aligned(objective: ObjectiveConfig) -> Iterator[tuple[str, FeatureConfig | AttentionConfig]]:
    for index, feature in enumerate(objective.features):
        yield f"objective.features.{index}", feature
    for index, attention in enumerate(objective.attention):
        yield f"objective.attention.{index}", attention


def _curves(objective: ObjectiveConfig) -> Iterator[str]:
    for key, value in _scheduled(objective):
        if not isinstance(value, CurveConfig):
            continue
        parts = value.warmup_frac + value.cooldown_frac
        if parts > 1:
            yield (
                f"{key}.warmup_frac = {value.warmup_frac}: with {key}.cooldown_frac = {value.cooldown_frac} it is "
                f"{parts:g} of the run; together they must be at most 1"
            )
        if value.shape == "constant" and value.end not in (None, value.start):
            yield f"{key}.end = {value.end}: the shape constant stays at start; leave it out or change {key}.shape"
        if value.shape == "exponential":
            for name, corner in (("start", value.start), ("end", value.last)):
                if corner <= 0 and (name == "start" or value.end is not None):
                    yield f"{key}.{name} = {corner}: must be greater than 0 for the shape exponential"


def _ranges(objective: ObjectiveConfig) -> Iterator[str]:
    for key, value in _scheduled(objective):
        low, high = extremes(value)
        if key == "objective.alpha":
            wrong, rule = low < 0 or high > 1, "must be at least 0 and at most 1"
        elif key == "objective.temperature":
            wrong, rule = low <= 0, "must be greater than 0"
        else:
            wrong, rule = low < 0, "must be at least 0"
        if wrong and isinstance(value, CurveConfig):
            yield f"{key}: runs from {low} to {high} over its curve; every value {rule}"
        elif wrong:
            yield f"{key} = {value}: {rule}"


def term_name(term: DivergenceConfig) -> str:
    """What a term is called in logs: a plugin's own name, else the divergence's."""
    return term.term if isinstance(term, PluginConfig) else term.name


def _names(objective: ObjectiveConfig, *, reserved: tuple[str, ...]) -> Iterator[str]:
    names = Counter(term_name(term) for term in objective.divergences)
    for name, count in names.items():
        if count > 1:
            yield f"objective.divergences: {name} appears {count} times; give it once, with the sum of the weights"
    taken: dict[str, str] = {}
    for index, term in enumerate(objective.divergences):
        if term_name(term) in reserved:
            yield f"objective.divergences.{index}.term = {term_name(term)!r}: the name is taken; choose another"
    for key, aligned in _aligned(objective):
        if aligned.name in reserved:
            yield f"{key}.name = {aligned.name!r}: the name is taken; choose another"
        if aligned.name in names:
            yield f"{key}.name = {aligned.name!r}: a term of objective.divergences is called so; choose another name"
        # Parameters are named after the term, where a dot would be a place in a tree.
        same = aligned.name.replace(".", "_")
        if same in taken:
            yield f"{key}.name = {aligned.name!r}: {taken[same]} is called so; names must differ"
        taken.setdefault(same, key)


def _unread(objective: ObjectiveConfig) -> Iterator[str]:
    """Keys with another value than their default that the chosen loss does not look at."""
    for index, feature in enumerate(objective.features):
        if feature.predictor_hidden is not None and feature.loss != "predictive":
            yield f"objective.features.{index}.predictor_hidden: only the loss 'predictive' has a predictor; remove it"
    for index, attention in enumerate(objective.attention):
        key = f"objective.attention.{index}"
        for name in ("match_heads",) if attention.loss == "relation" else ("relations", "relation_heads"):
            if getattr(attention, name) != AttentionConfig.model_fields[name].default:
                yield f"{key}.{name}: the loss {attention.loss!r} does not read it; remove it"
        if len(set(attention.relations)) < len(attention.relations):
            yield f"{key}.relations = {list(attention.relations)}: names one twice"


def _active(objective: ObjectiveConfig) -> Iterator[tuple[str, DivergenceConfig]]:
    """(key, term) of the divergences that have a positive weight at some step: the others are never evaluated."""
    for index, term in enumerate(objective.divergences):
        if extremes(term.weight)[1] > 0:
            yield f"objective.divergences.{index}", term


def _divergences(objective: ObjectiveConfig, *, plugins: tuple[str, ...]) -> Iterator[str]:
    alpha = extremes(objective.alpha)[1]
    if alpha > 0 and not any(_active(objective)):
        what = "needs" if not isinstance(objective.alpha, CurveConfig) else "at its largest needs"
        yield (
            f"objective.divergences: objective.alpha = {alpha} {what} one with a positive weight; "
            "objective.alpha=0 trains on cross-entropy alone"
        )
    for index, term in enumerate(objective.divergences):
        key = f"objective.divergences.{index}"
        if isinstance(term, PluginConfig) and not plugins:
            yield f"{key}.term = {term.term!r}: no module is named that could have it; list one in plugins"
        if isinstance(term, BidirectionalKLConfig) and term.forward_weight == term.reverse_weight == 0:
            yield f"{key}.forward_weight = 0: it or {key}.reverse_weight must be greater than 0"


def _signal(objective: ObjectiveConfig) -> Iterator[str]:
    kind = objective.signal.kind
    for key, term in _active(objective):
        if kind == "sampled" and term.name != "forward_kl":
            yield (
                f"{key}.name = {term.name!r}: cannot use objective.signal.kind = 'sampled', which is unbiased for "
                "forward_kl alone; choose forward_kl, or the kind full or top_k"
            )
        elif kind == "top_k" and term.name in _WHOLE_DISTRIBUTION:
            yield (
                f"{key}.name = {term.name!r}: needs the teacher's whole distribution; objective.signal.kind = 'top_k' "
                "must be full"
            )


def _translation(objective: ObjectiveConfig) -> Iterator[str]:
    translation = objective.translation
    method = translation.method if translation else None
    where = f"objective.translation.method = {method!r}"
    for key, term in _active(objective):
        if term.name == "span_likelihood" and method != "spans":
            yield f"{key}.name = 'span_likelihood': needs objective.translation.method = 'spans'"
        elif method == "spans" and term.name in _WHOLE_DISTRIBUTION:
            yield f"{key}.name = {term.name!r}: needs the teacher's whole distribution, which {where} does not give"
        elif method == "sorted" and term.name != "sorted_distance":
            yield (
                f"{key}.name = {term.name!r}: compares ids, which {where} does not translate; only sorted_distance may "
                "have a positive weight, or choose the method spans"
            )
    if method == "spans" and objective.signal.kind != "full":
        yield f"objective.signal.kind = {objective.signal.kind!r}: {where} chooses its own ids; it must be full"
    if translation is None:
        return
    for index, feature in enumerate(objective.features):
        if feature.loss == "cka":
            yield f"objective.features.{index}.loss = 'cka': is not defined with objective.translation; choose another"
    for index, attention in enumerate(objective.attention):
        if attention.loss == "relation":
            yield (
                f"objective.attention.{index}.loss = 'relation': is not defined with objective.translation; choose "
                "cosine, kl or mse"
            )


def _selection(objective: ObjectiveConfig) -> Iterator[str]:
    selection, translation = objective.selection, objective.translation
    if selection is None:
        return
    if (selection.threshold is None) == (selection.share is None):
        how = "both are set" if selection.share is not None else "neither is set"
        yield f"objective.selection.threshold: {how}; set exactly one of it and objective.selection.share"
    if selection.by == "student_entropy":
        return
    if objective.signal.kind == "sampled":
        yield (
            f"objective.selection.by = {selection.by!r}: draws (objective.signal.kind = 'sampled') do not tell it; "
            "choose student_entropy"
        )
    if selection.by == "gap" and translation is not None and translation.method == "sorted":
        yield "objective.selection.by = 'gap': objective.translation.method = 'sorted' does not translate ids"


def _layers(objective: ObjectiveConfig, *, student: StudentConfig) -> Iterator[str]:
    for key, aligned in _aligned(objective):
        if not isinstance(aligned.layers, ClosestLayersConfig):
            continue
        what = f"{key}.layers.map = 'closest_non_pruned': needs to know which layers the student kept"
        if student.teacher_layers is None and student.initialise is None:
            yield f"{what}; set student.teacher_layers or student.initialise, or choose another map"
        for name, value in (("model", student.model), ("config", student.config)):
            if value is not None and student.teacher_layers is not None:
                yield f"{what}; student.{name} = {value!r} replaces student.teacher_layers: set only one of them"


def _deep_supervision(objective: ObjectiveConfig) -> Iterator[str]:
    if objective.deep_supervision is None:
        return
    layers, key = objective.deep_supervision.layers, "objective.deep_supervision.layers"
    if min(layers) < 0:
        yield f"{key}: {min(layers)} is not a layer; the first one is 0"
    if len(set(layers)) < len(layers):
        yield f"{key} = {list(layers)}: names one twice"
    for index, term in enumerate(objective.divergences):
        if term_name(term).startswith(DEEP_PREFIX):
            yield f"objective.divergences.{index}.term = {term_name(term)!r}: the name is taken; choose another"
    for name, aligned in _aligned(objective):
        if aligned.name.startswith(DEEP_PREFIX):
            yield f"{name}.name = {aligned.name!r}: the name is taken; choose another"


def _self_shared(objective: ObjectiveConfig) -> Iterator[str]:
    where = "teacher.kind = 'self_shared'"
    if objective.signal.kind != "full":
        yield f"objective.signal.kind = {objective.signal.kind!r}: {where} gives its whole distribution; choose full"
    if objective.translation is not None:
        yield f"objective.translation: {where} has the student's own tokenizer; remove it"
    if objective.attention:
        yield f"objective.attention: {where} compares hidden states alone (objective.features); remove it"
    if objective.deep_supervision is not None:
        yield f"objective.deep_supervision: {where} supervises the last layer alone; remove it"
    for index, feature in enumerate(objective.features):
        if not isinstance(feature.layers, ClosestLayersConfig):
            continue
        key = f"objective.features.{index}"
        if not getattr(feature.projector, "shared", False):
            yield (
                f"{key}.projector.kind = {feature.projector.kind!r}: with {key}.layers.map = 'closest_non_pruned' and "
                f"{where} pairs change as layers go; choose a projector with shared: true, such as low_rank_identity"
            )
        if feature.loss == "predictive":
            yield f"{key}.loss = 'predictive': has a predictor for each pair, and with {where} pairs change; choose mse"
