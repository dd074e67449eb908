"""Limits of requests and tokens per minute."""

import threading
import time
from collections.abc import Callable

_MINUTE_S = 60.0


class Pace:
    """Tells several threads when each may send its next request.

    Both limits are token buckets that hold a single request: requests leave evenly spaced, without a burst at the
    start. A minute sees at most `requests_per_minute` requests, and `tokens_per_minute` tokens besides those of its
    first request. Null: no limit. Source: ITU-T I.371, generic cell rate algorithm.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request_s = _MINUTE_S / requests_per_minute if requests_per_minute else 0.0
        self._token_s = _MINUTE_S / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._next_request_s = self._next_token_s = self._held_until_s = clock()

    def try_take(self, *, tokens: int) -> float:
        """0 when a request of `tokens` tokens may leave now, and is counted; else seconds after which to ask again."""
        with self._lock:
            now_s = self._clock()
            wait_s = max(self._held_until_s, self._next_request_s, self._next_token_s) - now_s
            if wait_s > 0:
                return wait_s
            self._next_request_s = now_s + self._request_s
            self._next_token_s = now_s + tokens * self._token_s
            return 0.0

    def settle(self, *, unused: int) -> None:
        """Give back tokens that were counted and not used; a negative number counts more."""
        with self._lock:
            self._next_token_s -= unused * self._token_s

    def hold(self, *, seconds: float) -> None:
        """No request leaves for so long: the server said so."""
        with self._lock:
            self._held_until_s = max(self._held_until_s, self._clock() + seconds)
