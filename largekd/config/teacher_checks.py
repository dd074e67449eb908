"""Rules that join keys of the teacher with others."""

from collections import Counter
from collections.abc import Iterator

from largekd.config.run import RunConfig
from largekd.config.teacher import MixtureTeacherConfig, RoutedWeightsConfig


def check_mixture(config: RunConfig) -> Iterator[str]:
    """The rules that several teachers break, one line each."""
    teacher, objective, data = config.teacher, config.objective, config.data
    if not isinstance(teacher, MixtureTeacherConfig):
        return
    for name, count in Counter(member.name for member in teacher.members).items():
        if count > 1:
            yield f"teacher.members: {count} of them are called {name!r}; names must differ"
    if not any(member.weight for member in teacher.members):
        yield "teacher.members.0.weight = 0: all weights are 0; at least one must be greater"
    if objective.signal.kind != "full":
        yield (
            f"objective.signal.kind = {objective.signal.kind!r}: the few ids of each teacher are others, so that "
            "their mixture is not known; with teacher.kind = 'mixture' it must be full"
        )
    if objective.translation is not None:
        yield (
            "objective.translation: with teacher.kind = 'mixture' all teachers have the student's tokenizer; remove "
            "it, or use a single teacher"
        )
    if isinstance(teacher.weighting, RoutedWeightsConfig):
        for key, source in (*data.training_sources, ("data.eval", data.eval)):
            taken = () if source is None else (source.text_field, source.messages_field, source.weight_field)
            if source is not None and source.named_span_weights:
                taken = (*taken, source.spans_field)
            if teacher.weighting.field in taken:
                yield (
                    f"teacher.weighting.field = {teacher.weighting.field!r}: {key} reads something else in that "
                    "column; choose another"
                )
