"""What a run draws from step to step, watched inside a rank pool."""

from collections.abc import Mapping
from typing import Any

import largekd
import largekd.distillation.loop as loop


def drawn(*, tree: Mapping[str, Any]) -> dict[int, list[tuple[Any, ...]]]:
    """A whole run; by stage, for each step, the layers left out and the pairs compared."""
    setting, draws = loop._setting, {}

    def watched(session: Any, **options: Any) -> Any:
        made = setting(session, **options)
        by_step = draws.setdefault(id(session.parts.engine), {})
        by_step[options["step"]] = (made.left_out, made.plan.student, made.plan.teacher)
        return made

    loop._setting = watched
    try:
        largekd.distill(tree)
    finally:
        loop._setting = setting
    return {index: list(by_step.values()) for index, by_step in enumerate(draws.values())}
