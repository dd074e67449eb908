"""Requests to the replicas of a remote teacher: time-outs, retries with back-off, limits on what comes back."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx2

from largekd.errors import ConfigError
from largekd.runtime.logging import redact
from largekd.teachers.remote_wire import WireError

Read = TypeVar("Read")

CONNECT_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
_LONGEST_RETRY_AFTER_S = 60.0
_SET_ASIDE_S = 30.0
_SHOWN_CHARS = 300
_ERROR_BYTES = 4096
# A download that stays below this over `timeout_s` has stalled, though bytes come.
_STALLED_BYTES_PER_S = 16_384
# Statuses after which the same request may yet be answered.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

logger = logging.getLogger(__name__)


class _AnsweredError(Exception):
    """`status` is that of the server's answer; None where it gave none."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(_AnsweredError):
    """The request will not be answered however often it is sent: a wrong token, an unknown model, a redirect."""


class UnavailableError(_AnsweredError):
    """No replica gave an answer within the attempts that are allowed."""


class _PassingError(_AnsweredError):
    """One attempt failed; the next one may not. `retry_after_s` is what the server asked for."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, status=status)
        self.retry_after_s = retry_after_s


def read_token(variable: str, *, key: str) -> str:
    """The bearer token in an environment variable. Errors: ConfigError; `key` is the option that names it.

    A space or a line break has no place in a header: whoever sends it would be told so, with the header's text.
    """
    token = os.environ.get(variable, "")
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise ConfigError(
            f"{key} = {variable!r}: no such environment variable, or what it holds is no token: printable ASCII "
            "without spaces and without a line break at its end."
        )
    return token


class Replicas:
    """Servers that give the same answers. Calls come from several threads.

    Attempts go round robin from `first`; a server that failed is left alone for a while unless all have. Between two
    attempts lies a random pause of up to 0.25, 0.5, 1, ... s (full jitter), or what the server's Retry-After says.
    Redirects are refused, proxies of the environment are not used: texts go to the servers that are named.
    """

    def __init__(
        self, *, servers: tuple[str, ...], token: str | None, timeout_s: float, retries: int, first: int = 0
    ) -> None:
        self.servers = tuple(server.rstrip("/") for server in servers)
        self._timeout_s, self._retries, self._next = timeout_s, retries, first
        self._aside_until_s: dict[str, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._jitter = random.Random()
        self.failures = 0
        self._token = token
        headers = {"Accept-Encoding": "identity"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            follow_redirects=False,
            trust_env=False,
        )

    def ask(
        self,
        method: str,
        path: str,
        *,
        read: Callable[[bytes], Read],
        max_bytes: int,
        content: bytes | None = None,
        content_type: str = "application/json",
        server: str | None = None,
    ) -> Read:
        """What `read` makes of the answer's body, which has at most `max_bytes`; WireError of `read` is a failure.

        server: ask this one alone. Errors: RefusedError, UnavailableError.
        """
        headers = {} if content is None else {"Content-Type": content_type}
        failure, status = "", None
        for attempt in range(self._retries + 1):
            chosen = server or self._choose()
            try:
                body = self._exchange(method, chosen + path, content=content, headers=headers, max_bytes=max_bytes)
                return read(body)
            except (_PassingError, WireError) as error:
                failure = self._note(chosen, failure=error)
                status = error.status if isinstance(error, _PassingError) else None
                if attempt < self._retries:
                    self._pause(attempt, error=error)
                if self._closed.is_set():
                    break
        raise UnavailableError(failure, status=status)

    def download(self, path: str, *, write: Callable[[bytes], object], size: int) -> None:
        """Hand the pieces of a body of `size` bytes to `write`, once; it may take long, but not stand still.

        Errors: RefusedError, UnavailableError.
        """
        chosen, done = self._choose(), 0
        since_s, before = time.monotonic(), 0
        try:
            with self._client.stream("GET", chosen + path) as response:
                self._check_status(response, deadline_s=since_s + self._timeout_s)
                for piece in response.iter_raw():
                    done += len(piece)
                    if done > size:
                        break
                    write(piece)
                    now_s = time.monotonic()
                    if now_s - since_s < self._timeout_s:
                        continue
                    if done - before < _STALLED_BYTES_PER_S * (now_s - since_s) and done < size:
                        raise _PassingError(f"{path} stalled: {done - before} bytes in {now_s - since_s:.1f} s")
                    since_s, before = now_s, done
        except (httpx2.TransportError, httpx2.InvalidURL, _PassingError) as error:
            raise UnavailableError(self._note(chosen, failure=error)) from error
        if done != size:
            raise UnavailableError(f"{chosen}{path}: {done} bytes came of {size}")

    def close(self) -> None:
        """No further attempts; threads that wait for an answer find out when it comes or times out."""
        self._closed.set()
        self._client.close()

    def _choose(self) -> str:
        with self._lock:
            now_s = time.monotonic()
            for _ in self.servers:
                server = self.servers[self._next % len(self.servers)]
                self._next += 1
                if self._aside_until_s.get(server, 0.0) <= now_s:
                    return server
            # All have failed lately: whoever did so first has had most time to come back.
            return min(self.servers, key=lambda server: self._aside_until_s[server])

    def _note(self, server: str, *, failure: Exception) -> str:
        """The failure in words that may be shown."""
        with self._lock:
            self._aside_until_s[server] = time.monotonic() + _SET_ASIDE_S
            self.failures += 1
        said = str(failure) if isinstance(failure, _PassingError | WireError) else _described(failure)
        return self._shown(f"{server}: {said}")

    def _shown(self, text: str) -> str:
        """`text` without the token, in whatever form a server or a library repeats it."""
        return redact(text if self._token is None else text.replace(self._token, "***"))

    def _pause(self, attempt: int, *, error: Exception) -> None:
        wanted_s = error.retry_after_s if isinstance(error, _PassingError) else None
        if wanted_s is None:
            wanted_s = self._jitter.uniform(0.0, min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))
        self._closed.wait(wanted_s)

    def _exchange(
        self, method: str, url: str, *, content: bytes | None, headers: Mapping[str, str], max_bytes: int
    ) -> bytes:
        deadline_s = time.monotonic() + self._timeout_s
        pieces, size = [], 0
        try:
            with self._client.stream(method, url, content=content, headers=dict(headers)) as response:
                self._check_status(response, deadline_s=deadline_s)
                if int(_digits(response.headers.get("Content-Length")) or 0) > max_bytes:
                    raise _PassingError(f"the answer is longer than {max_bytes} bytes")
                for piece in response.iter_raw():
                    size += len(piece)
                    if size > max_bytes:
                        raise _PassingError(f"the answer is longer than {max_bytes} bytes")
                    if time.monotonic() > deadline_s:
                        raise _PassingError(f"the answer was not whole after {self._timeout_s:g} s")
                    pieces.append(piece)
        except (httpx2.TransportError, httpx2.InvalidURL, RuntimeError) as error:
            # A client that another thread closes raises a RuntimeError.
            raise _PassingError(_described(error)) from error
        return b"".join(pieces)

    def _check_status(self, response: Any, *, deadline_s: float) -> None:
        status = response.status_code
        if status == 200:
            return
        if 300 <= status < 400:
            message = f"{response.url} answered with a redirect ({status}), which is never followed"
            raise RefusedError(message, status=status)
        said = ""
        for piece in response.iter_raw():
            said += piece.decode(errors="replace")
            if len(said) > _ERROR_BYTES or time.monotonic() > deadline_s:
                break
        # Hidden first: half a token would not be known for one.
        message = f"status {status} ({self._shown(said)[:_SHOWN_CHARS].strip() or 'no text'})"
        if status in _PASSING:
            after = _digits(response.headers.get("Retry-After"))
            pause_s = min(float(after), _LONGEST_RETRY_AFTER_S) if after else None
            raise _PassingError(message, status=status, retry_after_s=pause_s)
        hint = ": the token is missing or wrong, see teacher.token_variable" if status in (401, 403) else ""
        raise RefusedError(f"{response.url} answered with {message}{hint}", status=status)


def _digits(value: str | None) -> str | None:
    return value if value is not None and value.isascii() and value.isdigit() and len(value) < 16 else None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
