"""A server as the writer: whatever it does, every ask has one answer and none is paid for twice."""

import logging
import random
import threading
import time
from dataclasses import replace

import pytest
from factory.chat_fakes import (
    PROMPT_TOKENS,
    WRITTEN_TOKENS,
    chat_server,
    commit,
    completion,
    make_ask,
    make_asks,
    make_config,
    open_backend,
    right_text,
    write_all,
)
from teachers.remote_fakes import Reply, as_json

from largekd.config.generate import SamplingConfig
from largekd.errors import ConfigError, GenerationError
from largekd.factory import endpoint_requests
from largekd.factory.endpoint import JOURNAL, EndpointBackend

PRICES = {"input_price": 1e6, "output_price": 2e6}
"""One for a prompt token, two for a written one."""
COST = PROMPT_TOKENS + 2 * WRITTEN_TOKENS


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint_requests, "_FIRST_PAUSE_S", 1e-3)


def texts(found, asks) -> list[str]:
    return [found[ask.key].text for ask in asks]


def right_texts(asks) -> list[str]:
    return [right_text(ask.item.question) for ask in asks]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_and_nothing_is_paid_twice(tmp_path, seed):
    draw, lock, faults = random.Random(seed), threading.Lock(), []

    def misbehave(question, good):
        with lock:
            fault = draw.randrange(12)
            faults.append(fault)
        match fault:
            case 0:
                return as_json({"error": "slow down"}, status=429)
            case 1:
                return replace(as_json({}, status=429), headers={"Retry-After": "0"})
            case 2:
                return as_json({}, status=draw.choice([500, 502, 503, 504, 529]))
            case 3:
                return Reply(write=lambda stream: stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"))
            case 4:
                return Reply(write=lambda stream: None)
            case 5:
                return Reply(body=b"<html>a proxy's page</html>")
            case 6:
                return as_json({"choices": []})
            case 7:
                return Reply(body=b"x" * (3 << 20))
            case 8:
                return as_json({"error": {"message": "overloaded", "code": 503}})
        return good

    asks = make_asks(40)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, asks, retries=60, longest_pause_s=0.01)
    assert texts(found, asks) == right_texts(asks)
    assert {written.finish for written in found.values()} == {"stop"}
    assert server.completed == {ask.item.question: 1 for ask in asks}
    assert set(faults) == set(range(12))


def test_a_slow_answer_is_given_up_and_asked_for_again(tmp_path):
    calls = []

    def misbehave(question, good):
        calls.append(question)
        if len(calls) == 1:
            time.sleep(1.5)
            return as_json({}, status=500)
        return good

    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, make_asks(1), timeout_s=0.5, **PRICES)
        keys = [headers["Idempotency-Key"] for _, _, headers in server.fake.asked]
    (written,) = found.values()
    assert written.finish == "stop" and len(calls) >= 2
    assert len(set(keys)) == 1, "a server that knows the key charges a lost answer once"
    # The first attempt may have been charged: it counts at its most.
    assert written.cost > COST + 100


def test_an_unusable_answer_is_asked_for_under_another_key_and_its_cost_counts(tmp_path):
    replies = [as_json(completion("", choices=[]))]

    def misbehave(question, good):
        return replies.pop() if replies else good

    with chat_server(misbehave) as server:
        (written,) = write_all(server.url, tmp_path, make_asks(1), **PRICES).values()
        keys = [headers["Idempotency-Key"] for _, _, headers in server.fake.asked]
    assert written.cost == 2 * COST
    assert len(set(keys)) == 2


def test_requests_run_at_the_same_time_and_no_more_than_allowed(tmp_path):
    lock, running, most = threading.Lock(), [], []
    meeting = threading.Barrier(4)

    def misbehave(question, good):
        with lock:
            running.append(question)
            most.append(len(running))
        if question != "question 0":
            # Broken, and the test with it, if four are never here together.
            meeting.wait(timeout=20)
        with lock:
            running.remove(question)
        return good

    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, make_asks(13), concurrency=4)
    assert len(found) == 13 and max(most) == 4
    assert most[0] == 1 and server.requests[1]["messages"] != server.requests[0]["messages"]


def test_retry_after_holds_all_requests(tmp_path):
    sent = []

    def misbehave(question, good):
        sent.append(time.monotonic())
        if len(sent) == 2:
            return replace(as_json({}, status=429), headers={"Retry-After": "1.0"})
        if len(sent) == 3:
            # Until the client has read the other's answer.
            time.sleep(0.5)
        return good

    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, make_asks(8), concurrency=2)
    assert len(found) == 8 and len(sent) == 9
    # One may have been under way when the second was turned away.
    assert all(moment - sent[1] >= 1.0 for moment in sent[3:])
    assert set(server.completed.values()) == {1}


