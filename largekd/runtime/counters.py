"""Numbers that ranks share while each works at its own pace: work that is dealt, progress, a wish to stop.

They live in the process group's key-value store, so that reading one waits for no other rank's work. Without a process
group they are this process's own.
"""

import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from largekd.errors import LargeKDError
from largekd.runtime.ranks import Ranks, broadcast_object, raise_together
from largekd.runtime.shutdown import StopSignal

# Named apart from what the work itself counts.
_STOP, _DONE, _BEAT = "ranks/stop", "ranks/done", "ranks/beat"


class SharedCounters:
    """Whole numbers by name, each 0 at first. Making one is a collective call: its names are its own."""

    def __init__(self) -> None:
        self._own: defaultdict[str, int] = defaultdict(int)
        self._store: dist.Store | None = None
        if dist.is_initialized():
            # A second job in the same process group must not find the numbers of the first.
            label = str(broadcast_object(uuid.uuid4().hex))
            self._store = dist.PrefixStore(f"largekd/{label}", dist.distributed_c10d._get_default_store())

    def add(self, name: str, *, amount: int = 1) -> int:
        """The number after `amount` was added, in one step that no other rank can come between."""
        if self._store is not None:
            return int(self._store.add(name, amount))
        self._own[name] += amount
        return self._own[name]

    def get(self, name: str) -> int:
        """The number."""
        return self.add(name, amount=0)


class LooseRanks:
    """Context manager around work without collectives, in which ranks still stop together and notice each other's
    failure or silence. Making one is a collective call, and so is leaving the block.

    Every rank calls `stopping` often while it works. An error in any rank's block makes the others stop, and is raised
    on all of them at the end; `finished` is true after the block where all work was done rather than stopped.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        stop: StopSignal,
        silent_s: float,
        poll_s: float = 0.5,
        group: dist.ProcessGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = SharedCounters()
        self.finished = False
        self._group = group
        self._ranks, self._stop, self._silent_s, self._poll_s, self._clock = ranks, stop, silent_s, poll_s, clock
        self._asked = float("-inf")
        self._stopping = False

    def stopping(self) -> bool:
        """Whether any rank was told to stop, or failed; looked up now and then. Also tells that this rank lives."""
        now = self._clock()
        if self._stop.requested and not self._stopping:
            self._stopping = True
            self.counters.add(_STOP)
        if now - self._asked >= self._poll_s:
            self._asked = now
            self.counters.add(f"{_BEAT}/{self._ranks.rank}")
            self._stopping = self._stopping or self.counters.get(_STOP) > 0
        return self._stopping

    def __enter__(self) -> "LooseRanks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stopping = True
            self.counters.add(_STOP)
        self._meet()
        raise_together(error, group=self._group)
        self.finished = not self.counters.get(_STOP)

    def _meet(self) -> None:
        """Wait until every rank is here. Errors: LargeKDError when one has given no sign for `silent_s` seconds."""
        self.stopping()
        self.counters.add(_DONE)
        beats = {rank: (-1, self._clock()) for rank in range(self._ranks.world_size) if rank != self._ranks.rank}
        while self.counters.get(_DONE) < self._ranks.world_size:
            time.sleep(self._poll_s / 5)
            self.stopping()
            self._look_for_silence(beats)

    def _look_for_silence(self, beats: dict[int, tuple[int, float]]) -> None:
        now = self._clock()
        for rank, (count, since) in beats.items():
            found = self.counters.get(f"{_BEAT}/{rank}")
            if found != count:
                beats[rank] = (found, now)
            elif now - since > self._silent_s:
                raise LargeKDError(
                    f"rank {rank} has given no sign for {self._silent_s:g} s (collective_timeout_s); look at its "
                    "output. The same command goes on with what is committed."
                )
