"""The HTTP side of a served teacher: what it refuses, and that no refusal reaches the ranks."""

import json
import queue
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import pytest
import torch
from teachers.test_remote_client import INFO, LIMITS
from teachers.test_remote_wire import damaged, parts_of, raw, request, tensors_of
from tiny import VOCAB

from largekd.distillation.serve import check_address
from largekd.errors import ConfigError
from largekd.runtime.ranks import Ranks
from largekd.teachers import served
from largekd.teachers.remote_wire import CONTENT_TYPE, decode_answer, decode_request, encode_answer, encode_request
from largekd.teachers.served import ServedTeacher, Work
from largekd.teachers.server import HttpServer, Served, application

TOKEN = "a-token"


@contextmanager
def serving(tmp_path, **changes) -> Iterator[tuple[httpx2.Client, list[bytes], int]]:
    """A server whose ranks answer at once, a client with the token, and the bodies that reached the ranks."""
    (tmp_path / "head").write_bytes(b"0123456789")
    works, reached, ended = queue.Queue(), [], threading.Event()
    served = Served(INFO.model_dump(), tmp_path / "head", LIMITS, works, TOKEN, body_timeout_s=1.0)

    def answer() -> None:
        while not ended.is_set():
            try:
                work = works.get(timeout=0.05)
            except queue.Empty:
                continue
            reached.append(work.body)
            asked = decode_request(work.body, limits=LIMITS, vocab_size=VOCAB)
            work.answer.set_result(encode_answer(parts_of(asked), model="digest"))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with HttpServer(application(replace(served, **changes)), host="127.0.0.1", port=0) as server:
            address = f"http://127.0.0.1:{server.port}"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with httpx2.Client(base_url=address, headers=headers, trust_env=False) as client:
                yield client, reached, server.port
    finally:
        ended.set()
        thread.join()


def test_requests_are_answered(tmp_path):
    asked = request()
    asked = replace(asked, batches=asked.batches[1:])
    with serving(tmp_path) as (client, reached, _):
        found = client.post("/v1/signals", content=encode_request(asked))
        assert found.status_code == 200 and found.headers["Content-Type"] == CONTENT_TYPE
        assert decode_answer(found.content, request=asked, width=6, dtype="F32")[0] == "digest"
        assert client.get("/v1/info").json() == INFO.model_dump()
        assert client.get("/v1/head").content == b"0123456789"
    assert len(reached) == 1


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", f"Basic {TOKEN}", TOKEN, "Bearer a-tökén"])
def test_without_the_token_only_health_is_told(tmp_path, given):
    with serving(tmp_path) as (client, reached, _):
        del client.headers["Authorization"]
        headers = {} if given is None else {"Authorization": given.encode()}
        for method, path in (("GET", "/v1/info"), ("GET", "/v1/head"), ("POST", "/v1/signals")):
            found = client.request(method, path, headers=headers)
            assert found.status_code == 401 and TOKEN not in found.text and "error" in found.json()
        assert client.get("/health", headers=headers).status_code == 200
    assert reached == []


def test_bad_requests_get_a_reason_and_reach_no_rank(tmp_path):
    draw, well = random.Random(0), encode_request(replace(request(), batches=request().batches[1:]))
    with serving(tmp_path) as (client, reached, _):
        for body in (b"", b"x", raw(tensors_of([[1, VOCAB]])), raw(tensors_of([[1] * 25]))):
            found = client.post("/v1/signals", content=body)
            assert found.status_code == 422 and json.loads(found.content)["error"]
        assert reached == []
        for _ in range(60):
            found = client.post("/v1/signals", content=damaged(well, draw=draw))
            assert found.status_code in (200, 422)
        assert client.get("/v1/signals").status_code == 405
        assert client.get("/v1/other").status_code == 404
        assert client.post("/v1/signals", content=well).status_code == 200


