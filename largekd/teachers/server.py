"""The HTTP side of a served teacher: what is asked is checked here, and handed to the ranks through a queue.

    GET /health      200 while the ranks answer            no token needed
    GET /v1/info     what is served: ServerInfo as JSON
    GET /v1/head     the vocabulary head: safetensors
    POST /v1/signals a request in, an answer out: see remote_wire.py

Errors are JSON: {"error": text}. A request that breaks a rule gets a status of the 400s and touches no rank.
"""

import asyncio
import hmac
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from largekd.errors import ConfigError
from largekd.teachers.remote_wire import CONTENT_TYPE, Limits, WireError
from largekd.teachers.served import Work, checked

BODY_TIMEOUT_S = 60.0
WAITING_REQUESTS = 256
_START_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.5

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Served:
    """What the HTTP side knows of the teacher."""

    info: Mapping[str, Any]
    head: Path
    limits: Limits
    works: "queue.Queue[Work]"
    token: str | None
    body_timeout_s: float = BODY_TIMEOUT_S


def application(served: Served) -> Starlette:
    """The four endpoints."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": served.works.qsize()})

    async def info(request: Request) -> Response:
        return JSONResponse(dict(served.info))

    async def head(request: Request) -> Response:
        return FileResponse(served.head, media_type="application/octet-stream")

    async def signals(request: Request) -> Response:
        return await _signals(request, served=served)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/info", _guarded(info, token=served.token)),
            Route("/v1/head", _guarded(head, token=served.token)),
            Route("/v1/signals", _guarded(signals, token=served.token), methods=["POST"]),
        ]
    )


def _guarded(handler: Handler, *, token: str | None) -> Handler:
    async def guarded(request: Request) -> Response:
        given = request.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return _error(401, "a bearer token is needed, and this is not it", {"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return guarded


async def _signals(request: Request, *, served: Served) -> Response:
    if served.works.qsize() >= WAITING_REQUESTS:
        return _error(503, "too many requests are waiting", {"Retry-After": "1"})
    try:
        body = await asyncio.wait_for(_body(request, limit=served.limits.body_bytes), served.body_timeout_s)
        await run_in_threadpool(checked, body, limits=served.limits, vocab_size=served.info["vocab_size"])
    except TimeoutError:
        return _error(408, f"the body was not whole after {served.body_timeout_s:g} s", {"Connection": "close"})
    except OverflowError as error:
        return _error(413, str(error), {"Connection": "close"})
    except ClientDisconnect:
        return _error(400, "the body was cut short")
    except WireError as error:
        return _error(422, str(error))
    answer: Future[bytes] = Future()
    served.works.put(Work(body=body, answer=answer))
    waiting = asyncio.wrap_future(answer)
    try:
        while not (await asyncio.wait({waiting}, timeout=_LOOK_EVERY_S))[0]:
            if await request.is_disconnected():
                return _error(499, "the client has left")
    finally:
        # Whoever has given up asks again: the ranks need not compute both. What is answered stays so.
        answer.cancel()
    if waiting.cancelled():
        return _error(503, "the server is stopping", {"Retry-After": "5"})
    return Response(waiting.result(), media_type=CONTENT_TYPE)


async def _body(request: Request, *, limit: int) -> bytes:
    """The body. Errors: OverflowError when it is longer than `limit`, before more of it is read."""
    length = request.headers.get("Content-Length", "0")
    if not (length.isascii() and length.isdigit()) or int(length) > limit:
        raise OverflowError(f"a request has at most {limit} bytes")
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise OverflowError(f"a request has at most {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


class HttpServer:
    """Context manager: answers in a thread of its own while it is open; `port` is the one that it got."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        )
        self._thread = threading.Thread(target=self._run, name="largekd-http", daemon=True)
        self._ended = threading.Event()
        self._wanted = f"{host}:{port}"
        self.port = port

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:
            # How uvicorn leaves when it cannot bind; it has told why.
            logger.error("the HTTP server could not be started on %s", self._wanted)
        finally:
            self._ended.set()

    def __enter__(self) -> "HttpServer":
        self._thread.start()
        waited_s = 0.0
        while not self._server.started and waited_s < _START_TIMEOUT_S and not self._ended.wait(0.05):
            waited_s += 0.05
        if not self._server.started:
            raise ConfigError(f"--host, --port: cannot listen on {self._wanted}; is the port taken? Choose another.")
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])
        return self

    def __exit__(self, *failure: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
