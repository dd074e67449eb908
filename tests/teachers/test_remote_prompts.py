"""vLLM's and SGLang's formats, answered by small servers with a known distribution."""

import json
import logging
import math

import pytest
import torch
from teachers.remote_fakes import Reply, as_json, fake_server
from tiny import VOCAB, join_rows, make_rows

from largekd.config.load import parse_config
from largekd.contracts import SampledRequest, SignalRequest, TopKRequest
from largekd.distillation.remote import _prompt_servers
from largekd.errors import TeacherError
from largekd.runtime.http import UnavailableError
from largekd.runtime.ranks import Ranks
from largekd.teachers.remote import Patience, RemoteTeacher
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_prompts import VLLM, PromptServers, SGLang, probe_tokenizer

K = 5


def distribution(prefix: list[int]) -> torch.Tensor:
    """log p of the next token: any function of the sample's tokens so far, and of nothing else."""
    seed = sum((place + 1) * token for place, token in enumerate(prefix))
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0)


def vllm(body: dict) -> dict:
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        places = [None]
        for at in range(1, len(prompt)):
            logp_V = distribution(prompt[:at])
            named = {*logp_V.topk(body["prompt_logprobs"]).indices.tolist(), prompt[at]}
            places.append({str(token): {"logprob": float(logp_V[token]), "rank": 1} for token in named})
        choices.append({"index": index, "text": "x", "prompt_logprobs": places})
    return {"model": body["model"], "choices": choices[::-1]}


