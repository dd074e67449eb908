"""Requests to servers: one attempt at a time, bounded in time and in size, and no secret in what is said of it.

Whether and when to try again is the caller's to decide: the kind of error tells whether that may help.
"""

import email.utils
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx2

from largekd.errors import ConfigError
from largekd.runtime.logging import redact

CONNECT_TIMEOUT_S = 5.0
_SHOWN_CHARS = 300
_ERROR_BYTES = 4096
# Statuses after which the same request may yet be answered.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class AnsweredError(Exception):
    """`status` is that of the server's answer, None where it gave none; `body` the beginning of what it said."""

    def __init__(self, message: str, *, status: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.status, self.body = status, body


class RefusedError(AnsweredError):
    """The request will not be answered however often it is sent: a wrong token, an unknown model, a redirect."""


class UnavailableError(AnsweredError):
    """No answer came within the attempts that are allowed."""


class PassingError(AnsweredError):
    """One attempt failed; the next one may not.

    `retry_after_s` is what the server asked for. `uncertain`: the request was sent and the server may have done its
    work, but nothing of use came back.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        body: str = "",
        retry_after_s: float | None = None,
        uncertain: bool = False,
    ) -> None:
        super().__init__(message, status=status, body=body)
        self.retry_after_s, self.uncertain = retry_after_s, uncertain


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


def full_jitter_s(attempt: int, *, first_s: float, longest_s: float, draw: random.Random) -> float:
    """A pause drawn from [0, min(first · 2^attempt, longest)] seconds.

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    # The exponent is bounded so that it stays a float.
    return draw.uniform(0.0, min(first_s * 2 ** min(attempt, 64), longest_s))


class HttpClient:
    """Sends requests; calls come from several threads.

    token: sent as a bearer token to whatever address is asked, and hidden in everything that is said. token_key: the
    option that names it. Redirects are refused, proxies of the environment are not used: texts go to the servers that
    are named. timeout_s bounds a whole exchange, not only the wait for the next byte.
    """

    def __init__(self, *, token: str | None, token_key: str, timeout_s: float, connections: int = 100) -> None:
        self._token, self._token_key, self._timeout_s = token, token_key, timeout_s
        headers = {"Accept-Encoding": "identity"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            trust_env=False,
        )

    def close(self) -> None:
        """Requests under way in other threads end with a PassingError."""
        self._client.close()

    def shown(self, text: str) -> str:
        """`text` without the token, in whatever form a server or a library repeats it."""
        return redact(text if self._token is None else text.replace(self._token, "***"))

    def exchange(
        self,
        method: str,
        url: str,
        *,
        max_bytes: int,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of the answer with status 200, of at most `max_bytes`. Errors: RefusedError, PassingError."""
        deadline_s = time.monotonic() + self._timeout_s
        pieces, size = [], 0
        with self.opened(method, url, content=content, headers=headers) as response:
            if int(_digits(response.headers.get("Content-Length")) or 0) > max_bytes:
                raise PassingError(f"the answer is longer than {max_bytes} bytes", uncertain=True)
            for piece in response.iter_raw():
                size += len(piece)
                if size > max_bytes:
                    raise PassingError(f"the answer is longer than {max_bytes} bytes", uncertain=True)
                if time.monotonic() > deadline_s:
                    raise PassingError(f"the answer was not whole after {self._timeout_s:g} s", uncertain=True)
                pieces.append(piece)
        return b"".join(pieces)

    @contextmanager
    def opened(
        self, method: str, url: str, *, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Any]:
        """The response with status 200, its body not yet read; what breaks while it is read is a PassingError too.

        Errors: RefusedError, PassingError.
        """
        deadline_s = time.monotonic() + self._timeout_s
        try:
            with self._client.stream(method, url, content=content, headers=dict(headers or {})) as response:
                self._check_status(response, deadline_s=deadline_s)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.InvalidURL) as error:
            raise PassingError(described(error)) from error
        except (httpx2.TransportError, RuntimeError) as error:
            # A client that another thread closes raises a RuntimeError.
            raise PassingError(described(error), uncertain=True) from error

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
        said = self.shown(said)[:_ERROR_BYTES]
        message = f"status {status} ({said[:_SHOWN_CHARS].strip() or 'no text'})"
        if status in _PASSING:
            raise PassingError(message, status=status, body=said, retry_after_s=_retry_after_s(response.headers))
        hint = f": the token is missing or wrong, see {self._token_key}" if status in (401, 403) else ""
        raise RefusedError(f"{response.url} answered with {message}{hint}", status=status, body=said)


def described(error: Exception) -> str:
    """An error of a library in words; its class where it has none."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks for: a number or a date (RFC 9110, 10.2.3), or milliseconds in a header that some
    servers have besides; None where it says nothing of sense."""
    finer, said = headers.get("retry-after-ms"), headers.get("Retry-After")
    if finer is not None and _digits(finer) is not None:
        return int(finer) / 1000
    if said is None:
        return None
    try:
        number = float(said)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(said)
        except ValueError:
            return None
        number = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(number, 0.0) if math.isfinite(number) else None


def _digits(value: str | None) -> str | None:
    return value if value is not None and value.isascii() and value.isdigit() and len(value) < 16 else None
