"""Weights of parts that a record names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig
from largekd.config.load import parse_config
from largekd.data.named_parts import locate_named_parts, read_named_parts
from largekd.data.quarantine import UnusableRecordError
from largekd.data.samples import LoadedSamples, load_samples
from largekd.errors import ConfigError, DataError

WEIGHTS = {"reasoning": 0.5, "answer": 2.0}
CONTENT = "the fox 🙂 and\n\nthe dog: 12!"
SPANS = [{"name": "reasoning", "start": 0, "end": 13}, {"name": "answer", "start": 24, "end": 26}]


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LoadedSamples:
    source = SourceConfig(**{"path": str(path), "named_span_weights": WEIGHTS, **changes})
    return load_samples(source, tokenizer=tokenizer, sequence_length=200, vocab_size=400)


def record(spans: Any = SPANS, *, content: str = CONTENT, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the dog: 12!"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": content},
    ]
    return {"messages": messages, "spans": spans, **more}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def weighted(loaded: LoadedSamples, tokenizer: PreTrainedTokenizerFast, weight: float) -> str:
    ids, weights = loaded.samples.ids(0), loaded.samples.token_weights(0)
    assert weights is not None
    return str(tokenizer.decode(ids[weights == np.float32(weight)].tolist()))


def test_named_parts_of_the_last_answer_are_weighted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert (CONTENT[0:13], CONTENT[24:26]) == ("the fox 🙂 and", "12")
    loaded = load(write(tmp_path / "a.jsonl", record()), tokenizer)
    assert weighted(loaded, tokenizer, 0.5) == "the fox 🙂 and"
    assert weighted(loaded, tokenizer, 2.0) == " 12", "of the last answer alone, with the space that its token has"
    rest = weighted(loaded, tokenizer, 1)
    assert rest.count("12") == 1
    assert rest.endswith("the dog:!<|im_end|>\n")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_name_that_no_part_has_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, record(None), record())
    else:
        Dataset.from_list([record(), record([])]).to_parquet(str(path))
    load(path, tokenizer, named_span_weights={"reasoning": 0.5, "resoning": 0.5})
    assert "data.train.named_span_weights.resoning: no record" in caplog.text
    assert "named_span_weights.reasoning:" not in caplog.text


def test_later_names_win_and_markers_come_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spans = [{"name": "answer", "start": 4, "end": 7}, {"name": "reasoning", "start": 0, "end": 13}]
    path = write(tmp_path / "a.jsonl", record(spans))
    markers = [{"start": "the", "weight": 4.0}]
    loaded = load(path, tokenizer, span_weights=markers, loss_on="assistant")
    assert weighted(loaded, tokenizer, 2.0) == " fox"
    assert weighted(loaded, tokenizer, 0.5) == "the 🙂 and"
    assert weighted(loaded, tokenizer, 4.0).endswith("the dog: 12!")
    other = load(path, tokenizer, named_span_weights={"answer": 2.0, "reasoning": 0.5})
    assert weighted(other, tokenizer, 0.5) == "the fox 🙂 and"


def test_parquet_and_other_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = write(tmp_path / "a.jsonl", {**record(), "parts": SPANS})
    expected = load(parts, tokenizer, spans_field="parts")
    path = tmp_path / "a.parquet"
    Dataset.from_list([record()]).to_parquet(path)
    found = load(path, tokenizer)
    np.testing.assert_array_equal(found.samples.token_weights(0), expected.samples.token_weights(0))
    assert weighted(found, tokenizer, 2.0) == " 12"
    as_text = tmp_path / "text.parquet"
    Dataset.from_list([{**record(), "spans": json.dumps(SPANS)}]).to_parquet(as_text)
    assert weighted(load(as_text, tokenizer), tokenizer, 2.0) == " 12"


def test_records_without_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", record(None), record(), record([]), {"text": "the fox"})
    samples = load(path, tokenizer).samples
    assert [set(np.unique(samples.token_weights(place))) for place in (0, 2)] == [{1}, {1}]
    assert 2.0 in samples.token_weights(1)
    assert samples.token_weights(3) is None
    plain = write(tmp_path / "b.jsonl", {"messages": record()["messages"]})
    with pytest.raises(DataError, match=r"data\.train\.named_span_weights: .*b\.jsonl has no column 'spans'"):
        load(plain, tokenizer)
    parquet = tmp_path / "b.parquet"
    Dataset.from_list([{"messages": record()["messages"]}]).to_parquet(parquet)
    with pytest.raises(DataError, match=r"data\.train\.named_span_weights: .*b\.parquet has no column 'spans'"):
        load(parquet, tokenizer)
    assert load(plain, tokenizer, named_span_weights={}).samples.token_weights(0) is None


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ("[{", "spans are not JSON"),
        ({"name": "answer"}, "spans are a dict, expected a list"),
        ([5], "a span is 5, expected name, start and end"),
        ([{"start": 0, "end": 1}], "a span is .*, expected name"),
        ([{"name": "answer", "start": 0, "end": 28}], r"span 'answer' is \[0, 28\), but .* has 27 characters"),
        ([{"name": "answer", "start": 3, "end": 2}], r"span 'answer' is \[3, 2\)"),
        ([{"name": "answer", "start": True, "end": 2}], r"span 'answer' is \[True, 2\)"),
    ],
)
def test_bad_spans_are_set_aside(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, spans: object, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", record(), record(spans))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}"):
        load(path, tokenizer)
    assert len(load(path, tokenizer, max_bad_frac=0.5).samples) == 1


def test_templates_that_move_white_space() -> None:
    content = "<think>\na b\n</think>c d "
    spans = [{"name": "reasoning", "start": 7, "end": 12}, {"name": "answer", "start": 20, "end": 24}]
    parts = read_named_parts(spans, messages=[{"role": "assistant", "content": content}])
    text = "<u> a b c d<a><think>  a b </think>\n\nc d<e> c d"
    places = locate_named_parts(parts, text=text, end=text.index("<e>"))
    assert [text[place.start : place.end] for place in places] == [" a b", "c d"]
    with pytest.raises(UnusableRecordError, match="template changes the last assistant message"):
        locate_named_parts(parts, text=text.replace("</think>", ""), end=len(text))


def test_settings_are_a_part_of_the_cache_key(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", {**record(), "parts": SPANS[:1]})
    settings: list[dict[str, Any]] = [
        {"named_span_weights": {}},
        {},
        {"named_span_weights": {"answer": 3.0}},
        {"spans_field": "parts"},
    ]
    prints = {load(path, tokenizer, **changes).samples.fingerprint for changes in settings}
    assert len(prints) == len(settings)


def test_keys_of_a_recipe() -> None:
    tree = {
        "run": {"dir": "runs/x"},
        "teacher": {"model": "t", "deepspeed": "d.json"},
        "student": {"model": "s", "deepspeed": "d.json"},
        "data": {"train": {"path": "a.jsonl", "named_span_weights": {"reasoning": 0.5, "answer": 2}}},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 16},
    }
    config = parse_config(tree)
    assert config.data.train.named_span_weights == {"reasoning": 0.5, "answer": 2.0}
    assert parse_config(config.model_dump(mode="json")) == config
    for weight in (-1, float("inf"), float("nan")):
        tree["data"]["train"]["named_span_weights"] = {"answer": weight}
        with pytest.raises(ConfigError, match=r"named_span_weights"):
            parse_config(tree)
