"""The chat protocol's bodies: what is sent for an ask, and what is made of answers of all kinds."""

import json
import random

import pytest
from factory.chat_fakes import completion, make_ask, make_config

from largekd.config.generate import EndpointBackendConfig, GenerateConfig
from largekd.config.load import parse_record
from largekd.errors import ConfigError
from largekd.factory.cost import Usage
from largekd.factory.endpoint_wire import MalformedError, is_about_the_prompt, longest_body, read_answer, request_body
from largekd.runtime.http import RefusedError


def sent(ask, **change):
    return json.loads(request_body(ask, config=make_config("http://127.0.0.1:1", **change)))


def test_a_request_says_what_was_asked_for_and_no_more():
    assert sent(make_ask("how?", max_new_tokens=9)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "how?"}],
        "max_tokens": 9,
        "temperature": 0.7,
        "seed": 7,
    }
    drawn = make_ask("how?", temperature=0.0, top_p=0.9, top_k=3, min_p=0.1, stop=("\n", "END"))
    body = sent(drawn, dialect="vllm", logprobs=True, extra={"chat_template_kwargs": {"enable_thinking": False}})
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop", "logprobs")} == {
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "stop": ["\n", "END"],
        "logprobs": True,
    }
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    bare = sent(drawn, omit=("seed", "temperature", "top_p"), length_parameter="max_completion_tokens")
    assert not {"seed", "temperature", "top_p", "max_tokens", "logprobs"} & bare.keys()
    assert bare["max_completion_tokens"] == 50


def test_a_request_with_half_a_character_is_json_all_the_same():
    assert sent(make_ask("half \ud83d"))["messages"][0]["content"] == "half \ud83d"


def answer(message, *, finish="stop", **change):
    choice = {"message": message, "finish_reason": finish, **change}
    return read_answer(json.dumps(completion("", choices=[choice])).encode())


@pytest.mark.parametrize(
    ("message", "finish", "text", "ended"),
    [
        ({"content": "yes"}, "stop", "yes", "stop"),
        ({"content": ""}, "stop", "", "stop"),
        ({"content": "ye"}, "length", "ye", "length"),
        ({"content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}, "stop", "yes", "stop"),
        ({"content": "4", "reasoning_content": "2+2"}, "stop", "<think>\n2+2\n</think>\n\n4", "stop"),
        ({"content": "4", "reasoning": "2+2"}, "stop", "<think>\n2+2\n</think>\n\n4", "stop"),
        ({"content": None, "reasoning_content": "2+"}, "length", "<think>\n2+", "length"),
        ({"content": "half \ud83d"}, "stop", "half �", "stop"),
    ],
)
def test_texts(message, finish, text, ended):
    found = answer(message, finish=finish)
    assert (found.text, found.finish, found.failure) == (text, ended, None)
    assert found.usage == Usage(10, 5)


@pytest.mark.parametrize(
    ("message", "finish", "said"),
    [
        ({"content": "half a"}, "content_filter", "content_filter"),
        ({"content": None, "refusal": "I will not"}, "stop", "refused: I will not"),
        ({"content": None}, "stop", "no text"),
        ({"content": None, "tool_calls": []}, "tool_calls", "tool_calls"),
        ({"content": "whole?"}, None, "null"),
        ({"content": "whole?"}, ["stop"], "null"),
        ({"content": 5}, "stop", "no text"),
    ],
)
def test_answers_without_a_whole_text_say_why(message, finish, said):
    found = answer(message, finish=finish)
    assert (found.text, found.finish) == ("", "failed") and said in (found.failure or "")
    assert found.usage == Usage(10, 5), "they are paid for"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"choices": null}',
        b'{"choices": {}}',
        b'{"choices": [null]}',
        b'{"choices": [{"message": "text"}]}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "error"}]}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}',
        b'{"error": {"code": 429}}',
        b'{"error": "x", "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}',
    ],
)
def test_what_is_no_answer_is_malformed(body):
    with pytest.raises(MalformedError):
        read_answer(body)


