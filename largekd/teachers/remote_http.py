"""Requests to the replicas of a remote teacher: which one is asked, and how often."""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from largekd.runtime.http import HttpClient, PassingError, UnavailableError, full_jitter_s
from largekd.teachers.remote_wire import WireError

Read = TypeVar("Read")

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
_LONGEST_RETRY_AFTER_S = 60.0
_SET_ASIDE_S = 30.0
# A download that stays below this over `timeout_s` has stalled, though bytes come.
_STALLED_BYTES_PER_S = 16_384


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
        self._client = HttpClient(token=token, token_key="teacher.token_variable", timeout_s=timeout_s)

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
                body = self._client.exchange(
                    method, chosen + path, content=content, headers=headers, max_bytes=max_bytes
                )
                return read(body)
            except (PassingError, WireError) as error:
                failure = self._note(chosen, failure=error)
                status = error.status if isinstance(error, PassingError) else None
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
            with self._client.opened("GET", chosen + path) as response:
                for piece in response.iter_raw():
                    done += len(piece)
                    if done > size:
                        break
                    write(piece)
                    now_s = time.monotonic()
                    if now_s - since_s < self._timeout_s:
                        continue
                    if done - before < _STALLED_BYTES_PER_S * (now_s - since_s) and done < size:
                        raise PassingError(f"{path} stalled: {done - before} bytes in {now_s - since_s:.1f} s")
                    since_s, before = now_s, done
        except PassingError as error:
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
        return self._client.shown(f"{server}: {failure}")

    def _pause(self, attempt: int, *, error: Exception) -> None:
        wanted_s = error.retry_after_s if isinstance(error, PassingError) else None
        if wanted_s is None:
            wanted_s = full_jitter_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, draw=self._jitter)
        self._closed.wait(min(wanted_s, _LONGEST_RETRY_AFTER_S))
