"""The client against servers that are slow, broken, wrong or hostile: bounded attempts, clear words, right signals."""

import hashlib
import random
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from teachers.remote_fakes import Reply, as_json, fake_server
from teachers.remote_jobs import refused_signals
from teachers.test_remote_wire import damaged, parts_of
from tiny import VOCAB, make_rows

from largekd.contracts import SampledRequest, SignalRequest, TapRequest, TopKRequest, VocabularyHead
from largekd.errors import TeacherError
from largekd.runtime.http import RefusedError, UnavailableError
from largekd.teachers import remote_http
from largekd.teachers.protocol import StoppedWaitingError, TeacherGoneError
from largekd.teachers.remote import Patience, RemoteTeacher
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_own import Expected, HeadInfo, OwnServers, ServerInfo, fetch_head, read_head, read_info
from largekd.teachers.remote_wire import Limits, decode_request, encode_answer

WIDTH = 6
REQUEST = SignalRequest(TopKRequest(5))
LIMITS = Limits(positions=100, sequence_length=24)
INFO = ServerInfo(
    protocol=1,
    model="digest",
    tokenizer="fingerprint",
    vocab_size=VOCAB,
    width=WIDTH,
    dtype="F32",
    positions=LIMITS.positions,
    sequence_length=LIMITS.sequence_length,
    head=HeadInfo(vocab_size=VOCAB, scale=1.0, softcap=None, bytes=10, sha256="0" * 64),
)
EXPECTED = Expected(tokenizer="fingerprint", vocab_size=VOCAB, shared_ids=VOCAB, sequence_length=24, rows=4)


def replicas(*servers, retries=3, timeout_s=5.0, token=None) -> Replicas:
    return Replicas(servers=servers, token=token, timeout_s=timeout_s, retries=retries)


def source(*servers, **options) -> OwnServers:
    head = VocabularyHead(torch.zeros(VOCAB, WIDTH), VOCAB)
    return OwnServers(replicas=replicas(*servers, **options), info=INFO, head=head, shared_ids=VOCAB)


def right(path: str, body: bytes) -> Reply:
    """The answer of a teacher that is well."""
    asked = decode_request(body, limits=LIMITS, vocab_size=VOCAB)
    return Reply(body=encode_answer(parts_of(asked), model="digest"))


def ids_of(teacher, batches, request=REQUEST):
    with teacher.signals(batches, request=request) as signals:
        return [signal.ids_TK for signal in signals]


@pytest.fixture
def batches():
    return make_rows(count=6, packed=True)


@pytest.fixture
def expected(batches):
    with fake_server(right) as server:
        return ids_of(RemoteTeacher(source(server.address), patience=Patience(wait_s=0.0)), batches)


def same(found, expected) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_a_step_is_split_by_the_limits_of_a_request_and_by_replicas(batches):
    parts = source("http://a").split(batches)
    assert [(part.start, part.stop) for part in parts] == [(0, 4), (4, 6)]
    assert [(part.start, part.stop) for part in source("http://a", "http://b").split(batches)] == [(0, 3), (3, 6)]


