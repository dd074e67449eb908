"""The remote teacher: signals come from servers, one step ahead, and all ranks wait for them together."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from largekd.contracts import Batch, SignalRequest, TeacherSignal
from largekd.errors import TeacherError
from largekd.runtime.http import RefusedError, UnavailableError
from largekd.runtime.ranks import all_sum, gather_objects
from largekd.teachers.protocol import LearnsNothing, StoppedWaitingError, TeacherGoneError

_POLL_S = 1.0
_FIRST_WORD_S = 10.0
_WORD_EVERY_S = 60.0
_PREPARED = 2

logger = logging.getLogger(__name__)

Answer = dict[str, Tensor]


class TeacherRefusesError(TeacherGoneError):
    """A server will never answer the request of this step: its token, its model or its address has changed."""


class Source(Protocol):
    """How one kind of server is asked, and how its answers become signals."""

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError when the servers cannot serve the request."""

    def split(self, micro_batches: Sequence[Batch]) -> list[slice]:
        """The micro-batches of a step as those of one or a few requests."""

    def ask(self, micro_batches: Sequence[Batch], *, request: SignalRequest, place: int) -> list[Answer]:
        """One request and its answer; `place` is the first micro-batch's in the step. Called from a thread.

        Errors: RefusedError, UnavailableError.
        """

    def signal(self, answer: Answer, *, batch: Batch, request: SignalRequest) -> TeacherSignal:
        """The signal of `batch`, on its device."""

    @property
    def failures(self) -> int:
        """Attempts that failed so far."""

    def close(self) -> None:
        """Make no further attempts."""


@dataclass(frozen=True)
class Patience:
    """What a rank that waits needs of its run: the watchdog, the wish to stop, how long, and with whom it agrees."""

    wait_s: float
    beat: Callable[[str], object] = lambda section: None
    stopping: Callable[[], bool] = lambda: False
    group: dist.ProcessGroup | None = None


class RemoteTeacher(LearnsNothing):
    """Signals of a teacher on other machines.

    Every rank asks for its own micro-batches. Before the student's forward the ranks agree that all have their
    answers, so that what befalls one rank befalls all: while a server is away they wait together, say so once a
    minute, keep their watchdogs quiet, and leave when they are told to stop.
    """

    def __init__(self, source: Source, *, patience: Patience) -> None:
        self._source = source
        self._patience = patience
        self._jobs: list[_Job] = []
        self._waited_s = 0.0

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for what no server sends, such as captured layers."""
        if request.taps:
            raise TeacherError(
                "a remote teacher sends no captured layers, which objective.features and objective.attention compare; "
                "remove them or use a teacher that runs in this job, such as teacher.kind online."
            )
        self._source.check(request)

    def prepare(self, micro_batches: Sequence[Batch], *, request: SignalRequest) -> None:
        """See ReadsAhead.prepare. A step that is under way already is not asked for again."""
        if request.distribution is not None and not any(job.serves(micro_batches, request) for job in self._jobs):
            self._jobs = [*self._jobs, _Job(self._source, micro_batches=micro_batches, request=request)][-_PREPARED:]

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """See Teacher.signals. Errors, on all ranks and before anything else is done: TeacherRefusesError,
        TeacherGoneError after `wait_s`, StoppedWaitingError."""
        if request.distribution is None:
            yield iter([None] * len(micro_batches))
            return
        job = next((job for job in self._jobs if job.serves(micro_batches, request)), None)
        if job is None:
            job = _Job(self._source, micro_batches=micro_batches, request=request)
        else:
            self._jobs.remove(job)
        answers = self._agreed(job)
        yield (
            self._source.signal(answer, batch=batch, request=request)
            for answer, batch in zip(answers, micro_batches, strict=True)
        )

    def _agreed(self, job: "_Job") -> list[Answer]:
        """The answers, once every rank has its own. A collective call."""
        started_s = spoke_s = time.monotonic()
        lost_s: float | None = None
        first_word = _FIRST_WORD_S
        while True:
            job.wait(_POLL_S)
            now_s = time.monotonic()
            speaks = now_s - spoke_s >= first_word
            expired = lost_s is not None and now_s - lost_s >= self._patience.wait_s
            votes = self._vote(job, speaks=speaks, expired=expired)
            if votes.refused:
                self._refuse(job)
            if not votes.missing:
                self._waited_s += time.monotonic() - started_s
                if lost_s is not None and _is_main():
                    logger.warning("the teacher's servers answer again after %.0f s", time.monotonic() - lost_s)
                return job.answers()
            self._patience.beat("waiting for the teacher's servers")
            if votes.stopping:
                raise StoppedWaitingError
            lost_s = now_s if votes.lost and lost_s is None else lost_s
            if votes.speaks:
                spoke_s, first_word = now_s, _WORD_EVERY_S
                self._speak(job, votes=votes, waited_s=now_s - started_s)
            if votes.expired:
                self._give_up(job)
            job.restart_failed()

    def _vote(self, job: "_Job", *, speaks: bool, expired: bool) -> "_Votes":
        main = _is_main()
        mine = [
            not job.is_done,
            job.lost is not None,
            job.refusal is not None,
            self._patience.stopping(),
            speaks and main,
            expired and main,
        ]
        return _Votes(*all_sum(torch.tensor(mine, dtype=torch.int32), group=self._patience.group).tolist())

    def _refuse(self, job: "_Job") -> None:
        """Raises on all ranks with one rank's reason, so that all of them save first. A collective call."""
        refusals = gather_objects(job.refusal, group=self._patience.group)
        reason = next(refusal for refusal in refusals if refusal)
        raise TeacherRefusesError(f"teacher.servers: {reason}. Mend that, then start the same command again.")

    def _speak(self, job: "_Job", *, votes: "_Votes", waited_s: float) -> None:
        """A line on rank 0. A collective call."""
        reasons = gather_objects(job.last_failure, group=self._patience.group)
        reason = next((reason for reason in reasons if reason), "no answer yet")
        if _is_main():
            logger.warning(
                "the run waits for the teacher's servers: %d of %d ranks have had no answer for %.0f s (%s); it saves "
                "and stops when none has come %.0f s after the first was given up",
                votes.missing,
                len(reasons),
                waited_s,
                reason,
                self._patience.wait_s,
            )

    def _give_up(self, job: "_Job") -> None:
        """Raises on all ranks with one rank's reason. A collective call."""
        reasons = gather_objects(job.last_failure, group=self._patience.group)
        reason = next((reason for reason in reasons if reason), "no answer")
        raise TeacherGoneError(
            f"teacher.servers: no answer for teacher.wait_s = {self._patience.wait_s:g} s ({reason}). Start the server "
            "again, then the same command goes on with the run."
        )

    @property
    def metrics(self) -> Mapping[str, float]:
        """Seconds that this rank's steps waited for answers, and attempts that failed, since the run's start."""
        return {"teacher/waited_s": self._waited_s, "teacher/failed_requests": float(self._source.failures)}

    def close(self) -> None:
        """Leave what is under way to itself."""
        self._source.close()


