"""The bytes between a remote teacher and its client: what goes in comes out, and nothing else is let in."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import save
from tiny import VOCAB, make_rows

from largekd.contracts import SampledRequest, TopKRequest
from largekd.teachers.remote_wire import (
    Limits,
    WireError,
    WireRequest,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

LIMITS = Limits(positions=256, sequence_length=24)
WIDTH = 6


def request(wanted="full", *, packed=True, count=3, seeds=()):
    return WireRequest(
        batches=tuple(make_rows(count=count, packed=packed)), wanted=wanted, vocab_size=VOCAB, seeds=seeds
    )


def parts_of(asked: WireRequest) -> dict[str, torch.Tensor]:
    """An answer that is right; each micro-batch's numbers depend on its ids alone."""
    parts = {}
    for place, batch in enumerate(asked.batches):
        tokens, ids_P = batch.counted_T.numel(), batch.input_ids_BS.flatten()
        drawn = torch.Generator().manual_seed(int((ids_P * torch.arange(ids_P.numel())).sum()))
        if asked.wanted == "full":
            parts[f"{place}.hidden"] = torch.randn(tokens, WIDTH, generator=drawn)
        else:
            k = asked.wanted.k
            logp_TV = torch.randn(tokens, VOCAB, generator=drawn).log_softmax(-1)
            logp_TK, ids_TK = logp_TV.topk(k, dim=-1)
            tail_T = torch.log1p(-logp_TK.exp().sum(-1))
            parts |= {f"{place}.ids": ids_TK.int(), f"{place}.logp": logp_TK}
            parts |= {f"{place}.tail": tail_T, f"{place}.tempered_tail": tail_T.clone()}
    return parts


def decode(body: bytes, *, asked: WireRequest):
    return decode_answer(body, request=asked, width=WIDTH, dtype="F32")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("wanted", "seeds"),
    [("full", ()), (TopKRequest(5, 2.0), ()), (SampledRequest(4, 0.5, 2.0), (1, 2**63 - 1, 0))],
)
def test_a_request_arrives_as_it_was_sent(packed, wanted, seeds):
    asked = request(wanted, packed=packed, seeds=seeds)
    found = decode_request(encode_request(asked), limits=LIMITS, vocab_size=VOCAB)
    assert (found.wanted, found.vocab_size, found.seeds) == (wanted, VOCAB, seeds)
    for mine, theirs in zip(found.batches, asked.batches, strict=True):
        assert torch.equal(mine.counted_T, theirs.counted_T)
        for name, tensor in theirs.model_inputs.items():
            assert torch.equal(mine.model_inputs[name], tensor) and mine.model_inputs[name].dtype == tensor.dtype


@pytest.mark.parametrize("wanted", ["full", TopKRequest(5)])
def test_an_answer_arrives_as_it_was_sent(wanted):
    asked = request(wanted)
    sent = parts_of(asked)
    model, answers = decode(encode_answer(sent, model="digest"), asked=asked)
    assert model == "digest"
    for place, answer in enumerate(answers):
        for name, tensor in answer.items():
            assert torch.equal(tensor, sent[f"{place}.{name}"].to(tensor.dtype))


def _set(name, value):
    def change(parts):
        parts[name] = value(parts[name]) if callable(value) else value

    return change


def _with(where, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[where] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("2.logp", _with((0, 1), math.nan)), "not a number"),
        (_set("2.logp", _with((0, 1), 0.5)), "above 0"),
        (_set("2.logp", _with((0, 0), -math.inf)), "first of a position"),
        (_set("2.logp", _with((0, slice(0, 2)), -0.1)), "more than 1"),
        (_set("2.tail", _with(0, math.nan)), "tail"),
        (_set("2.tempered_tail", _with(0, math.inf)), "tail"),
        (_set("2.ids", _with((0, 0), VOCAB)), "id is not"),
        (_set("2.ids", _with((0, 0), -1)), "id is not"),
        (_set("2.ids", lambda ids: ids[:, :1].expand(-1, 5).contiguous()), "twice"),
        (_set("2.ids", lambda ids: ids.long()), "tensors are"),
        (_set("2.ids", lambda ids: ids[:-1]), "tensors are"),
        (_set("9.ids", torch.zeros(1, dtype=torch.int32)), "tensors are"),
        (lambda parts: parts.pop("0.tail"), "tensors are"),
    ],
)
def test_an_answer_that_no_teacher_gives_is_refused(change, said):
    asked = request(TopKRequest(5))
    parts = parts_of(asked)
    change(parts)
    with pytest.raises(WireError, match=said):
        decode(encode_answer(parts, model="digest"), asked=asked)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_states_must_be_finite(value):
    asked = request()
    parts = parts_of(asked)
    parts["2.hidden"][0, 0] = value
    with pytest.raises(WireError, match="finite"):
        decode(encode_answer(parts, model="digest"), asked=asked)


