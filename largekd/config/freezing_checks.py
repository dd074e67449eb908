"""Rules that join progressive freezing with the rest of a configuration."""

from collections.abc import Iterator
from itertools import pairwise

from largekd.config.placement import offload_device
from largekd.config.run import RunConfig


def check_freezing(config: RunConfig) -> Iterator[str]:
    """What `freezing` breaks, one line each."""
    freezing = config.freezing
    if freezing is None:
        return
    if config.teacher.kind == "self_shared":
        yield "freezing: teacher.kind = 'self_shared' trains adapters and prunes on a schedule of its own; remove it"
    if config.optim.implementation != "torch":
        yield (
            f"optim.implementation = {config.optim.implementation!r}: freezing keeps the moments of what goes on "
            "learning, which only 'torch' can"
        )
    if freezing.at is None:
        return
    if len(freezing.at) != freezing.parts - 1:
        yield f"freezing.at has {len(freezing.at)} entries: freezing.parts = {freezing.parts} needs one less than that"
    elif not all(0 < share < 1 for share in freezing.at) or any(b <= a for a, b in pairwise(freezing.at)):
        yield f"freezing.at = {list(freezing.at)}: must rise, and lie between 0 and 1"


def check_switchable(placement: dict[str, object]) -> str | None:
    """Why a student with this placement cannot pass from one stage to another; None where it can."""
    for section in ("offload_optimizer", "offload_param"):
        if offload_device(placement, section) == "nvme":
            return f"{section}.device is nvme, where weights cannot be handed on to another stage; use cpu"
    return None