@dataclass(frozen=True)
class _Votes:
    """How many ranks have no answer, have given up for now, are refused, want to stop; and what rank 0 decided."""

    missing: int
    lost: int
    refused: int
    stopping: int
    speaks: int
    expired: int


class _Job:
    """The requests of one step, each in a thread of its own; a thread that still waits does not keep the process."""

    def __init__(self, source: Source, *, micro_batches: Sequence[Batch], request: SignalRequest) -> None:
        self._source, self._request = source, request
        self._batches = tuple(micro_batches)
        self._parts = source.split(self._batches)
        self._found: list[list[Answer] | None] = [None] * len(self._parts)
        self._errors: dict[int, str] = {}
        self._changed = threading.Condition()
        self._running = 0
        self.refusal: str | None = None
        self.last_failure = ""
        for part in range(len(self._parts)):
            self._start(part, after_s=0.0)

    def serves(self, micro_batches: Sequence[Batch], request: SignalRequest) -> bool:
        """Whether this is about these micro-batches; copies on another device keep their list of segments."""
        return (
            request == self._request
            and len(micro_batches) == len(self._batches)
            and all(map(_is_same, self._batches, micro_batches))
        )

    @property
    def is_done(self) -> bool:
        """Whether all answers are here."""
        return all(found is not None for found in self._found)

    @property
    def lost(self) -> str | None:
        """Why a request was given up for now; None while there is hope."""
        with self._changed:
            return next(iter(self._errors.values()), None)

    def wait(self, timeout_s: float) -> None:
        """Until nothing runs any more, or `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, timeout=timeout_s)

    def answers(self) -> list[Answer]:
        """One per micro-batch."""
        return [answer for found in self._found if found is not None for answer in found]

    def restart_failed(self) -> None:
        """Try again, after a moment, what was given up."""
        with self._changed:
            parts, self._errors = list(self._errors), {}
        for part in parts:
            self._start(part, after_s=_POLL_S)

    def _start(self, part: int, *, after_s: float) -> None:
        with self._changed:
            self._running += 1
        threading.Thread(target=self._run, args=(part, after_s), name="largekd-teacher", daemon=True).start()

    def _run(self, part: int, after_s: float) -> None:
        place = self._parts[part]
        found: list[Answer] | None = None
        lost = refused = None
        time.sleep(after_s)
        try:
            found = self._source.ask(self._batches[place], request=self._request, place=place.start)
        except UnavailableError as error:
            lost = str(error)
        except RefusedError as error:
            refused = str(error)
        except BaseException as error:
            # A thread that ends without a word would leave all ranks waiting.
            refused = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._found[part] = found
                self.refusal = refused or self.refusal
                if lost is not None:
                    self._errors[part] = self.last_failure = lost
                self._running -= 1
                self._changed.notify_all()


def _is_same(mine: Batch, other: Any) -> bool:
    if mine is other:
        return True
    if not mine.segments or mine.segments is not other.segments or mine.origin != other.origin:
        return False
    ids, others = mine.input_ids_BS, other.input_ids_BS
    # Comparing on an accelerator would wait for it; there the list of segments, made once a batch, has to do.
    return ids.shape == others.shape and (others.device != ids.device or torch.equal(ids, others))


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