def damaged(body: bytes, *, draw: random.Random) -> bytes:
    """`body` with a few bytes changed, cut, doubled or put in, anywhere."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1) if draw.random() < 0.5 else draw.randrange(min(len(body), 300) + 1)
        match draw.randrange(4):
            case 0:
                body = body[:at] + bytes([draw.randrange(256)]) + body[at + 1 :]
            case 1:
                body = body[:at]
            case 2:
                body = body[:at] + draw.randbytes(draw.randint(1, 40)) + body[at:]
            case 3:
                body = body[:at] + body[at // 2 :]
    return body


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bodies_are_refused_or_harmless(seed):
    """Whatever comes, it is refused with a WireError, or what is read has the shapes and numbers of a right one."""
    draw, refused = random.Random(seed), 0
    asked = request(TopKRequest(5))
    answer, question = encode_answer(parts_of(asked), model="digest"), encode_request(asked)
    for _ in range(400):
        try:
            _, answers = decode(damaged(answer, draw=draw), asked=asked)
            for found, batch in zip(answers, asked.batches, strict=True):
                assert found["ids"].shape == (batch.counted_T.numel(), 5)
                assert not found["logp"].isnan().any()
        except WireError:
            refused += 1
        try:
            read = decode_request(damaged(question, draw=draw), limits=LIMITS, vocab_size=VOCAB)
            for batch in read.batches:
                assert batch.input_ids_BS.max() < VOCAB and batch.input_ids_BS.numel() <= LIMITS.positions
        except WireError:
            refused += 1
    assert refused > 400


def raw(tensors: dict[str, torch.Tensor], **about) -> bytes:
    described = {"protocol": 1, "wanted": {"kind": "hidden"}, "vocab_size": VOCAB, "seeds": []} | about
    return save(tensors, metadata={"largekd": json.dumps(described)})


def tensors_of(ids, *, positions=None, mask=None, counted=(0,)):
    found = {"0.input_ids": torch.tensor(ids, dtype=torch.int32)}
    found["0.counted"] = torch.tensor(counted, dtype=torch.int32)
    layout = "position_ids" if mask is None else "attention_mask"
    default = list(range(len(ids[0]))) if positions is None else positions
    found[f"0.{layout}"] = torch.tensor([default] * len(ids) if mask is None else mask, dtype=torch.int32)
    return found


@pytest.mark.parametrize(
    ("tensors", "about", "said"),
    [
        (tensors_of([[1, VOCAB]]), {}, "input id"),
        (tensors_of([[1, -2]]), {}, "input id"),
        (tensors_of([[1, 2]], counted=(2,)), {}, "counted positions"),
        (tensors_of([[1, 2]], counted=(1, 1)), {}, "counted positions"),
        (tensors_of([[1, 2]], positions=[1, 2]), {}, "position_ids"),
        (tensors_of([[1, 2, 3]], positions=[0, 2, 3]), {}, "position_ids"),
        (tensors_of([[1, 2]], mask=[[0, 0]]), {}, "attention_mask"),
        (tensors_of([[1, 2]], mask=[[2, 1]]), {}, "attention_mask"),
        (tensors_of([[1] * 25]), {}, "at most 24"),
        (tensors_of([[1] * 24] * 11), {}, "at most 256"),
        (tensors_of([[1, 2]]), {"protocol": 2}, "protocol 1"),
        (tensors_of([[1, 2]]), {"vocab_size": VOCAB + 1}, "vocab_size"),
        (tensors_of([[1, 2]]), {"vocab_size": True}, "vocab_size"),
        (tensors_of([[1, 2]]), {"seeds": [1]}, "seeds"),
        (tensors_of([[1, 2]]), {"wanted": {"kind": "top_k", "k": 0, "temperature": 1.0}}, "k must be"),
        (tensors_of([[1, 2]]), {"wanted": {"kind": "top_k", "k": 10**9, "temperature": 1.0}}, "k must be"),
        (tensors_of([[1, 2]]), {"wanted": {"kind": "top_k", "k": 2, "temperature": math.nan}}, "temperature"),
        (tensors_of([[1, 2]]), {"wanted": {"kind": "top_k", "k": 2, "temperature": 0}}, "temperature"),
        (tensors_of([[1, 2]]), {"wanted": {"kind": "taps"}}, "wanted"),
        (tensors_of([[1, 2]]), {"wanted": None}, "wanted"),
        ({name: one.long() for name, one in tensors_of([[1, 2]]).items()}, {}, "int32"),
        ({"0.input_ids": torch.ones(1, 2, dtype=torch.int32)}, {}, "micro-batch has"),
        ({}, {}, "micro-batch has"),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused(tensors, about, said):
    with pytest.raises(WireError, match=said):
        decode_request(raw(tensors, **about), limits=LIMITS, vocab_size=VOCAB)


def test_a_header_that_promises_more_than_there_is_allocates_nothing():
    header = json.dumps(
        {
            "__metadata__": {"largekd": "{}"},
            "0.input_ids": {"dtype": "I32", "shape": [2**20, 2**20], "data_offsets": [0, 4]},
        }
    ).encode()
    for size in (len(header), 2**63 - 1):
        with pytest.raises(WireError):
            decode_request(size.to_bytes(8, "little") + header, limits=LIMITS, vocab_size=VOCAB)
