"""One attempt at a server: which kind of failure it is, and what is said of it."""

import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from teachers.remote_fakes import Reply, fake_server

from largekd.errors import ConfigError
from largekd.runtime.http import HttpClient, PassingError, RefusedError, read_token

TOKEN = "a-token-that-nobody-may-see"


def exchanged(url, *, timeout_s=5.0, max_bytes=1000):
    client = HttpClient(token=TOKEN, token_key="some.key", timeout_s=timeout_s)
    try:
        return client.exchange("POST", url, max_bytes=max_bytes, content=b"{}")
    finally:
        client.close()


def failure(reply, **options):
    with fake_server(lambda path, body: reply) as server, pytest.raises((PassingError, RefusedError)) as caught:
        exchanged(server.address, **options)
    return caught.value


def test_a_body_is_returned_and_the_token_sent():
    with fake_server(lambda path, body: Reply(body=b"yes")) as server:
        assert exchanged(server.address) == b"yes"
        assert server.asked[0][2]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_statuses_that_pass_are_certain(status):
    error = failure(Reply(status=status, body=b"busy"))
    assert isinstance(error, PassingError) and error.status == status and not error.uncertain
    assert error.body == "busy" and error.retry_after_s is None


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 422, 501])
def test_statuses_that_stay_are_refusals(status):
    error = failure(Reply(status=status, body=TOKEN.encode() + b" is no good"))
    assert isinstance(error, RefusedError) and error.status == status
    assert error.body == "*** is no good" and TOKEN not in str(error)
    assert ("some.key" in str(error)) == (status in (401, 403))


def test_what_was_sent_and_not_answered_is_uncertain():
    assert failure(Reply(write=lambda stream: None)).uncertain
    assert failure(Reply(write=lambda stream: stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"))).uncertain
    assert failure(Reply(body=b"x" * 1001)).uncertain
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(PassingError) as refused:
        exchanged(address)
    assert not refused.value.uncertain, "it never arrived"


@pytest.mark.parametrize(
    ("said", "least_s", "most_s"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        (format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True), 1, 7200),
        (format_datetime(datetime.now(UTC) - timedelta(hours=2), usegmt=True), 0, 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(said, least_s, most_s):
    found_s = failure(Reply(status=503, headers={"Retry-After": said})).retry_after_s
    assert found_s is not None and least_s <= found_s <= most_s


@pytest.mark.parametrize("said", ["soon", "nan", "inf", "Mon, 99 Foo 2020 00:00:00 GMT", ""])
def test_a_retry_after_without_sense_says_nothing(said):
    assert failure(Reply(status=503, headers={"Retry-After": said})).retry_after_s is None


@pytest.mark.parametrize(("finer_ms", "seconds"), [("250", 0.25), ("soon", 7.0), ("-5", 7.0)])
def test_milliseconds_come_before_seconds(finer_ms, seconds):
    headers = {"Retry-After": "7", "retry-after-ms": finer_ms}
    assert failure(Reply(status=429, headers=headers)).retry_after_s == seconds


def test_a_token_must_fit_a_header(monkeypatch):
    for wrong in ("", "two words", "secret\n", "ümlaut"):
        monkeypatch.setenv("SOME_TOKEN", wrong)
        with pytest.raises(ConfigError, match=r"some\.key = 'SOME_TOKEN'") as caught:
            read_token("SOME_TOKEN", key="some.key")
        assert not wrong.strip() or wrong.strip() not in str(caught.value)
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    assert read_token("SOME_TOKEN", key="some.key") == TOKEN
