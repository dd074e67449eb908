"""Rules that join the adapters' keys with others."""

import re
from collections.abc import Iterator

from largekd.config.run import RunConfig


def check_lora(config: RunConfig) -> Iterator[str]:
    """The rules that adapters, and a teacher that is the student without them, break; one line each."""
    student, kind = config.student, config.teacher.kind
    if kind == "base":
        yield from _check_base(config)
    if student.lora is None:
        if config.export.adapter:
            yield "export.adapter = true: there is none without student.lora"
        return
    try:
        re.compile(student.lora.pattern)
    except re.error as error:
        yield f"student.lora.pattern = {student.lora.pattern!r}: not a regular expression ({error})"
    if kind in ("ema", "self_shared"):
        yield f"student.lora: teacher.kind = {kind!r} has another way with the student's weights; take one of them out"
    for key in ("config", "design"):
        if getattr(student, key) is not None and student.initialise is None:
            yield (
                f"student.lora: freezes the weights of student.{key}, which are random; choose student.model or set "
                "student.initialise"
            )
    whole = student.model is not None and student.layers is None
    if config.export.adapter and not whole:
        yield (
            "export.adapter = true: an adapter is for a model that others have, all layers of student.model; this "
            "student is another. Take the key out: the export has the adapters merged"
        )


def _check_base(config: RunConfig) -> Iterator[str]:
    if config.student.lora is None:
        yield "teacher.kind = 'base': is the student without its adapters; set student.lora"
    if config.student.model is None:
        yield "student.model: teacher.kind = 'base' needs it: it names the model that the adapters are added to"
    if config.objective.translation is not None:
        yield "objective.translation: teacher.kind = 'base' has the student's own tokenizer; remove it"
    if config.objective.signal.kind != "full":
        yield (
            f"objective.signal.kind = {config.objective.signal.kind!r}: with teacher.kind = 'base' both distributions "
            "arise in one place, and it must be full"
        )