def test_a_body_that_is_too_long_is_not_read(tmp_path):
    with serving(tmp_path) as (client, reached, port):
        with socket.create_connection(("127.0.0.1", port)) as stream:
            head = f"POST /v1/signals HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            stream.sendall(f"{head}Content-Length: {LIMITS.body_bytes + 1}\r\n\r\n".encode())
            assert b" 413 " in stream.recv(4096)

        def endless() -> Iterator[bytes]:
            for _ in range(LIMITS.body_bytes // 65_536 + 2):
                yield b"x" * 65_536

        assert client.post("/v1/signals", content=endless()).status_code == 413
    assert reached == []


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    with serving(tmp_path) as (_, reached, port), socket.create_connection(("127.0.0.1", port)) as stream:
        head = f"POST /v1/signals HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        stream.sendall(f"{head}Content-Length: 100\r\n\r\nshort".encode())
        stream.settimeout(20)
        assert b" 408 " in stream.recv(4096)
    assert reached == []


def test_the_request_of_a_client_that_left_is_cancelled(tmp_path):
    works: queue.Queue[Work] = queue.Queue()
    served = Served(INFO.model_dump(), tmp_path / "head", LIMITS, works, None)
    well = encode_request(replace(request(), batches=request().batches[1:]))
    with HttpServer(application(served), host="127.0.0.1", port=0) as server:
        address = f"http://127.0.0.1:{server.port}"
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{address}/v1/signals", content=well, timeout=1.0, trust_env=False)
        left = works.get_nowait().answer
        ended = threading.Event()
        left.add_done_callback(lambda _: ended.set())
        assert ended.wait(timeout=20) and left.cancelled()
        assert httpx2.get(f"{address}/health", trust_env=False).status_code == 200


def test_ranks_skip_what_nobody_waits_for_and_survive_who_leaves_meanwhile(monkeypatch):
    monkeypatch.setattr(served, "TICK_S", 0.01)
    works: queue.Queue[Work] = queue.Queue()
    answers = {name: Future() for name in (b"left before", b"left meanwhile", b"stays")}
    computed = []

    class Ranked(ServedTeacher):
        def _answer(self, body: bytes) -> dict[str, torch.Tensor]:
            computed.append(body)
            answers[b"left meanwhile"].cancel()
            return {"0.x": torch.zeros(1)}

    for name, answer in answers.items():
        works.put(Work(body=name, answer=answer))
    answers[b"left before"].cancel()
    teacher = Ranked(engine=None, decoder=None, limits=LIMITS, model="m", ranks=Ranks(), device=torch.device("cpu"))
    teacher.serve(works, stopping=lambda: len(computed) == 2)
    assert computed == [b"left meanwhile", b"stays"]
    assert answers[b"stays"].result(timeout=0) and answers[b"left meanwhile"].cancelled()


def test_what_is_left_when_the_ranks_stop_is_cancelled():
    works: queue.Queue[Work] = queue.Queue()
    answers = [Future(), Future()]
    for answer in answers:
        works.put(Work(body=b"x", answer=answer))
    teacher = ServedTeacher(
        engine=None, decoder=None, limits=LIMITS, model="m", ranks=Ranks(), device=torch.device("cpu")
    )
    teacher.serve(works, stopping=lambda: True)
    assert all(answer.cancelled() for answer in answers)


def test_a_port_that_is_taken_is_told(tmp_path):
    with serving(tmp_path) as (_, _, port), pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        HttpServer(
            application(Served({}, tmp_path, LIMITS, queue.Queue(), None)), host="127.0.0.1", port=port
        ).__enter__()


def test_a_public_address_needs_a_token(monkeypatch):
    monkeypatch.setenv("TEST_TOKEN", TOKEN)
    monkeypatch.setenv("TEST_EMPTY", "")
    for host in ("127.0.0.1", "localhost", "::1"):
        assert check_address(host, token_variable=None) is None
    assert check_address("0.0.0.0", token_variable="TEST_TOKEN") == TOKEN
    for host, variable in (("0.0.0.0", None), ("node-a", None), ("127.0.0.1", "TEST_EMPTY"), ("::", None)):
        with pytest.raises(ConfigError, match="token"):
            check_address(host, token_variable=variable)


@pytest.mark.parametrize(
    "token", ["two words", "ends-in-a-break\n", "ends-in-a-space ", "\tbefore-it", "tökén", "\x7f"]
)
def test_a_token_that_no_header_can_hold_is_refused_and_not_told(monkeypatch, token):
    monkeypatch.setenv("TEST_TOKEN", token)
    with pytest.raises(ConfigError, match="TEST_TOKEN") as caught:
        check_address("127.0.0.1", token_variable="TEST_TOKEN")
    assert token.strip() not in str(caught.value)
