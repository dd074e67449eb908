"""The job: what is missing is written, and what is written is committed.

Asks are dealt one by one from a list that all ranks agree on, so that a fast rank writes more; each rank commits its
answers as shards of its own. What is in a shard is never written again, by whatever number of ranks. A rank that is
killed loses what it had not committed: at most `output.commit_s` seconds and `output.shard_rows` answers.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from largekd.config.generate import GenerateConfig
from largekd.curation.answer_shards import Answer, next_number, read_answers, read_shard, shard_paths, write_shard
from largekd.curation.records import Ask, Written
from largekd.errors import GenerationError
from largekd.factory.backends import Backend
from largekd.factory.plan import Plan, Stage
from largekd.factory.tally import Tally
from largekd.runtime.counters import LooseRanks
from largekd.runtime.faults import fault_point
from largekd.runtime.files import TEMPORARY_PREFIX
from largekd.runtime.ranks import Ranks, Together, broadcast_object, gather_objects
from largekd.runtime.shutdown import StopSignal

logger = logging.getLogger(__name__)

# Prompts of about the same length are written together; a finer order would gain nothing.
_BUCKET_CHARACTERS = 64


@dataclass(frozen=True)
class Job:
    """All ranks call `run` together. backend: None on a rank that does not write, because rank 0 alone does.
    group: for agreements after long work, with a time-out of its own."""

    config: GenerateConfig
    folder: Path
    backend: Backend | None
    ranks: Ranks
    stop: StopSignal
    group: dist.ProcessGroup | None = None

    def run(self, plan: Plan) -> bool:
        """Whether every stage is whole; False: told to stop, or the backend ended early. Errors: LargeKDError."""
        stage: Stage | None = None
        with Together(group=self.group):
            stage = next(plan)
        while stage is not None:
            if not self._write(stage):
                return False
            if stage.is_last:
                return True
            with Together(group=self.group):
                answers = {written.key: written for _, written in read_answers(self.folder / stage.folder)}
                stage = plan.send(answers)
        return True

    def _write(self, stage: Stage) -> bool:
        folder = self.folder / stage.folder
        with Together(group=self.group):
            if self.ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    left.unlink()
        done = self._done(folder)
        first = int(broadcast_object(next_number(folder), group=self.group))
        again = self.config.output.retry_failed and stage.retries
        missing = _in_order(_missing(stage.asks, done=done, retry_failed=again))
        given = [answer for answer in stage.given if answer.written.key not in done]
        committer = Committer(
            folder=folder,
            numbers=(first + self.ranks.rank, self.ranks.world_size),
            rows=self.config.output.shard_rows,
            seconds=self.config.output.commit_s,
            rank=self.ranks.rank,
        )
        with Together(group=self.group):
            if self.ranks.is_main:
                committer.add_all(given)
        loose = LooseRanks(
            ranks=self.ranks, stop=self.stop, silent_s=self.config.collective_timeout_s, group=self.group
        )
        tally = Tally(
            counters=loose.counters,
            label=stage.name or "answers",
            total=len(stage.asks),
            done=len(stage.asks) - len(missing),
            show=self.ranks.is_main and self.config.log.progress,
        )
        with closing(tally), loose:
            self._answer(missing, loose=loose, committer=committer, tally=tally)
        if not loose.finished:
            return False
        done = self._done(folder)
        return all(ask.key in done for ask in stage.asks)

    def _done(self, folder: Path) -> dict[str, int]:
        """The keys in the folder's shards, with 0, or how often an ask failed that was never answered; the ranks share
        the reading out. A collective call."""
        found: list[tuple[str, bool]] = []
        # One listing for all: that of a host may lag behind what another one wrote.
        listed = gather_objects([path.name for path in shard_paths(folder)], group=self.group)
        names = sorted({name for names in listed for name in names})
        with Together(group=self.group):
            for name in names[self.ranks.rank :: self.ranks.world_size]:
                found += [(written.key, written.finish == "failed") for _, written in read_shard(folder / name)]
        everything = [pair for part in gather_objects(found, group=self.group) for pair in part]
        failures = Counter(key for key, failed in everything if failed)
        return dict(failures) | {key: 0 for key, failed in everything if not failed}

    def _answer(self, missing: Sequence[Ask], *, loose: LooseRanks, committer: "Committer", tally: Tally) -> None:
        # A writer loads its weights when it is asked to write.
        if self.backend is None or not missing:
            return
        taken: dict[str, Ask] = {}

        def dealt() -> Iterator[Ask]:
            while not loose.stopping() and (place := loose.counters.add("dealt") - 1) < len(missing):
                taken[missing[place].key] = missing[place]
                yield missing[place]

        def stopping() -> bool:
            # The backend asks often, so that what is finished is committed in time also while nothing new ends.
            committer.commit_if_due()
            return loose.stopping()

        try:
            for written in self.backend.write(dealt(), stopping=stopping):
                committer.add(Answer(taken.pop(written.key), written))
                tally.add(written)
        finally:
            # Also after an error: what was written was paid for.
            committer.commit()


class Committer:
    """Collects a rank's answers and commits them as shards: `rows` at a time, or after `seconds`."""

    def __init__(
        self,
        *,
        folder: Path,
        numbers: tuple[int, int],
        rows: int,
        seconds: float,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """numbers: that of the first shard, and the distance to the next."""
        self._folder, self._rows, self._seconds, self._rank, self._clock = folder, rows, seconds, rank, clock
        self._number, self._distance = numbers
        self._waiting: list[Answer] = []
        self._since = clock()

    def add(self, answer: Answer) -> None:
        """Take an answer; it is safe after the next commit."""
        if not self._waiting:
            self._since = self._clock()
        self._waiting.append(answer)
        self.commit_if_due()

    def add_all(self, answers: Iterable[Answer]) -> None:
        """Take many."""
        for answer in answers:
            self.add(answer)
        self.commit()

    def commit_if_due(self) -> None:
        """Commit when there are enough answers, or the oldest has waited long enough."""
        if len(self._waiting) >= self._rows or (self._waiting and self._clock() - self._since >= self._seconds):
            self.commit()

    def commit(self) -> None:
        """Commit what there is. Errors: GenerationError, such as for a full disk."""
        if not self._waiting:
            return
        try:
            fault_point("generate:before_shard", rank=self._rank, step=self._number)
            write_shard(self._folder, number=self._number, answers=self._waiting)
        except OSError as error:
            raise GenerationError(
                f"output.dir: {len(self._waiting)} answers cannot be written below {self._folder} ({error}). Make room "
                "and start again: what is there is kept."
            ) from error
        fault_point("generate:after_shard", rank=self._rank, step=self._number)
        self._waiting = []
        self._number += self._distance


def _missing(asks: Iterable[Ask], *, done: Mapping[str, int], retry_failed: bool) -> list[Ask]:
    """Each ask once that has no answer; with `retry_failed` also those that only failed."""
    wanted = {ask.key: ask for ask in asks}
    again = (lambda key: done[key] > 0) if retry_failed else (lambda key: False)
    return [replace(ask, attempt=done.get(key, 0)) for key, ask in wanted.items() if key not in done or again(key)]


def _in_order(asks: Iterable[Ask]) -> list[Ask]:
    """Long prompts first: a batch then holds prompts of about one length, and what is left for the end is short."""

    def length(ask: Ask) -> int:
        return sum(len(message["content"]) for message in ask.messages) // _BUCKET_CHARACTERS

    return sorted(asks, key=lambda ask: (-length(ask), ask.key))


def failed(ask: Ask, *, reason: str, prompt_tokens: int = 0) -> Written:
    """The answer of an ask that cannot be answered."""
    empty = Written(ask.key, "", "failed", prompt_tokens, 0)
    return replace(empty, failure=reason)
