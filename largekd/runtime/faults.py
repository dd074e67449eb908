"""Faults on demand, for tests: a process kills or stops itself, or fails, at a named point.

`LARGEKD_TEST_FAULT` holds comma-separated specifications `area:point:rank<R|*>:step<N|N-M|*>[:action]`, for example
`save:after_shard:rank1:step4:sigkill`. Unset, as in every real run, nothing ever fires.

Points: `save:{before_shard,mid_shard,after_shard,before_manifest,before_rename,before_marker,after_commit}`,
`cache:{before_shard,after_shard}` (the step is the shard's number), `cache:before_manifest` (step 0),
`generate:{before_shard,after_shard}` (the step is the shard's number),
`stage:switch` (the old engine is gone and the new one not there yet; the step is the last one of the old).
Actions: `sigkill`, `sigterm`, `sigstop` (to itself), `enospc` (raises), `sleep<seconds>`; none: only return True.
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass

from largekd.errors import ConfigError

VARIABLE = "LARGEKD_TEST_FAULT"
_SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}
_SPECIFICATION = re.compile(
    r"(?P<point>\w+:\w+):rank(?P<rank>\d+|\*):step(?:(?P<first>\d+)(?:-(?P<last>\d+))?|\*)"
    r"(?::(?P<action>sigkill|sigterm|sigstop|enospc|sleep\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True)
class Fault:
    """One specification; `rank` None means every rank, `steps` None every step."""

    point: str
    rank: int | None
    steps: range | None
    action: str | None

    def matches(self, name: str, *, rank: int, step: int) -> bool:
        """True where this fault fires."""
        return (
            self.point == name
            and (self.rank is None or self.rank == rank)
            and (self.steps is None or step in self.steps)
        )


def fault_point(name: str, *, rank: int, step: int) -> bool:
    """Fire the faults specified for this point; True when one did and the process lives on.

    Raises OSError (ENOSPC) for `enospc` and ConfigError for a specification that cannot be read.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    fired = [fault for fault in parse_faults(text) if fault.matches(name, rank=rank, step=step)]
    for fault in fired:
        _fire(fault)
    return bool(fired)


def parse_faults(text: str) -> list[Fault]:
    """The specifications in `text`."""
    return [_parse(part.strip()) for part in text.split(",") if part.strip()]


def _parse(text: str) -> Fault:
    match = _SPECIFICATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {text!r} is not area:point:rank<R|*>:step<N|N-M|*>[:action]")
    first = match["first"]
    steps = None if first is None else range(int(first), int(match["last"] or first) + 1)
    rank = None if match["rank"] == "*" else int(match["rank"])
    return Fault(point=match["point"], rank=rank, steps=steps, action=match["action"])


def _fire(fault: Fault) -> None:
    if fault.action is None:
        return
    if fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"<{fault.point}>")
    if fault.action.startswith("sleep"):
        time.sleep(float(fault.action.removeprefix("sleep")))
        return
    os.kill(os.getpid(), _SIGNALS[fault.action])