@pytest.mark.parametrize("seed", range(3))
def test_failures_of_all_kinds_are_retried_and_never_become_signals(batches, expected, monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(remote_http, "_FIRST_PAUSE_S", 1e-4)

    def answer(path: str, body: bytes) -> Reply:
        well = right(path, body)
        match draw.randrange(8):
            case 0:
                return replace(well, status=draw.choice([500, 502, 503, 429]), headers={"Retry-After": "0"})
            case 1:
                return replace(well, body=damaged(well.body, draw=draw)[: len(well.body) // 2])
            case 2:
                return Reply(write=lambda stream: stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"))
            case 3:
                return Reply(write=lambda stream: stream.write(draw.randbytes(200)))
            case 4:
                return as_json({"never": "safetensors"})
        return well

    with fake_server(answer) as server:
        teacher = RemoteTeacher(source(server.address, retries=40), patience=Patience(wait_s=0.0))
        for _ in range(4):
            assert same(ids_of(teacher, batches), expected)
    assert teacher.metrics["teacher/failed_requests"] > 0


def test_a_replica_that_fails_is_left_alone_for_a_while(batches, expected):
    with fake_server(lambda path, body: Reply(status=500)) as broken, fake_server(right) as well:
        teacher = RemoteTeacher(source(broken.address, well.address), patience=Patience(wait_s=0.0))
        for _ in range(5):
            assert same(ids_of(teacher, batches), expected)
    assert len(broken.asked) <= 2 and len(well.asked) == 10


def given_up(answer, *, batches, said, timeout_s=5.0) -> None:
    """One attempt at a server that answers so ends with these words."""
    with fake_server(answer) as server, pytest.raises(UnavailableError, match=said):
        source(server.address, retries=0, timeout_s=timeout_s).ask(batches, request=REQUEST, place=0)


def test_an_answer_that_never_ends_is_cut(batches):
    def endless(stream) -> None:
        stream.write(b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n\r\n")
        for _ in range(10_000):
            stream.write(b"x" * 65_536)

    for reply in (Reply(write=endless), Reply(headers={"Content-Length": str(10**12)})):
        given_up(lambda path, body, reply=reply: reply, batches=batches, said="longer than")


def drip(status: str, *, done: list[int]) -> Reply:
    """A body that goes on for five seconds, unless the client leaves; `done` takes what was sent of 100 bytes."""

    def dripping(stream) -> None:
        stream.write(f"HTTP/1.1 {status}\r\nContent-Length: 1000\r\n\r\n".encode())
        for place in range(100):
            stream.write(b"x")
            stream.flush()
            done.append(place)
            time.sleep(0.05)

    return Reply(write=dripping)


def test_an_answer_that_drips_is_given_up(batches):
    given_up(lambda path, body: drip("200 OK", done=[]), batches=batches, said="not whole after", timeout_s=0.3)


def test_a_refusal_that_drips_is_not_heard_out(batches):
    sent: list[int] = []
    with fake_server(lambda path, body: drip("404 Not Found", done=sent)) as server:
        with pytest.raises(RefusedError, match=r"status 404 \(x+\)"):
            source(server.address, timeout_s=0.3).ask(batches, request=REQUEST, place=0)
        assert len(sent) < 100


def test_an_answer_that_does_not_come_is_given_up(batches):
    given_up(lambda path, body: time.sleep(2) or Reply(), batches=batches, said="Timeout", timeout_s=0.2)


def test_redirects_are_refused_and_not_followed(batches):
    with fake_server(right) as other:
        redirect = Reply(status=307, headers={"Location": other.address + "/v1/signals"})
        with fake_server(lambda path, body: redirect) as server, pytest.raises(RefusedError, match="redirect"):
            source(server.address).ask(batches, request=REQUEST, place=0)
        assert len(server.asked) == 1
    assert other.asked == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_repeated_and_hides_the_token(batches, status):
    token = "a-token-that-nobody-may-see"
    said = as_json({"error": f"Authorization: Bearer {token}"}, status=status)
    with fake_server(lambda path, body: said) as server:
        teacher = RemoteTeacher(source(server.address, token=token), patience=Patience(wait_s=9.0))
        with pytest.raises(TeacherGoneError, match=str(status)) as caught:
            ids_of(teacher, batches)
        assert all(headers["Authorization"] == f"Bearer {token}" for _, _, headers in server.asked)
        assert len(server.asked) == 2, "one for each request of the step"
    assert token not in str(caught.value)


def test_a_token_that_a_server_repeats_is_hidden(batches):
    token = "pw1"
    for status, error in ((503, UnavailableError), (404, RefusedError)):
        said = Reply(status=status, body=b"y" * 298 + f"{token} and again {token}".encode())
        with fake_server(lambda path, body, said=said: said) as server, pytest.raises(error) as caught:
            source(server.address, token=token, retries=0).ask(batches, request=REQUEST, place=0)
        # Neither whole nor cut where the text is.
        assert "pw" not in str(caught.value) and "y**" in str(caught.value)


def test_a_refusal_of_one_rank_ends_the_wait_of_all(two_ranks):
    refusal = as_json({"error": "no such model"}, status=404)
    with fake_server(right) as well, fake_server(lambda path, body: refusal) as refusing:
        found = two_ranks.run(refused_signals, servers=[well.address, refusing.address])
    assert [name for name, _ in found] == ["TeacherRefusesError"] * 2
    assert found[0][1] == found[1][1] and "no such model" in found[0][1]


def test_another_teacher_behind_the_same_address_is_refused(batches):
    def other(path: str, body: bytes) -> Reply:
        asked = decode_request(body, limits=LIMITS, vocab_size=VOCAB)
        return Reply(body=encode_answer(parts_of(asked), model="another"))

    with fake_server(other) as server:
        teacher = RemoteTeacher(source(server.address), patience=Patience(wait_s=9.0))
        with pytest.raises(TeacherError, match="another teacher"):
            ids_of(teacher, batches)


def test_a_server_that_comes_back_is_waited_for(batches, expected):
    beats = []

    def recovering(path: str, body: bytes) -> Reply:
        return right(path, body) if beats else Reply(status=503)

    with fake_server(recovering) as server:
        patience = Patience(wait_s=60.0, beat=beats.append)
        teacher = RemoteTeacher(source(server.address, retries=0), patience=patience)
        assert same(ids_of(teacher, batches), expected)
    assert set(beats) == {"waiting for the teacher's servers"}
    assert teacher.metrics["teacher/waited_s"] > 0


def test_waiting_ends_when_told_to_stop_and_when_it_took_too_long(batches):
    with fake_server(lambda path, body: Reply(status=503)) as server:
        told = Patience(wait_s=60.0, stopping=lambda: True)
        with pytest.raises(StoppedWaitingError):
            ids_of(RemoteTeacher(source(server.address, retries=0), patience=told), batches)
        with pytest.raises(TeacherGoneError, match=r"wait_s = 0\.1 s .*503"):
            ids_of(RemoteTeacher(source(server.address, retries=0), patience=Patience(wait_s=0.1)), batches)


def test_what_was_prepared_is_not_asked_for_again(batches, expected):
    other = SignalRequest(TopKRequest(4))
    with fake_server(right) as server:
        teacher = RemoteTeacher(source(server.address), patience=Patience(wait_s=0.0))
        teacher.prepare(batches, request=REQUEST)
        teacher.prepare(batches, request=REQUEST)
        teacher.prepare(batches, request=other)
        assert same(ids_of(teacher, batches), expected)
        copies = [batch.to(device=torch.device("cpu")) for batch in batches]
        assert ids_of(teacher, copies, other)[3].shape[1] == 4
        assert len(server.asked) == 4, "two requests for each of two steps"
        # Rows that changed since, under the same segments, are other rows.
        changed = [replace(batch, input_ids_BS=batch.input_ids_BS.flip(1)) for batch in batches]
        teacher.prepare(batches, request=REQUEST)
        assert not same(ids_of(teacher, changed), expected)


def test_captured_layers_are_refused_before_the_run():
    teacher = RemoteTeacher(source("http://127.0.0.1:9"), patience=Patience(wait_s=0.0))
    teacher.check(SignalRequest("full"))
    with pytest.raises(TeacherError, match="captured layers"):
        teacher.check(SignalRequest("full", TapRequest(hidden=(1,))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": "other"}, "tokenizer other"),
        ({"vocab_size": 7}, "vocabulary size 7"),
        ({"sequence_length": 8}, "rows of up to 8"),
        ({"positions": 95}, "eval.micro_batch_size = 4: .* 96 positions, .* up to 95"),
        ({"protocol": 2}, "protocol 2"),
    ],
)
def test_a_server_of_another_teacher_is_refused_before_the_first_step(change, said):
    info = as_json(INFO.model_dump() | change)
    with fake_server(lambda path, body: info) as server, pytest.raises(TeacherError, match=said):
        read_info(replicas(server.address), expected=EXPECTED)


def test_replicas_must_agree():
    infos = [INFO, INFO.model_copy(update={"model": "another"})]
    with (
        fake_server(lambda path, body: as_json(infos[0].model_dump())) as one,
        fake_server(lambda path, body: as_json(infos[1].model_dump())) as two,
    ):
        assert read_info(replicas(one.address), expected=EXPECTED) == INFO
        with pytest.raises(TeacherError, match="another teacher than"):
            read_info(replicas(one.address, two.address), expected=EXPECTED)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"protocol": "1"}', b"[" * 50_000, b"\xff"])
def test_an_info_of_another_kind_is_no_crash(body):
    with fake_server(lambda path, _: Reply(body=body)) as server, pytest.raises(TeacherError, match="v1/info"):
        read_info(replicas(server.address, retries=0), expected=EXPECTED)


def test_a_head_that_arrives_damaged_is_not_kept(tmp_path):
    for body in (b"0123456789", b"0123", b"0123456789abc"):
        with fake_server(lambda path, _, body=body: Reply(body=body)) as server, pytest.raises(TeacherError):
            fetch_head(replicas(server.address), info=INFO, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_no_server_sends_is_refused_before_the_run():
    own = source("http://127.0.0.1:9")
    for fits in (TopKRequest(4096), SampledRequest(4096)):
        own.check(SignalRequest(fits))
    for wanted, said in ((TopKRequest(4097), "k must be"), (SampledRequest(4097), "draws must be")):
        with pytest.raises(TeacherError, match=f"objective.signal: .*{said} .* 4096"):
            own.check(SignalRequest(wanted))


def described(weight: torch.Tensor) -> tuple[bytes, ServerInfo]:
    """A head's file, and what its server tells of it."""
    body = save({"weight": weight})
    head = INFO.head.model_copy(update={"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()})
    return body, INFO.model_copy(update={"head": head})


def test_a_head_is_downloaded_once_and_again_when_its_file_is_damaged(tmp_path):
    weight = torch.randn(VOCAB, WIDTH)
    body, info = described(weight)
    with fake_server(lambda path, _: Reply(body=body)) as server:

        def fetched() -> torch.Tensor:
            path = fetch_head(replicas(server.address), info=info, folder=tmp_path)
            return read_head(path, info=info, device=torch.device("cpu")).weight_VD

        assert torch.equal(fetched(), weight) and torch.equal(fetched(), weight)
        assert server.paths == ["/v1/head"]
        (path,) = tmp_path.iterdir()
        for damage in (body[:-1] + bytes([body[-1] ^ 1]), body[:50], b""):
            path.write_bytes(damage)
            assert torch.equal(fetched(), weight)
        assert len(server.paths) == 4 and list(tmp_path.iterdir()) == [path]


def test_a_head_that_cannot_be_kept_or_read_is_told(tmp_path):
    body, info = described(torch.randn(VOCAB, WIDTH))
    with (
        fake_server(lambda path, _: Reply(body=body)) as server,
        pytest.raises(TeacherError, match="could not be kept"),
    ):
        fetch_head(replicas(server.address), info=info, folder=tmp_path / "missing")
    (tmp_path / "head").write_bytes(body[:50])
    for name in ("head", "gone"):
        with pytest.raises(TeacherError, match=f"{name}: .* cannot be read"):
            read_head(tmp_path / name, info=info, device=torch.device("cpu"))


def test_a_download_that_stalls_is_given_up(tmp_path):
    sent: list[int] = []
    info = INFO.model_copy(update={"head": INFO.head.model_copy(update={"bytes": 1000})})
    with fake_server(lambda path, _: drip("200 OK", done=sent)) as server:
        with pytest.raises(TeacherError, match="v1/head stalled"):
            fetch_head(replicas(server.address, timeout_s=0.3), info=info, folder=tmp_path)
        assert len(sent) < 100
    assert list(tmp_path.iterdir()) == []
