"""What is in memory between two phases of a run, when one engine is down and the next one is not up."""

from collections.abc import Sequence
from dataclasses import replace

from largekd.config.staging import Stage
from largekd.planner.memory import MemoryTerm
from largekd.planner.plan import Plan

_MASTERS_OF_MOMENTS = 2


def with_switches(plans: Sequence[Plan], *, stages: Sequence[Stage]) -> list[Plan]:
    """The stages' plans with what is carried from a phase of theirs to the next one.

    P/R · 4 bytes of float32 master copies, and P/R · 8 of moments where they are kept, in host memory beside the
    optimizer that they are copied from; P: the parameters that learn.
    """
    made = []
    for index, (stage, own) in enumerate(zip(stages, plans, strict=True)):
        following = stages[index + 1] if index + 1 < len(stages) else None
        if following is None and stage.config.freezing is None:
            made.append(own)
            continue
        keeps = stage.config.freezing is not None or (following is not None and following.keep_optimizer)
        made.append(replace(own, terms=(*own.terms, _carried(own, moments=keeps))))
    return made


def _carried(own: Plan, *, moments: bool) -> MemoryTerm:
    (held,) = (term.bytes for term in own.terms if (term.role, term.name) == ("student", "Adam moments"))
    masters = held // _MASTERS_OF_MOMENTS
    return MemoryTerm("student", "carried at a switch", "host", "switch", masters + (held if moments else 0))
