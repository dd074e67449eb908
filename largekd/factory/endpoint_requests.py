"""One ask, sent until it has an answer: limits, attempts, what is paid, and which failures are the user's to mend."""

import random
import threading

from largekd.config.generate import EndpointBackendConfig
from largekd.curation.records import Ask, Written
from largekd.errors import ConfigError, GenerationError, LargeKDError
from largekd.factory.cost import CostMeter, Usage, estimated_usage
from largekd.factory.endpoint_journal import Journal
from largekd.factory.endpoint_wire import (
    ChatAnswer,
    MalformedError,
    is_about_the_prompt,
    is_out_of_credit,
    longest_body,
    read_answer,
    request_body,
)
from largekd.factory.pace import Pace
from largekd.runtime.http import HttpClient, PassingError, RefusedError, full_jitter_s

_FIRST_PAUSE_S = 0.5
_LONGEST_RETRY_AFTER_S = 3600.0
_POLL_S = 0.5
_MODELS_BYTES = 1 << 22
# More, with no answer between them, are the server's or the request's fault and no prompt's.
_REFUSALS_IN_A_ROW = 20


class ChatRequests:
    """Answers asks from several threads. What is received is in the journal before it is returned.

    An exchange that broke off after it was sent, or whose answer is of no use, counts at the most that it can have
    cost. The header Idempotency-Key lets a server that knows it recognise an attempt whose answer was lost on the way.
    """

    def __init__(
        self, config: EndpointBackendConfig, *, client: HttpClient, journal: Journal, meter: CostMeter
    ) -> None:
        self._config, self._client, self._journal, self._meter = config, client, journal, meter
        self._url = config.url.rstrip("/")
        self._pace = Pace(requests_per_minute=config.requests_per_minute, tokens_per_minute=config.tokens_per_minute)
        self._jitter, self._lock, self._answered = random.Random(), threading.Lock(), 0
        self._refused = 0

    def answer(self, ask: Ask, *, halted: threading.Event) -> Written | None:
        """The answer to an ask that the meter has reserved.

        None: it was halted before the next attempt, or the cost limit does not allow one; nothing is reserved then.
        Errors: ConfigError or GenerationError for what the user can mend.
        """
        attempt, before, unusable, cost = 0, self._answered, 0, 0.0
        while True:
            if not self._wait_for_turn(ask, halted=halted):
                self._meter.release(ask)
                return None
            try:
                answer = self._exchange(ask, unusable=unusable)
            except RefusedError as error:
                self._unused(ask)
                if is_about_the_prompt(error) or self._is_of_this_ask(error, ask=ask):
                    return _failed(ask, reason=self._client.shown(str(error)), cost=cost)
                raise self._for_the_user(error) from error
            except MalformedError as error:
                unusable += 1
                cost += self._charge(ask, usage=error.usage)
                failure: PassingError | MalformedError = error
            except PassingError as error:
                if error.uncertain:
                    cost += self._charge(ask, usage=None)
                else:
                    self._unused(ask)
                failure = error
            else:
                return self._received(ask, answer=answer, cost=cost)
            if halted.is_set():
                return None
            pause_s = self._pause_s(failure, attempt=attempt)
            attempt += 1
            if attempt > self._config.retries:
                if not self._is_turned_away(failure, before=before):
                    reason = f"{attempt} attempts, the last one: {self._client.shown(str(failure))}"
                    return _failed(ask, reason=reason, cost=cost)
                attempt, before = 1, self._answered
            if halted.wait(pause_s) or not self._meter.reserve(ask):
                return None

    def _exchange(self, ask: Ask, *, unusable: int) -> ChatAnswer:
        body = self._client.exchange(
            "POST",
            f"{self._url}/chat/completions",
            max_bytes=longest_body(ask, config=self._config),
            content=request_body(ask, config=self._config),
            # An answer that was of no use must not be given again.
            headers={"Content-Type": "application/json", "Idempotency-Key": f"{ask.attempt_key}-{unusable}"},
        )
        return read_answer(body)

    def _wait_for_turn(self, ask: Ask, *, halted: threading.Event) -> bool:
        while not halted.is_set():
            wait_s = self._pace.try_take(tokens=_expected_tokens(ask))
            if wait_s <= 0:
                return True
            halted.wait(min(wait_s, _POLL_S))
        return False

    def _received(self, ask: Ask, *, answer: ChatAnswer, cost: float) -> Written:
        usage = answer.usage or estimated_usage(ask, written=answer.text)
        self._pace.settle(unused=_expected_tokens(ask) - usage.prompt_tokens - usage.written_tokens)
        paid = self._meter.settle(ask, usage=usage)
        written = Written(
            key=ask.key,
            text=answer.text,
            finish=answer.finish,
            prompt_tokens=usage.prompt_tokens,
            written_tokens=usage.written_tokens,
            mean_logp=answer.mean_logp,
            cost=cost + paid,
            failure=None if answer.failure is None else self._client.shown(answer.failure),
        )
        self._put(ask, cost=paid, written=written)
        with self._lock:
            self._answered += 1
            self._refused = 0
        return written

    def _charge(self, ask: Ask, *, usage: Usage | None) -> float:
        paid = self._meter.settle(ask, usage=usage)
        if paid:
            self._put(ask, cost=paid, written=None)
        return paid

    def _put(self, ask: Ask, *, cost: float, written: Written | None) -> None:
        try:
            self._journal.put(ask.attempt_key, cost=cost, written=written)
        except OSError as error:
            raise GenerationError(f"output.dir: an answer cannot be written to the disk ({error})") from error

    def write_off(self, ask: Ask) -> None:
        """Nobody waits for this ask any more, though its answer may yet be charged."""
        self._charge(ask, usage=None)

    def _unused(self, ask: Ask) -> None:
        self._meter.release(ask)
        self._pace.settle(unused=_expected_tokens(ask))

    def _pause_s(self, failure: PassingError | MalformedError, *, attempt: int) -> float:
        """A random pause, after what the server asks for; a server that asks for hours is a GenerationError."""
        longest_s = self._config.longest_pause_s
        pause_s = full_jitter_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=longest_s, draw=self._jitter)
        if isinstance(failure, MalformedError):
            return pause_s
        if failure.status == 429 and is_out_of_credit(failure.body):
            raise GenerationError(f"{self._url}: {failure}: no credit is left; start again when there is.") from failure
        after_s = failure.retry_after_s or 0.0
        if after_s > _LONGEST_RETRY_AFTER_S:
            raise GenerationError(
                f"{self._url} asks to wait {after_s:.0f} s ({failure}); start again then, everything so far is saved."
            ) from failure
        if after_s:
            # It means all requests, not only this one.
            self._pace.hold(seconds=after_s)
        return after_s + pause_s

    def _is_turned_away(self, failure: PassingError | MalformedError, *, before: int) -> bool:
        """Attempts are used up: True where others were served in the meantime (429), False where this ask is at fault.

        Errors: GenerationError where the server answers nobody: then no row is at fault.
        """
        others = self._answered > before
        if isinstance(failure, PassingError) and failure.status == 429:
            if others:
                return True
            raise GenerationError(
                f"{self._url} answers nothing but 429 ({self._client.shown(str(failure))}); lower backend.concurrency, "
                "set backend.requests_per_minute or backend.tokens_per_minute, and start again: what is there is kept."
            )
        if others or isinstance(failure, MalformedError) or self._is_there():
            return False
        raise GenerationError(
            f"backend.url = {self._url}: no answer after {self._config.retries + 1} attempts, the last one: "
            f"{self._client.shown(str(failure))}. Start again when the server is back: what is there is kept."
        )

    def _is_of_this_ask(self, error: RefusedError, *, ask: Ask) -> bool:
        """Whether a refusal in words that nobody knows is one of this prompt: others of the same form were answered,
        and not long ago."""
        if error.status not in (400, 413, 422) or not (self._answered or ask.attempt):
            return False
        with self._lock:
            self._refused += 1
            return self._refused <= _REFUSALS_IN_A_ROW

    def _is_there(self) -> bool:
        try:
            self._client.exchange("GET", f"{self._url}/models", max_bytes=_MODELS_BYTES)
        except RefusedError:
            # Not every server has such a list; one that says so is there.
            return True
        except PassingError:
            return False
        return True

    def _for_the_user(self, error: RefusedError) -> LargeKDError:
        said = self._client.shown(str(error))
        if error.status in (401, 403):
            return ConfigError(f"backend.key_variable = {self._config.key_variable!r}: {said}")
        if error.status == 402:
            return GenerationError(f"{said}: no credit is left; start again when there is.")
        if error.status == 404:
            return ConfigError(f"backend.url = {self._url!r}, backend.model = {self._config.model!r}: {said}")
        if error.status in (400, 422):
            return ConfigError(
                f"{said}. What a server does not know is left out with backend.omit, logprobs: false or another "
                "backend.length_parameter; what it needs besides goes into backend.extra."
            )
        return ConfigError(f"backend.url = {self._url!r}: {said}")


def _expected_tokens(ask: Ask) -> int:
    """What servers count against their limits before they know better."""
    return estimated_usage(ask, written="").prompt_tokens + ask.draw.max_new_tokens


def _failed(ask: Ask, *, reason: str, cost: float = 0.0) -> Written:
    return Written(key=ask.key, text="", finish="failed", prompt_tokens=0, written_tokens=0, cost=cost, failure=reason)