def test_any_damage_is_an_answer_or_malformed():
    body = json.dumps(
        completion("some text", choices=[{"message": {"content": "a"}, "finish_reason": "stop"}])
    ).encode()
    draw = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(body)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.choice(b'{}[]",:019.eE-ntf\\ x\xff')
        try:
            found = read_answer(bytes(damaged))
        except MalformedError:
            continue
        assert (found.finish == "failed") == (found.failure is not None)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        3,
        {},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": 1.5, "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 1 << 60},
    ],
)
def test_usage_that_cannot_be_is_none(usage):
    assert read_answer(json.dumps(completion("x", usage=usage)).encode()).usage is None


@pytest.mark.parametrize(
    ("logprobs", "mean"),
    [
        ({"content": [{"logprob": -1.0}, {"logprob": -0.5}, {"logprob": 0}]}, -0.5),
        ({"content": [{"logprob": -1.0}, {"logprob": None}]}, None),
        ({"content": [{"logprob": float("nan")}]}, None),
        ({"content": [{"logprob": -(10**400)}]}, None),
        ({"content": [{"logprob": 0.5}]}, None),
        ({"content": []}, None),
        ({"content": None}, None),
        (None, None),
        ([], None),
    ],
)
def test_the_mean_log_probability(logprobs, mean):
    assert answer({"content": "x"}, logprobs=logprobs).mean_logp == mean


@pytest.mark.parametrize(
    ("status", "body", "about"),
    [
        (400, '{"error": {"code": "context_length_exceeded"}}', True),
        (400, "This model's maximum context length is 4096 tokens", True),
        (400, '{"error": {"code": "content_filter"}}', True),
        (413, "prompt is too long: 210000 tokens", True),
        (400, '{"error": {"message": "unknown parameter seed"}}', False),
        (404, "maximum context length", False),
    ],
)
def test_refusals_of_one_prompt_are_told_from_those_of_all(status, body, about):
    assert is_about_the_prompt(RefusedError("x", status=status, body=body)) is about


def test_log_probabilities_need_room():
    ask = make_ask("x", max_new_tokens=1000)
    plain, more = (longest_body(ask, config=make_config("http://127.0.0.1:1", logprobs=on)) for on in (False, True))
    assert plain < 2 << 20 < 2 * more and more - plain > 100 * 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "http://server.example/v1", "allow_remote": True}, "must be https"),
        ({"url": "https://server.example/v1"}, "set allow_remote"),
        ({"url": "https://me:pw@server.example/v1"}, "use key_variable"),
        ({"url": "server.example"}, "must look like"),
        ({"extra": {"messages": []}}, r"extra\.messages"),
        ({"max_cost": 1.0}, "needs input_price"),
        ({"key_variable": "sk-secret"}, "no name of an environment variable"),
        ({"url": "https://server.example/v1?key=sk-secret", "allow_remote": True}, "end before"),
    ],
)
def test_settings_that_cannot_be(change, said):
    with pytest.raises(ValueError, match=said):
        EndpointBackendConfig(**({"kind": "endpoint", "url": "http://127.0.0.1:1", "model": "m"} | change))
    make_config("https://server.example/v1", allow_remote=True)


@pytest.mark.parametrize("change", [{"key_variable": "a-secret"}, {"url": "http://127.0.0.1/?key=a-secret"}])
def test_a_key_in_the_wrong_place_is_not_repeated(change):
    backend = {"kind": "endpoint", "url": "http://127.0.0.1:1", "model": "m"} | change
    tree = {"output": {"dir": "d"}, "source": {"path": "p"}, "backend": backend}
    for mapping in (tree, tree | {"judge": {"backend": backend}}):
        with pytest.raises(ConfigError) as raised:
            parse_record(GenerateConfig, mapping=mapping)
        assert "a-secret" not in str(raised.value) and "key_variable" in str(raised.value)