def test_a_server_that_asks_for_hours_ends_the_job(tmp_path):
    reply = replace(as_json({}, status=429), headers={"Retry-After": "90000"})
    with chat_server(lambda question, good: reply) as server, pytest.raises(GenerationError, match="wait 90000 s"):
        write_all(server.url, tmp_path, make_asks(3))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (400, ConfigError, "backend.omit"),
        (401, ConfigError, "backend.key_variable = 'THE_KEY'"),
        (403, ConfigError, "backend.key_variable = 'THE_KEY'"),
        (402, GenerationError, "no credit"),
        (404, ConfigError, "backend.model = 'm'"),
        (418, ConfigError, "backend.url"),
        (307, ConfigError, "redirect"),
    ],
)
def test_what_the_user_must_mend_is_told_at_once_and_without_the_key(
    tmp_path, monkeypatch, caplog, capfd, status, error, said
):
    caplog.set_level(logging.DEBUG)
    key = "a-key-that-nobody-may-see"
    monkeypatch.setenv("THE_KEY", key)
    reply = as_json({"error": {"message": f"Bearer {key} {key}"}}, status=status)
    with chat_server(lambda question, good: reply) as server:
        with pytest.raises(error, match=said) as caught:
            write_all(server.url, tmp_path, make_asks(9), key_variable="THE_KEY")
        assert len(server.fake.asked) == 1, "nothing else is tried"
        assert server.fake.asked[0][2]["Authorization"] == f"Bearer {key}"
    everything = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    everything += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert key not in everything


def test_a_key_that_a_server_repeats_in_what_is_kept_is_hidden(tmp_path, monkeypatch):
    key = "a-key-that-nobody-may-see"
    monkeypatch.setenv("THE_KEY", key)
    refusal = {"choices": [{"message": {"content": None, "refusal": f"not with {key}"}, "finish_reason": "stop"}]}
    replies = {
        "question 0": as_json({"error": {"code": "context_length_exceeded", "message": key}}, status=400),
        "question 1": as_json(completion("") | refusal),
        "question 2": as_json({"error": key}),
    }
    with chat_server(lambda question, good: replies[question]) as server:
        found = write_all(server.url, tmp_path, make_asks(3), key_variable="THE_KEY", retries=1)
    assert [written.finish for written in found.values()] == ["failed"] * 3
    assert key not in str(found) and key not in (tmp_path / JOURNAL).read_text()
    assert sum("***" in (written.failure or "") for written in found.values()) == 3


def test_a_missing_key_is_told_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"backend\.key_variable"):
        open_backend("http://127.0.0.1:9", tmp_path, key_variable="THE_KEY")


def test_a_prompt_that_the_server_refuses_is_a_failed_row(tmp_path):
    long, rude = as_json({"error": {"code": "context_length_exceeded"}}, status=400), {"code": "content_filter"}

    def misbehave(question, good):
        return {"question 1": long, "question 2": as_json({"error": rude}, status=400)}.get(question, good)

    asks = make_asks(5)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, asks, **PRICES)
    assert [found[ask.key].finish for ask in asks] == ["stop", "failed", "failed", "stop", "stop"]
    assert "context_length_exceeded" in (found[asks[1].key].failure or "") and found[asks[1].key].cost == 0
    assert len(server.requests) == 5


def test_a_refusal_in_unknown_words_is_of_one_prompt_where_others_are_answered(tmp_path):
    reply = as_json({"error": {"code": "invalid_prompt", "message": "flagged"}}, status=400)

    def misbehave(question, good):
        return reply if question in ("question 3", "question 7") else good

    asks = make_asks(10)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, asks)
        failed = [ask for ask in asks if found[ask.key].finish == "failed"]
        assert [ask.item.question for ask in failed] == ["question 3", "question 7"]
        # On request once more, when nothing else is left to ask.
        again = write_all(server.url, tmp_path, [replace(ask, attempt=1) for ask in failed])
    assert [written.finish for written in again.values()] == ["failed", "failed"]


