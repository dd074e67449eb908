"""Rows to optimizer steps: which rows belong to which step, and whose they are."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from largekd.contracts import Batch, Origin
from largekd.data.collate import collate
from largekd.data.mixture import Mixture
from largekd.data.packing import Row, Rows, one_per_row, pack
from largekd.data.store import SampleStore
from largekd.errors import ConfigError, DataError

Item = TypeVar("Item")
FILLER_ROW: Row = ()
# Keys of a state that must be equal for a position to mean the same rows.
IDENTITY = ("fingerprint", "seed", "global_batch_size", "sequence_length", "packing", "shuffle", "mixture")


class Position(NamedTuple):
    """The next step to be given out: `step` counts over all epochs, `step_in_epoch` within `epoch`."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class RowSettings:
    """What decides a step's rows, besides the samples."""

    sequence_length: int
    packing: bool
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True


class RowLoader:
    """Yields, for each optimizer step, this rank's micro-batches.

    The rows of a step are a contiguous slice of the epoch's rows and depend on samples, `settings` and epoch alone.
    Rank r takes the r-th contiguous block of them. The last step of an epoch is filled with weightless rows, so every
    rank runs the same number of micro-batches in every step; a rank may then have no counted token.
    """

    def __init__(
        self,
        samples: SampleStore,
        *,
        settings: RowSettings,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        prefetch_steps: int = 2,
        mixture: Mixture | None = None,
    ) -> None:
        """Args: prefetch_steps: steps that a background thread makes ahead of use; 0: none, no thread.
        mixture: what an epoch has of each of several sources; None: every sample once.

        Raises:
            ConfigError: a global batch that does not divide, or neither max_steps nor max_epochs.
            DataError: a sample that is longer than a row.
        """
        if settings.global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"train.global_batch_size = {settings.global_batch_size} must be a multiple of "
                f"train.micro_batch_size x ranks = {micro_batch_size} x {world_size}."
            )
        if max_steps is None and max_epochs is None:
            raise ConfigError("set train.max_steps or train.max_epochs: without either a run has no end.")
        samples.check_fits(sequence_length=settings.sequence_length)
        self._samples, self._settings, self._mixture = samples, settings, mixture
        self._micro_batch_size, self._rank, self._world_size = micro_batch_size, rank, world_size
        self._max_steps, self._max_epochs = max_steps, max_epochs
        self._prefetch_steps = prefetch_steps
        self._position = Position()
        self._former = self._position
        self._steps: _Peekable[tuple[Position, list[Batch]]] | None = None
        self._rows_of_epoch: dict[int, Rows] = {}

    def rows(self, *, epoch: int) -> Rows:
        """All rows of `epoch` in order, the same on every rank."""
        key = epoch if self._settings.shuffle or self._mixture is not None else 0
        if key not in self._rows_of_epoch:
            made = _epoch_rows(self._samples, settings=self._settings, epoch=epoch, mixture=self._mixture)
            # Two epochs at once: the consumer may still be in one while the thread is ahead in the next.
            kept = {old: rows for old, rows in self._rows_of_epoch.items() if old == key - 1}
            self._rows_of_epoch = {**kept, key: made}
            return made
        return self._rows_of_epoch[key]

    def steps_per_epoch(self, *, epoch: int) -> int:
        """Steps of `epoch`; with packing and shuffling epochs may differ by a few rows."""
        return -(-len(self.rows(epoch=epoch)) // self._settings.global_batch_size)

    def total_steps(self) -> int:
        """Steps until max_steps or max_epochs, whichever comes first. Packs every epoch that it must count."""
        total, epoch = 0, 0
        while self._max_epochs is not None and epoch < self._max_epochs:
            if self._max_steps is not None and total >= self._max_steps:
                return self._max_steps
            total += self.steps_per_epoch(epoch=epoch)
            epoch += 1
        if self._max_steps is None:
            return total
        return self._max_steps if self._max_epochs is None else min(total, self._max_steps)

    def step_rows(self, *, epoch: int, step_in_epoch: int) -> list[Row]:
        """The `global_batch_size` rows of one step over all ranks, with filler at the end of a short one."""
        size = self._settings.global_batch_size
        rows = self.rows(epoch=epoch)[step_in_epoch * size : (step_in_epoch + 1) * size]
        return rows + [FILLER_ROW] * (size - len(rows))

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps from the current position to the end. A step counts as consumed once it has been yielded."""
        made = _ahead(self._produce(self._position), depth=self._prefetch_steps)
        self._steps = steps = _Peekable(made)
        try:
            for after, micro_batches in steps:
                self._former, self._position = self._position, after
                yield micro_batches
        finally:
            made.close()

    def upcoming(self) -> list[Batch] | None:
        """The step that the newest iterator will yield next, None at its end; it does not count as consumed by this."""
        ahead = None if self._steps is None else self._steps.peek()
        return None if ahead is None else ahead[1]

    def take_back(self) -> None:
        """The step that was yielded last does not count as consumed; iterators are not moved."""
        self._position = self._former

    def state(self) -> dict[str, Any]:
        """JSON-able position after the last yielded step, with what identifies its rows."""
        return {**self._position._asdict(), **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the step at which `state` was taken; iterators made before are not moved.

        Ranks, micro-batch size and max_steps may differ from those of the saved run.

        Raises:
            DataError: other data, or a setting under which the position would mean other rows; each is named.
        """
        mine = self._identity()
        different = [
            f"{name} was {state.get(name)!r}, is {mine.get(name)!r}"
            for name in IDENTITY
            if state.get(name) != mine.get(name)
        ]
        if different:
            raise DataError(
                "the data position of this checkpoint does not fit the run: "
                + "; ".join(different)
                + ". Restore the former data and data.*/train.* keys, or start in a new run.dir."
            )
        self._position = Position(**{name: int(state[name]) for name in Position._fields})

    def _identity(self) -> dict[str, Any]:
        mixture = {} if self._mixture is None else {"mixture": self._mixture.identity()}
        return {"fingerprint": self._samples.fingerprint, **asdict(self._settings), **mixture}

    def _produce(self, position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        """Every step from `position` on, with the position after it."""
        while not self._ends_at(position):
            epoch, step_in_epoch, step = position
            steps = self.steps_per_epoch(epoch=epoch)
            rows = self.step_rows(epoch=epoch, step_in_epoch=step_in_epoch)
            in_epoch = step_in_epoch + 1 < steps
            position = Position(epoch if in_epoch else epoch + 1, step_in_epoch + 1 if in_epoch else 0, step + 1)
            yield position, self._micro_batches(rows)

    def _ends_at(self, position: Position) -> bool:
        if self._max_steps is not None and position.step >= self._max_steps:
            return True
        return self._max_epochs is not None and position.epoch >= self._max_epochs

    def _micro_batches(self, rows: Sequence[Row]) -> list[Batch]:
        block = len(rows) // self._world_size
        own = rows[self._rank * block : (self._rank + 1) * block]
        size = self._micro_batch_size
        return [
            collate(
                own[start : start + size],
                samples=self._samples,
                sequence_length=self._settings.sequence_length,
                packing=self._settings.packing,
            )
            for start in range(0, block, size)
        ]


def evaluation_batches(
    samples: SampleStore,
    *,
    sequence_length: int,
    packing: bool,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
    origin: Origin = "eval",
) -> Iterator[Batch]:
    """One unshuffled walk over the rows, shared out so that every rank yields the same number of micro-batches.

    Which rows are evaluated depends on `max_rows` alone; ranks that run out yield weightless rows.

    Raises:
        DataError: a sample that is longer than a row.
    """
    samples.check_fits(sequence_length=sequence_length)
    settings = RowSettings(
        sequence_length=sequence_length, packing=packing, global_batch_size=micro_batch_size, shuffle=False
    )
    rows = _epoch_rows(samples, settings=settings, epoch=0)
    stop = len(rows) if max_rows is None else min(max_rows, len(rows))
    for start in range(0, stop, micro_batch_size * world_size):
        begin = start + rank * micro_batch_size
        own = rows[begin : min(begin + micro_batch_size, stop)]
        own += [FILLER_ROW] * (micro_batch_size - len(own))
        yield collate(own, samples=samples, sequence_length=sequence_length, packing=packing, origin=origin)


def _epoch_rows(samples: SampleStore, *, settings: RowSettings, epoch: int, mixture: Mixture | None = None) -> Rows:
    order = np.arange(len(samples), dtype=np.int64)
    if mixture is not None:
        order = mixture.order(epoch=epoch, seed=settings.seed, shuffle=settings.shuffle)
    elif settings.shuffle:
        order = np.random.default_rng((settings.seed, epoch)).permutation(order)
    if settings.packing:
        return pack(samples.lengths, sequence_length=settings.sequence_length, order=order)
    return one_per_row(samples.lengths, order=order)


class _Peekable(Iterator[Item]):
    """`items`, with a look at the next one."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._held = items, list[Item]()

    def __next__(self) -> Item:
        return self._held.pop() if self._held else next(self._items)

    def peek(self) -> Item | None:
        """What `next` will give; None at the end."""
        if not self._held:
            self._held.extend(islice(self._items, 1))
        return self._held[0] if self._held else None


def _ahead(items: Iterator[Item], *, depth: int) -> Generator[Item]:
    """`items`, made up to `depth` ahead in a background thread; its exceptions are raised here, in their order."""
    if depth == 0:
        yield from items
        return
    end = object()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
    try:
        pending: deque[Future[Any]] = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
