"""An OpenAI-compatible server as the writer: many requests at the same time, and nothing paid for twice."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from largekd.config.generate import EndpointBackendConfig, SamplingConfig
from largekd.curation.answer_shards import read_shard, shard_paths
from largekd.curation.records import Ask, Written
from largekd.errors import ConfigError, LargeKDError
from largekd.factory.cost import CostMeter, estimated_usage
from largekd.factory.endpoint_journal import Journal
from largekd.factory.endpoint_requests import ChatRequests
from largekd.runtime.http import HttpClient, read_token

JOURNAL = "endpoint.journal"
_POLL_S = 0.2

logger = logging.getLogger(__name__)


class EndpointBackend:
    """Writes with a server; see factory.backends.Backend. Only rank 0 builds one.

    folder: the job's, with its shards and with the journal of what was received; an earlier job has been moved aside.
    An answer is on the disk as soon as it has come, before the job commits it: a process that is killed loses the
    requests that are under way, and no more. Errors: ConfigError; DataError for damaged shards.
    """

    only_main = True

    def __init__(
        self,
        config: EndpointBackendConfig,
        *,
        sampling: SamplingConfig,
        folder: Path,
    ) -> None:
        check_sampling(config, sampling=sampling)
        self._config, self._sampling = config, sampling
        token = None
        if config.key_variable is not None:
            token = read_token(config.key_variable, key="backend.key_variable")
        self._client = HttpClient(
            token=token,
            token_key="backend.key_variable",
            timeout_s=config.timeout_s,
            connections=config.concurrency + 1,
        )
        self._journal = Journal(folder / JOURNAL, committed=partial(committed_keys, folder))
        self.meter = CostMeter(config, spent=self._journal.spent)
        self._requests = ChatRequests(config, client=self._client, journal=self._journal, meter=self.meter)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the texts."""
        config = self._config
        return {"kind": "endpoint", "model": config.model, "omit": list(config.omit), "extra": config.extra}

    def write(self, asks: Iterator[Ask], *, stopping: Callable[[], bool]) -> Iterator[Written]:
        """Answers in the order in which they come.

        Told to stop, it drops what was not sent and waits `stop_grace_s` for the rest. An error of one request ends
        the others as a stop does, but waits for what is under way; then it is raised. Errors: LargeKDError.
        """
        flight = _Flight(requests=self._requests, meter=self.meter, config=self._config)
        try:
            while True:
                yield from self._take(asks, flight=flight, stopping=stopping)
                if stopping():
                    flight.halt()
                if not flight.under_way:
                    break
                yield from flight.landed()
            if flight.error is not None:
                raise flight.error
            if flight.limited:
                logger.warning(
                    "backend.max_cost = %g: another request might exceed it. What is there is kept; raise it and start "
                    "again to go on.",
                    self._config.max_cost,
                )
        finally:
            # Not only at the end: a caller that leaves early has paid for what is under way.
            flight.end()
            logger.info("%s: %s", self._config.model, self.meter.summary())

    def show(self, ask: Ask) -> str:
        """The conversation; the server's chat template is not known here."""
        return "\n".join(f"[{message['role']}]\n{message['content']}" for message in ask.messages)

    def count(self, ask: Ask) -> int:
        """An estimate from the texts' length."""
        return estimated_usage(ask, written="").prompt_tokens

    def close(self) -> None:
        """Give back the connections; safe to call twice."""
        self._client.close()
        self._journal.close()

    def _take(self, asks: Iterator[Ask], *, flight: "_Flight", stopping: Callable[[], bool]) -> Iterator[Written]:
        """Fill the free places; yields what needs no request."""
        while flight.has_room and not stopping():
            ask = flight.waiting or next(asks, None)
            flight.waiting = None
            if ask is None:
                return
            known = self._journal.received(ask.attempt_key) or self._too_long(ask)
            if known is not None:
                yield known
            elif not flight.start(ask):
                return

    def _too_long(self, ask: Ask) -> Written | None:
        tokens = self.count(ask)
        if tokens <= self._sampling.max_prompt_tokens:
            return None
        reason = (
            f"about {tokens} prompt tokens, more than sampling.max_prompt_tokens = {self._sampling.max_prompt_tokens}"
        )
        return Written(ask.key, "", "failed", prompt_tokens=tokens, written_tokens=0, failure=reason)