def test_a_server_that_begins_to_refuse_everything_ends_the_job(tmp_path):
    reply = as_json({"error": "unknown parameter"}, status=400)
    with (
        chat_server(lambda question, good: good if question == "question 0" else reply) as server,
        pytest.raises(ConfigError, match=r"backend\.omit"),
    ):
        write_all(server.url, tmp_path, make_asks(100), concurrency=2)
    assert len(server.requests) < 30


def test_a_prompt_above_the_limit_is_not_sent(tmp_path):
    with chat_server() as server:
        (written,) = write_all(server.url, tmp_path, [make_ask("word " * 4000)]).values()
    assert written.finish == "failed" and "sampling.max_prompt_tokens" in (written.failure or "")
    assert server.fake.asked == []


def test_an_ask_at_which_the_server_always_fails_is_a_failed_row(tmp_path):
    def misbehave(question, good):
        return as_json({}, status=500) if question == "question 2" else good

    asks = make_asks(3)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, asks, retries=2, concurrency=1)
    assert [found[ask.key].finish for ask in asks] == ["stop", "stop", "failed"]
    assert "3 attempts, the last one: status 500" in (found[asks[2].key].failure or "")
    assert len(server.requests) == 5


def test_a_second_attempt_has_a_name_of_its_own_and_is_paid_for_once(tmp_path):
    refusal = as_json(completion("", choices=[{"message": {"refusal": "no"}, "finish_reason": "stop"}]))
    replies = [refusal]

    def misbehave(question, good):
        return replies.pop() if replies else good

    (ask,) = make_asks(1)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, [ask])
        assert found[ask.key].finish == "failed"
        commit(tmp_path / "raw", [ask], found)
        # Received and not committed: a process was killed.
        for _ in range(2):
            (again,) = write_all(server.url, tmp_path, [replace(ask, attempt=1)]).values()
            assert again.text == right_text(ask.item.question)
        keys = [headers["Idempotency-Key"] for _, _, headers in server.fake.asked]
    assert len(keys) == 2 == len(set(keys)), "a server that knows the key would repeat its refusal"


def test_a_server_that_is_gone_makes_no_failed_rows(tmp_path):
    asks = make_asks(6)
    with chat_server() as server:
        first = write_all(server.url, tmp_path, asks[:2])
    backend = open_backend(server.url, tmp_path, retries=2, timeout_s=1.0)
    found = []
    with pytest.raises(GenerationError, match=r"no answer after 3 attempts.*what is there is kept"):
        found += backend.write(iter(asks[2:]), stopping=lambda: False)
    backend.close()
    assert len(first) == 2 and found == []


def test_a_server_that_turns_everybody_away_ends_the_job(tmp_path):
    for said, message in (({}, "nothing but 429"), ({"error": {"code": "insufficient_quota"}}, "no credit")):
        reply = as_json(said, status=429)
        with (
            chat_server(lambda question, good, reply=reply: reply) as server,
            pytest.raises(GenerationError, match=message),
        ):
            write_all(server.url, tmp_path, make_asks(3), retries=1)


def test_one_that_is_turned_away_while_others_are_served_goes_on(tmp_path):
    turned = []

    def misbehave(question, good):
        if question != "question 1" or len(turned) == 6:
            return good
        turned.append(question)
        # Four others: the client has read the answer of one of them at least before it sent the last of them.
        enough, deadline_s = server.completed.total() + 4, time.monotonic() + 20
        while server.completed.total() < enough and time.monotonic() < deadline_s:
            time.sleep(0.005)
        return as_json({}, status=429)

    asks = make_asks(60)
    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, asks, retries=1, concurrency=3, longest_pause_s=0.05)
    assert texts(found, asks) == right_texts(asks) and len(turned) == 6


def test_the_cost_limit_is_not_exceeded_and_holds_over_starts(tmp_path, caplog):
    asks = make_asks(30)
    # A prompt of up to 11 bytes with its frame, and 50 tokens.
    most = 16 + 11 + 2 * 50
    limit = most + 9.5 * COST
    with chat_server() as server:
        found = write_all(server.url, tmp_path, asks, **PRICES, max_cost=limit)
        # The eleventh might have cost more than is left.
        assert len(found) == 10 and len(server.requests) == 10
        assert "backend.max_cost = 317: another request might exceed it" in caplog.text
        left = [ask for ask in asks if ask.key not in found]
        # Committed or not, what was spent is remembered.
        assert write_all(server.url, tmp_path, left, **PRICES, max_cost=limit) == {}
        commit(tmp_path / "raw", asks, found)
        assert write_all(server.url, tmp_path, left, **PRICES, max_cost=limit) == {}
        rest = write_all(server.url, tmp_path, left, **PRICES, max_cost=most + 30 * COST)
    assert len(found | rest) == 30 and set(server.completed.values()) == {1}
    assert sum(written.cost for written in (found | rest).values()) == 30 * COST


