"""What a run knows about itself beside weights and data: how far it is, for how long, and how it was doing."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from largekd.contracts import Progress


class Journal:
    """Progress, wall time over all resumptions, and the evaluations called `before`, `after` and `stage.<name>`.

    updates: how often AdamW had moved each parameter whose moments came from the phase before.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.evaluations: dict[str, dict[str, float]] = {}
        self.updates: dict[str, int] = {}
        self._earlier_s = 0.0
        self._started = time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds that this run has taken, over all of its starts."""
        return self._earlier_s + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON data."""
        return {
            "progress": asdict(self.progress),
            "evaluations": self.evaluations,
            "updates": self.updates,
            "wall_s": self.wall_s,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.progress = Progress(**state["progress"])
        self.evaluations = dict(state["evaluations"])
        self.updates = dict(state.get("updates", {}))
        self._earlier_s = float(state["wall_s"])
        self._started = time.monotonic()