class _Flight:
    """The requests under way of one `write`.

    A thread for each, a daemon, because nothing wakes a thread that reads from a socket: the process may end before.
    The first request goes alone: what is wrong with all of them is then told once.
    """

    def __init__(self, *, requests: ChatRequests, meter: CostMeter, config: EndpointBackendConfig) -> None:
        self._requests, self._meter, self._config = requests, meter, config
        self._places = 1
        self._halted = threading.Event()
        self._deadline_s: float | None = None
        self.under_way: dict[Future[Written | None], Ask] = {}
        self.waiting: Ask | None = None
        self.error: LargeKDError | None = None
        self.limited = False

    @property
    def has_room(self) -> bool:
        return len(self.under_way) < self._places and not self._halted.is_set() and not self.limited

    def start(self, ask: Ask) -> bool:
        """Send an ask, if it fits under the cost limit beside the others; else it waits for them."""
        if not self._meter.reserve(ask):
            self.waiting = ask
            # Those under way may cost less than they can.
            self.limited = not self.under_way
            return False
        future: Future[Written | None] = Future()
        self.under_way[future] = ask
        threading.Thread(target=self._run, args=(ask, future), name="largekd-endpoint", daemon=True).start()
        return True

    def landed(self) -> Iterator[Written]:
        """What has come within a moment."""
        done, _ = wait(self.under_way, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            del self.under_way[future]
            error = future.exception()
            if isinstance(error, LargeKDError):
                self.error = self.error or error
                self._halted.set()
                continue
            self._places = self._config.concurrency
            written = future.result()
            if written is not None:
                yield written
            elif not self._halted.is_set():
                self.limited = True

    def halt(self) -> None:
        """No further attempts; after the grace nobody waits for those that are under way."""
        self._halted.set()
        now_s = time.monotonic()
        if self._deadline_s is None:
            self._deadline_s = now_s + self._config.stop_grace_s
        late = [ask for future, ask in self.under_way.items() if not future.done()]
        if now_s >= self._deadline_s and late:
            logger.warning("%d requests were under way for too long to wait for them", len(late))
            for ask in late:
                self._requests.write_off(ask)
            self.under_way = {future: ask for future, ask in self.under_way.items() if future.done()}

    def end(self) -> None:
        """Wait for what is under way, whose answers go into the journal."""
        while self.under_way:
            self.halt()
            wait(self.under_way, timeout=_POLL_S)
            self.under_way = {future: ask for future, ask in self.under_way.items() if not future.done()}

    def _run(self, ask: Ask, future: Future[Written | None]) -> None:
        try:
            future.set_result(self._requests.answer(ask, halted=self._halted))
        except LargeKDError as error:
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(error)
            raise


def committed_keys(folder: Path) -> set[str]:
    """The attempts whose answers are in a job's shards, those of its stages too. Errors: DataError."""
    folders = {path.parent for path in folder.rglob("shard_*.jsonl")}
    return {answer.ask.attempt_key for one in folders for path in shard_paths(one) for answer in read_shard(path)}


def check_sampling(config: EndpointBackendConfig, *, sampling: SamplingConfig) -> None:
    """ConfigError where the server's dialect has no word for what is asked."""
    if config.dialect == "vllm":
        return
    for name, used in (("top_k", sampling.top_k is not None), ("min_p", sampling.min_p > 0)):
        if used:
            raise ConfigError(
                f"sampling.{name}: the OpenAI protocol has no such parameter; leave it out, or set backend.dialect: "
                "vllm for a server that takes it."
            )