def test_a_silent_server_s_tokens_are_estimated_and_said_to_be(tmp_path):
    def misbehave(question, good):
        return as_json({"choices": completion(right_text(question))["choices"]})

    with chat_server(misbehave) as server:
        backend = open_backend(server.url, tmp_path, **PRICES)
        found = list(backend.write(iter(make_asks(4)), stopping=lambda: False))
        backend.close()
    assert all(written.prompt_tokens > 0 and written.written_tokens > 0 and written.cost > 0 for written in found)
    assert "4 answers are estimates" in backend.meter.summary()


def test_told_to_stop_it_drops_what_was_not_sent_and_keeps_what_was(tmp_path):
    stop, here = threading.Event(), threading.Semaphore(0)

    def misbehave(question, good):
        if question != "question 0":
            here.release()
            stop.wait(20)
            time.sleep(0.3)
        return good

    def stopping():
        # Both are at the server.
        if not stop.is_set() and here._value >= 2:
            stop.set()
        return stop.is_set()

    with chat_server(misbehave) as server:
        found = write_all(server.url, tmp_path, make_asks(50), stopping=stopping, concurrency=2)
    assert len(found) == 3 and len(server.requests) == 3


def test_told_to_stop_it_does_not_wait_for_ever(tmp_path):
    release, here = threading.Event(), threading.Event()

    def misbehave(question, good):
        here.set()
        release.wait(20)
        return good

    with chat_server(misbehave) as server:
        backend = open_backend(server.url, tmp_path, stop_grace_s=0.1, **PRICES)
        assert list(backend.write(iter(make_asks(5)), stopping=here.is_set)) == []
        release.set()
        backend.close()
    again = open_backend(server.url, tmp_path, **PRICES)
    assert again.meter.spent > COST, "it may have been charged"
    again.close()


def test_a_caller_that_leaves_early_finds_what_was_paid_for_next_time(tmp_path):
    arrived = threading.Barrier(3)

    def misbehave(question, good):
        if question in ("question 1", "question 2", "question 3"):
            arrived.wait(timeout=20)
        return good

    asks = make_asks(12)
    with chat_server(misbehave) as server:
        backend = open_backend(server.url, tmp_path, concurrency=3)
        answers = backend.write(iter(asks), stopping=lambda: False)
        taken = [next(answers), next(answers)]
        answers.close()
        backend.close()
        found = write_all(server.url, tmp_path, asks)
    assert texts(found, asks) == right_texts(asks)
    assert {written.key for written in taken} <= set(found)
    assert set(server.completed.values()) == {1}


def test_limits_of_requests_are_kept(tmp_path):
    began_s = time.monotonic()
    with chat_server() as server:
        # The second would leave a minute after the first.
        found = write_all(
            server.url,
            tmp_path,
            make_asks(5),
            stopping=lambda: len(server.requests) > 0 and time.monotonic() > began_s + 1.5,
            requests_per_minute=1,
        )
    assert len(found) == len(server.requests) == 1


def test_what_the_dialect_has_no_word_for_is_refused(tmp_path):
    config = make_config("http://127.0.0.1:9")
    for sampling, name in ((SamplingConfig(top_k=5), "top_k"), (SamplingConfig(min_p=0.1), "min_p")):
        with pytest.raises(ConfigError, match=f"sampling.{name}"):
            EndpointBackend(config, sampling=sampling, folder=tmp_path)
        other = make_config("http://127.0.0.1:9", dialect="vllm")
        EndpointBackend(other, sampling=sampling, folder=tmp_path).close()


def test_the_identity_is_what_decides_the_texts_and_nothing_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret")
    one = open_backend("http://127.0.0.1:9", tmp_path / "1", key_variable="THE_KEY", extra={"a": 1})
    two = open_backend("http://127.0.0.1:8", tmp_path / "2", concurrency=2, max_cost=1.0, input_price=1.0)
    assert one.identity["extra"] == {"a": 1} and "secret" not in str(one.identity) and "127" not in str(one.identity)
    assert two.identity != one.identity
    assert one.only_main and one.count(make_ask("a" * 400)) in range(100, 110)
    assert one.show(make_ask("how?")) == "[user]\nhow?"
    one.close()
    two.close()
    two.close()
