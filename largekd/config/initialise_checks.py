"""Rules that join student.initialise with other keys."""

from collections.abc import Iterator

from largekd.config.run import RunConfig
from largekd.config.teacher import CachedTeacherConfig, MixtureTeacherConfig


def check_initialisation(config: RunConfig, *, begins: bool = True) -> Iterator[str]:
    """The rules that student.initialise breaks, one line each; weights are made before the first stage alone."""
    student, teacher = config.student, config.teacher
    if student.initialise is None:
        return
    key = "student.initialise"
    if student.config is None and student.design is None:
        yield f"{key}: gives first weights to the shape in student.config or student.design; set one of them"
    if student.model is not None:
        yield f"{key}: student.model = {student.model!r} has weights of its own; remove one of the two keys"
    if student.teacher_layers is not None:
        yield f"{key}: student.teacher_layers takes whole layers; remove it and set student.initialise.layers"
    source, place = teacher, "teacher"
    if isinstance(teacher, MixtureTeacherConfig):
        # The first of several teachers is the one whose weights are taken.
        source, place = teacher.members[0].teacher, "teacher.members.0.teacher"
    if begins and isinstance(source, CachedTeacherConfig) and source.model is None:
        yield f"{key}: a cache has no weights; set {place}.model to the teacher that was cached"
    if begins and teacher.kind in ("ema", "self_shared"):
        yield f"{key}: teacher.kind = {teacher.kind!r} has no other model whose weights could be taken; remove it"
    layers = student.initialise.layers
    if isinstance(layers, tuple) and (not layers or min(layers) < 0):
        yield f"{key}.layers = {list(layers)}: name at least one layer; the first one is 0"
