"""Rules on where the student's shape comes from."""

from collections.abc import Iterator

from largekd.config.design import PINS, TARGETS, DesignConfig
from largekd.config.run import RunConfig

_OTHERS = ("model", "config", "teacher_layers")


def check_design(config: RunConfig) -> Iterator[str]:
    """The rules that student.design breaks, one line each."""
    student, design = config.student, config.student.design
    if design is None:
        return
    for key in _OTHERS:
        if getattr(student, key) is not None:
            yield f"student.{key}: student.design already says the student's shape; remove one of the two"
    if config.teacher.kind in ("ema", "self_shared"):
        yield f"student.design: teacher.kind = {config.teacher.kind!r} has no teacher of another shape; remove it"
    for field, rule in design_problems(design):
        yield f"student.design.{field}{rule}"


def design_problems(design: DesignConfig) -> Iterator[tuple[str, str]]:
    """What a design says that cannot be together: (field, the rest of a message that starts with it)."""
    targets = [key for key in TARGETS if getattr(design, key) is not None]
    pins = [key for key in PINS if getattr(design, key) is not None]
    if len(targets) > 1:
        yield targets[1], f": {targets[0]} is given as well; a student has one target, remove one of the two"
    if not targets and not pins and design.tied is None:
        yield "ratio", f": no target is given; set one of {', '.join(TARGETS)}, or some of {', '.join(PINS)}"
    if design.active_experts is not None and design.experts is not None:
        if design.experts == 0:
            yield "active_experts", ": a dense student (experts = 0) has none; remove it"
        elif design.active_experts > design.experts:
            yield "active_experts", f" = {design.active_experts}: must be at most experts = {design.experts}"
    if design.experts == 1:
        yield "experts", " = 1: one expert is no choice; 0 makes a dense student"
    budgeted = design.memory_bytes is not None or design.deploy is not None
    for key in ("storage", "context_tokens"):
        if getattr(design, key) is not None and not budgeted:
            yield key, ": only memory_bytes and deploy read it; set one of them or remove it"
    if design.counted == "active" and budgeted:
        yield "counted", ": memory holds all experts; with memory_bytes and deploy it must be total"
    if design.heads is not None and design.kv_heads is not None and design.heads % design.kv_heads:
        yield "kv_heads", f" = {design.kv_heads}: must divide heads = {design.heads}"
