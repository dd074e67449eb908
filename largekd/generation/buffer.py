"""Rollouts that are kept for some steps. The same on every rank, so that one copy in a checkpoint serves any number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from largekd.errors import CheckpointError


@dataclass(frozen=True)
class Rollout:
    """A prompt with an answer: `ids` of both, of which the first `prompt` are the prompt.

    logq, advantage: for each of the answer's tokens; `advantage` and `rewards` are empty without a policy gradient.
    sample_id: the training sample whose prompt it is.
    """

    sample_id: int
    ids: tuple[int, ...]
    prompt: int
    ended: bool
    logq: tuple[float, ...]
    rewards: tuple[float, ...] = ()
    advantage: tuple[float, ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The sampled tokens."""
        return self.ids[self.prompt :]


@dataclass(frozen=True)
class RolloutRow:
    """The rollouts of one row, the step that they were written in, and how many steps have used them."""

    rollouts: tuple[Rollout, ...]
    born: int
    uses: int = 0


class RolloutBuffer:
    """Rows by age; a row is given out at most once per step, `reuse` times in all, and not after `max_staleness` steps.

    Oldest rows go first.
    """

    def __init__(self, *, reuse: int, max_staleness: int) -> None:
        self._reuse, self._max_staleness = reuse, max_staleness
        self._rows: list[RolloutRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[RolloutRow, ...]:
        """All rows as they are now, oldest first."""
        return tuple(self._rows)

    def put_back(self, rows: Sequence[RolloutRow]) -> None:
        """Hold what `rows` was, and nothing else."""
        self._rows = list(rows)

    def usable(self, *, step: int) -> int:
        """Rows that may be used at `step`; those that may never be again are dropped."""
        self._rows = [row for row in self._rows if row.uses < self._reuse and step - row.born <= self._max_staleness]
        return len(self._rows)

    def add(self, rows: Sequence[RolloutRow]) -> None:
        """New rows, younger than all others."""
        self._rows += rows

    def take(self, count: int, *, step: int) -> list[RolloutRow]:
        """`count` rows for this step."""
        assert self.usable(step=step) >= count, "the shortage is written first"
        taken = self._rows[:count]
        used = [replace(row, uses=row.uses + 1) for row in taken]
        self._rows = [row for row in used if row.uses < self._reuse] + self._rows[count:]
        return taken

    def state(self) -> list[dict[str, Any]]:
        """JSON-able: all rows."""
        return [asdict(row) for row in self._rows]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Become what `state` returned. Errors: CheckpointError when it is something else."""
        try:
            self._rows = [
                RolloutRow(tuple(map(_restored, row["rollouts"])), born=int(row["born"]), uses=int(row["uses"]))
                for row in state
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the rollouts of this checkpoint cannot be read ({error})") from error


def _restored(fields: dict[str, Any]) -> Rollout:
    """A rollout from its JSON form, whose tuples are lists."""
    kept: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Rollout(**kept)
