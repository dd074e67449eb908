"""Records that name one of several teachers: what their samples and batches hold, and what other samples do not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from largekd.config.data import SourceConfig
from largekd.contracts import Segment
from largekd.data.collate import collate
from largekd.data.samples import LoadedSamples, Routing, load_samples
from largekd.errors import DataError

ROUTING = Routing(field="tutor", names=("left", "right"))
RECORDS = [
    {"text": "the quick brown fox " * 8, "tutor": "right"},
    {"text": "hello the dog", "tutor": "left"},
    {"text": "lazy dog jumps", "tutor": None},
    {"text": "over the lazy dog"},
]


def load(
    source: Path, tokenizer: PreTrainedTokenizerFast, *, routing: Routing | None = ROUTING, **options
) -> LoadedSamples:
    config = SourceConfig(path=str(source), **options)
    return load_samples(config, tokenizer=tokenizer, sequence_length=16, vocab_size=400, routing=routing)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_parquet(path: Path, records: list[dict]) -> Path:
    columns = {name: [record.get(name) for record in records] for name in ("text", "tutor")}
    Dataset.from_dict(columns).to_parquet(path)
    return path


@pytest.mark.parametrize(("name", "writer"), [("a.jsonl", write), ("a.parquet", as_parquet)])
def test_samples_hold_the_place_of_their_records_teacher(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, writer: Callable[..., Path]
) -> None:
    samples = load(writer(tmp_path / name, RECORDS), tokenizer).samples
    assert samples.teachers is not None
    expected = {0: 1, 1: 0, 2: -1, 3: -1}
    assert [expected[record] for record in samples.records] == samples.teachers.tolist()
    assert (samples.records == 0).sum() > 1, "the first text makes several samples"


def test_a_batch_has_the_teacher_of_every_position(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = load(write(tmp_path / "a.jsonl", RECORDS[1:]), tokenizer).samples
    lengths = samples.lengths.tolist()
    row = (Segment(0, 0, lengths[0]), Segment(1, lengths[0], lengths[1]))
    for packing in (True, False):
        batch = collate([row, ()], samples=samples, sequence_length=16, packing=packing)
        width = batch.input_ids_BS.shape[1]
        expected = [0] * lengths[0] + [-1] * (width - lengths[0])
        assert batch.teacher_BS is not None and batch.teacher_BS.tolist() == [expected, [-1] * width]


def test_an_unknown_name_is_an_unusable_record(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", [*RECORDS, {"text": "the fox", "tutor": "middle"}])
    message = r"(?s)a\.jsonl:5.*column 'tutor' holds 'middle'; the teachers are 'left', 'right'"
    with pytest.raises(DataError, match=message):
        load(path, tokenizer)
    loaded = load(path, tokenizer, max_bad_frac=0.5)
    assert loaded.samples.records.max() == 3 and len(loaded.quarantine.bad) == 1


def test_something_else_than_a_name_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"column 'tutor' holds a int, expected a teacher's name"):
        load(write(tmp_path / "a.jsonl", [{"text": "the fox", "tutor": 3}]), tokenizer)
    Dataset.from_dict({"text": ["the fox"], "tutor": [3]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"data\.train: column 'tutor' of .*a\.parquet holds .*expected names"):
        load(tmp_path / "a.parquet", tokenizer)


def test_other_samples_are_what_they_were(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    plain, routed = load(path, tokenizer, routing=None).samples, load(path, tokenizer).samples
    assert plain.teachers is None and np.array_equal(plain.lengths, routed.lengths)
    assert plain.fingerprint != routed.fingerprint
    batch = collate([(Segment(0, 0, int(plain.lengths[0])),)], samples=plain, sequence_length=16, packing=True)
    assert batch.teacher_BS is None
    other = Routing(field="tutor", names=("right", "left"))
    assert load(path, tokenizer, routing=other).samples.teachers[0] == 0