def sglang(body: dict) -> list[dict]:
    answers = []
    for prompt in body["input_ids"]:
        places = [None]
        for at in range(1, len(prompt)):
            top = distribution(prompt[:at]).topk(body["top_logprobs_num"])
            places.append(
                [[value, token, None] for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
            )
        answers.append({"text": "x", "meta_info": {"input_top_logprobs": places, "prompt_tokens": len(prompt)}})
    return answers


KINDS = {"vllm": (VLLM(model="teacher"), "/v1/completions", vllm), "sglang": (SGLang(), "/generate", sglang)}


def teacher_at(address: str, *, kind: str, tail="tail", shared_ids=VOCAB, retries=0) -> RemoteTeacher:
    replicas = Replicas(servers=(address,), token=None, timeout_s=5.0, retries=retries)
    source = PromptServers(replicas=replicas, dialect=KINDS[kind][0], k=K, tail=tail, shared_ids=shared_ids)
    return RemoteTeacher(source, patience=Patience(wait_s=0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", ["full", TopKRequest(K)])
@pytest.mark.parametrize("packed", [True, False])
def test_each_counted_token_has_the_likeliest_ids_of_its_own_prefix(kind, wanted, packed):
    batches = [join_rows(make_rows(count=4, packed=packed)), join_rows(make_rows(count=8, packed=packed)[4:])]
    _, path, answer = KINDS[kind]
    with fake_server(lambda _, body: as_json(answer(json.loads(body)))) as server:
        teacher = teacher_at(server.address, kind=kind)
        with teacher.signals(batches, request=SignalRequest(wanted)) as signals:
            found = list(signals)
    assert set(server.paths) == {path}
    for batch, signal in zip(batches, found, strict=True):
        ids, width = batch.input_ids_BS.tolist(), batch.input_ids_BS.shape[1]
        assert signal.ids_TK.shape == (batch.counted_T.numel(), K)
        for token, position in enumerate(batch.counted_T.tolist()):
            row, at = divmod(position, width)
            top = distribution(ids[row][: at + 1]).topk(K)
            assert signal.ids_TK[token].tolist() == top.indices.tolist()
            torch.testing.assert_close(signal.logp_TK[token], top.values.float())
            left = 1.0 - float(top.values.exp().sum())
            assert math.exp(float(signal.tail_T[token])) == pytest.approx(left, rel=1e-4)


def test_ids_that_the_student_lacks_belong_to_the_tail():
    batch = make_rows(count=4, packed=True)[3]
    with fake_server(lambda _, body: as_json(sglang(json.loads(body)))) as server:
        teacher = teacher_at(server.address, kind="sglang", shared_ids=40)
        with teacher.signals([batch], request=SignalRequest(TopKRequest(K))) as signals:
            signal = next(signals)
    assert int(signal.ids_TK.max()) < 40 and bool(signal.logp_TK.isinf().any())
    assert bool((signal.ids_TK.sort(-1).values.diff(dim=-1) > 0).all())
    mass_T = signal.logp_TK.exp().sum(-1) + signal.tail_T.exp()
    torch.testing.assert_close(mass_T, torch.ones_like(mass_T))


def _without_index(answer):
    del answer["choices"][0]["index"]


def _one_short(answer):
    answer["choices"][0]["prompt_logprobs"].pop()


def _too_few(answer):
    answer["choices"][0]["prompt_logprobs"][-1] = {"1": {"logprob": -1.0}}


def _not_a_number(answer):
    place = answer["choices"][0]["prompt_logprobs"]
    place[1:] = [{name: {"logprob": math.nan} for name in entries} for entries in place[1:]]


def _too_much(answer):
    place = answer["choices"][0]["prompt_logprobs"]
    place[1:] = [{name: {"logprob": -0.1} for name in entries} for entries in place[1:]]


@pytest.mark.parametrize("harm", [_without_index, _one_short, _too_few, _not_a_number, _too_much])
def test_an_answer_in_another_shape_is_no_signal(harm):
    batch = join_rows(make_rows(count=4, packed=True)[3:])

    def harmed(_: str, body: bytes) -> Reply:
        answer = vllm(json.loads(body))
        harm(answer)
        return as_json(answer)

    with fake_server(harmed) as server, pytest.raises(UnavailableError):
        teacher_at(server.address, kind="vllm")._source.ask([batch], request=SignalRequest("full"), place=0)


def test_what_such_servers_cannot_give_is_refused_before_the_run():
    warm = SignalRequest(TopKRequest(K, temperature=2.0))
    teacher_at("http://127.0.0.1:9", kind="vllm", tail="renormalise").check(warm)
    teacher = teacher_at("http://127.0.0.1:9", kind="vllm")
    teacher.check(SignalRequest("full"))
    for tail in ("tail", "drop"):
        with pytest.raises(TeacherError, match=rf"objective\.temperature = 2.*tail = {tail} needs"):
            teacher_at("http://127.0.0.1:9", kind="vllm", tail=tail).check(warm)
    with pytest.raises(TeacherError, match=r"objective\.signal\.kind"):
        teacher.check(SignalRequest(SampledRequest(3)))


@pytest.mark.parametrize("tail", ["tail", "drop"])
def test_a_temperature_that_changes_later_is_refused_too(tail):
    """The first step's request is at temperature 1."""
    curve = {"shape": "linear", "start": 1.0, "end": 4.0}
    config = parse_config(
        {
            "run": {"dir": "runs/x"},
            "teacher": {"kind": "remote", "model": "t", "servers": ["http://127.0.0.1:9"], "protocol": "sglang"},
            "student": {"model": "s", "deepspeed": "b.json"},
            "data": {"train": "train.jsonl"},
            "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
            "objective": {"temperature": curve, "signal": {"kind": "top_k", "k": K, "tail": tail}},
        }
    )
    replicas = Replicas(servers=("http://127.0.0.1:9",), token=None, timeout_s=5.0, retries=0)
    with pytest.raises(TeacherError, match=r"objective\.temperature = 1 to 4"):
        _prompt_servers(replicas, teacher=config.teacher, sources=None, config=config, ranks=Ranks())


def probe(answer, *, path: str, expected: list[list[int]], **options) -> list[bytes]:
    """What a server with this answer was asked."""
    with fake_server(answer) as server:
        replicas = Replicas(servers=(server.address,), token=None, timeout_s=5.0, retries=0)
        probe_tokenizer(replicas, path=path, text="abc", expected=expected, **options)
        assert server.paths == [path]
        return [body for _, body, _ in server.asked]


def letters(path: str, body: bytes) -> Reply:
    return as_json({"tokens": [ord(letter) for letter in json.loads(body)["prompt"]], "count": 3, "max_model_len": 9})


@pytest.mark.parametrize(("dialect", "model"), [(VLLM(model="teacher"), "teacher"), (SGLang(), None)])
def test_the_probe_finds_another_tokenizer(dialect, model):
    options = {"path": dialect.tokenize_path, "model": model, "required": model is not None}
    for expected in ([[97, 98, 99]], [[1, 2], [97, 98, 99]]):
        (asked,) = map(json.loads, probe(letters, expected=expected, **options))
        assert asked["add_special_tokens"] is False and asked.get("model") == model
    with pytest.raises(TeacherError, match="other tokens"):
        probe(letters, expected=[[1, 2], [0, 1, 2]], **options)


def test_a_server_that_does_not_tell_its_tokenizer_is_warned_of_where_that_is_usual(caplog):
    def missing(path: str, body: bytes) -> Reply:
        return Reply(status=404)

    with caplog.at_level(logging.WARNING):
        probe(missing, path="/v1/tokenize", expected=[[1]], required=False)
    assert "could not be checked" in caplog.text and "404" in caplog.text
    with pytest.raises(TeacherError, match="404"):
        probe(missing, path="/tokenize", expected=[[1]])
    with pytest.raises(TeacherError, match="401"):
        probe(lambda path, body: Reply(status=401), path="/v1/tokenize", expected=[[1]], required=False)
