"""Records to samples: every token is predicted once, what cannot be used is named, results are cached."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig
from largekd.data.samples import LoadedSamples, document_affixes, load_samples
from largekd.errors import DataError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "naïve", "café", "1", "2", "3"]


def write_lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: object) -> LoadedSamples:
    names = ("sequence_length", "vocab_size", "num_proc", "first", "key")
    settings = {name: changes.pop(name) for name in names if name in changes}
    settings = {"sequence_length": 16, "vocab_size": 400, **settings}
    return load_samples(SourceConfig(path=str(path), **changes), tokenizer=tokenizer, **settings)


def chat(*contents: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize("begins", [False, True])
def test_every_token_but_a_documents_first_is_predicted_once(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast], begins: bool
) -> None:
    tokenizer = make_tokenizer(begins=begins)
    rng = np.random.default_rng(1)
    documents = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    for length in (2, 7, 16, 1000):
        samples = load(path, tokenizer, sequence_length=length).samples
        assert samples.lengths.max() <= length
        for record, text in enumerate(documents):
            pieces = [samples.ids(i).tolist() for i in np.flatnonzero(samples.records == record)]
            expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert expected[0] == 0 or not begins
            assert [pieces[0][0]] + [token for piece in pieces for token in piece[1:]] == expected
            assert all(before[-1] == after[0] for before, after in pairwise(pieces))
        assert all(samples.label_mask(i) is None for i in range(len(samples)))
        assert samples.tokens == sum(len(samples.ids(i)) - 1 for i in range(len(samples)))


def test_conversations_lose_their_end_and_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("hello", "the lazy dog"), chat("hello", "fox " * 50)])
    loaded = load(path, tokenizer, sequence_length=60)
    assert loaded.truncated == 1
    assert loaded.samples.lengths[1] == 60
    mask = loaded.samples.label_mask(1)
    assert mask is not None and mask[-1] == 1 and not mask.all()
    assert loaded.samples.label_mask(0).sum() < loaded.samples.lengths[0]
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*first answer starts beyond sequence_length = 16"):
        load(path, tokenizer, sequence_length=16)


BAD = [
    (b'{"text": "fine"}', ""),
    (b'{"text": "cut', "broken JSON"),
    (b'{"text": "  "}', "has empty text"),
    (b'{"text": 3}', "is a int"),
    (json.dumps(chat("only a question")).encode(), "no assistant message"),
    (b'{"text": "id \xff"}', "not valid UTF-8"),
    (b'{"text": "also fine"}', ""),
]


def test_unusable_records_are_set_aside_with_place_and_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD))
    loaded = load(path, tokenizer, max_bad_frac=0.75)
    assert set(loaded.samples.records.tolist()) == {0, 6}
    rows = loaded.quarantine.as_rows()
    assert [row["record"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["origin"] == f"{path}:{row['record'] + 1}"
        assert BAD[row["record"]][1] in row["reason"]
    assert json.loads(json.dumps(rows)) == rows
    assert loaded.quarantine.bad_frac == 5 / 7


def test_too_many_unusable_records_abort(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD))
    with pytest.raises(DataError, match=r"(?s)5 of 7 .*\(71\.43%\).*max_bad_frac = 0\.0.*a\.jsonl:2: broken JSON"):
        load(path, tokenizer)
    with pytest.raises(DataError, match=r"data\.eval\.max_bad_frac = 0\.7"):
        load(path, tokenizer, max_bad_frac=0.7, key="data.eval")
    write_lines(path, [{"text": ""}] * 9)
    with pytest.raises(DataError, match=r"(?s)no usable record among 9.*:5: has empty text\n  and 4 more"):
        load(path, tokenizer, max_bad_frac=1.0)


def test_a_sample_without_assistant_tokens_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("q", "a"), chat("only a question")])
    with pytest.raises(DataError, match=r"a\.jsonl:2: has no assistant message, so no token to learn"):
        load(path, tokenizer, sequence_length=100)
    assert len(load(path, tokenizer, sequence_length=100, loss_on="all").samples) == 2


def test_an_id_beyond_the_vocabulary_is_named(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer(extra=("<extra>",))
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "a <extra> b"}])
    assert len(load(path, tokenizer, vocab_size=len(tokenizer)).samples) == 2
    size = len(tokenizer) - 1
    with pytest.raises(DataError, match=rf"a\.jsonl:2: holds token id {size} \('<extra>'\), beyond the {size} ids"):
        load(path, tokenizer, vocab_size=size)


def test_tokenizers_without_end_or_template_say_so(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no eos_token"):
        document_affixes(tokenizer)
    path = write_lines(tmp_path / "a.jsonl", [chat("q", "a")])
    with pytest.raises(DataError, match=r"no chat template: set data\.train\.chat_template"):
        load(path, tokenizer)


def test_second_load_reads_the_cache_and_processes_agree(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": " ".join(WORDS[: 2 + i % 9])} for i in range(300)])
    two = load(path, tokenizer, num_proc=2).samples
    calls: list[int] = []
    once = load(path, tokenizer, sequence_length=17).samples
    original = PreTrainedTokenizerFast.__call__

    def counted(self: PreTrainedTokenizerFast, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    tokenizer("a call changes the tokenizer's state", padding="max_length", max_length=99, truncation=True)
    calls.clear()
    assert load(path, tokenizer, sequence_length=17).samples.fingerprint == once.fingerprint
    assert calls == [], "the second load must not tokenize"
    one = load(path, tokenizer).samples
    assert two.fingerprint == one.fingerprint


def test_samples_are_found_across_the_chunks_of_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]) for i in range(2500)]
    samples = load(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tokenizer, num_proc=2).samples
    assert len(samples._ids._ends) > 1, "the case needs several Arrow chunks"
    pieces: dict[int, list[int]] = {}
    for sample in range(len(samples)):
        record = int(samples.records[sample])
        ids = samples.ids(sample).tolist()
        assert len(ids) == samples.lengths[sample] + 1
        pieces.setdefault(record, ids[:1]).extend(ids[1:])
    assert [tokenizer.decode(pieces[record][:-1]) for record in range(2500)] == texts


def test_the_fingerprint_follows_the_content(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "the quick brown fox"}, {"text": "lazy dog"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    fingerprint = load(path, tokenizer).samples.fingerprint
    copy = write_lines(tmp_path / "elsewhere.jsonl", rows)
    assert load(copy, tokenizer).samples.fingerprint == fingerprint
    assert load(write_lines(path, rows[::-1]), tokenizer).samples.fingerprint != fingerprint
    write_lines(path, [{"text": "the quick brown fix"}, rows[1]])
    assert load(path, tokenizer).samples.fingerprint != fingerprint
    assert load(copy, tokenizer, sequence_length=3).samples.fingerprint != fingerprint


def test_all_work_happens_inside_the_first_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = []

    @contextmanager
    def first() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    path = write_lines(tmp_path / "a.jsonl", [{"text": "fox"}])
    original = PreTrainedTokenizerFast.__call__

    def checked(self: PreTrainedTokenizerFast, *args: object, **kwargs: object) -> object:
        assert inside == [True]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", checked)
    load(path, tokenizer, first=first)
    assert inside == [True, False]
