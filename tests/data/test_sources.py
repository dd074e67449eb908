"""Files to records, and the message for everything that can be wrong with them."""

import json
import re
from pathlib import Path

import datasets
import pytest

from largekd.config.data import SourceConfig
from largekd.data.sources import Records, find_files, read_records
from largekd.errors import DataError


def write_lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def texts(records: Records) -> list[str | None]:
    return [row["text"] for row in records.dataset]


def test_lines_keep_order_and_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "three"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "other": 5}])
    for path in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        records = read_records(SourceConfig(path=path))
        assert texts(records) == ["one", "two", "three"]
        assert [records.origin(i) for i in range(3)] == [
            f"{tmp_path}/a.jsonl:1",
            f"{tmp_path}/a.jsonl:2",
            f"{tmp_path}/b.jsonl:1",
        ]


def test_blank_lines_count_and_separators_inside_strings_do_not_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "x\xe2\x80\xa8y"}\n')
    records = read_records(SourceConfig(path=str(path)))
    assert texts(records) == ["one", "x\u2028y"]
    assert records.origin(1) == f"{path}:3"


def test_json_array_json_lines_and_text_file(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(' [{"text": "one"},\n {"text": "two"}]')
    assert texts(read_records(SourceConfig(path=str(tmp_path / "array.json")))) == ["one", "two"]
    write_lines(tmp_path / "lines.json", [{"text": "one"}, {"text": "two"}])
    assert texts(read_records(SourceConfig(path=str(tmp_path / "lines.json")))) == ["one", "two"]
    (tmp_path / "whole.txt").write_text("first\n\nsecond\n")
    records = read_records(SourceConfig(path=str(tmp_path / "whole.txt"), text_field="body"))
    assert texts(records) == ["first\n\nsecond\n"]


def test_parquet_takes_the_named_columns(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"body": ["one", "two"], "score": [1, 2]})
    data.to_parquet(str(tmp_path / "a.parquet"))
    source = SourceConfig(path=str(tmp_path / "a.parquet"), text_field="body", max_samples=1)
    records = read_records(source)
    assert records.dataset.column_names == ["text"]
    assert texts(records) == ["one"]
    with pytest.raises(DataError, match=r"'score' of .* holds .*int64.*, expected strings"):
        read_records(SourceConfig(path=str(tmp_path / "a.parquet"), text_field="score"))
    with pytest.raises(DataError, match=r"neither a column 'messages' .* nor 'text' .*'body', 'score'"):
        read_records(SourceConfig(path=str(tmp_path / "a.parquet")))


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: "):
        read_records(SourceConfig(path=str(tmp_path / "a.parquet")))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    assert texts(read_records(SourceConfig(path=str(path)))) == ["one"]
    write_lines(path, [{"text": "two"}, {"text": "three"}])
    assert texts(read_records(SourceConfig(path=str(path)))) == ["two", "three"]
    assert texts(read_records(SourceConfig(path=str(path), max_samples=1))) == ["two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_skipped_samples_come_before_those_that_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three", "four"]})
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path)
    assert texts(read_records(SourceConfig(path=str(path), skip_samples=1, max_samples=2))) == ["two", "three"]
    assert texts(read_records(SourceConfig(path=str(path), skip_samples=2))) == ["three", "four"]
    with pytest.raises(DataError, match="empty"):
        read_records(SourceConfig(path=str(path), skip_samples=4))


def test_max_samples_counts_over_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write_lines(tmp_path / "b.jsonl", [{"text": "three"}, {"text": "four"}])
    assert texts(read_records(SourceConfig(path=str(tmp_path), max_samples=3))) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x",}', "broken JSON: .*column"),
        (b'{"text": "\xff"}', "not valid UTF-8 at byte 10"),
        (b"[1, 2]", "is a JSON list, expected an object"),
        (b'{"text": 5}', "'text' is a int, expected a string"),
        (b'{"title": "x"}', "has neither 'messages' nor 'text' .*'title'"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_kept_with_its_problem(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    row = read_records(SourceConfig(path=str(path))).dataset[1]
    assert row["text"] is None
    assert row["origin"] == f"{path}:2"
    assert re.search(problem, row["problem"])


def test_messages_win_over_text_record_by_record(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi", "odd": [1, {"x": None}]}]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "t", "messages": chat}, {"text": "t", "messages": None}])
    first, second = read_records(SourceConfig(path=str(path))).dataset
    assert (first["text"], json.loads(first["messages"])) == (None, chat)
    assert (second["text"], second["messages"]) == ("t", None)


def test_missing_path_names_key_and_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.eval\.path = .*no file or folder .*absent\.jsonl"):
        read_records(SourceConfig(path=str(tmp_path / "absent.jsonl")), key="data.eval")
    with pytest.raises(DataError, match=r"searched the pattern .*\*\.jsonl"):
        read_records(SourceConfig(path=f"{tmp_path}/*.jsonl"))
    with pytest.raises(
        DataError, match=r"searched the folder .*\.jsonl, \.json, \.txt, \.parquet; there is no such file"
    ):
        read_records(SourceConfig(path=str(tmp_path)))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv ends in none of them"):
        read_records(SourceConfig(path=str(tmp_path / "a.csv")))


def test_only_a_hub_like_name_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_files("allenai/c4-sample.v1") is None
    with pytest.raises(DataError, match="no file or folder"):
        find_files("owner/name/third")
    calls = []

    def refuse(path: str, subset: str | None, *, split: str) -> datasets.Dataset:
        calls.append((path, subset, split))
        raise ConnectionError("no network")

    monkeypatch.setattr("largekd.data.sources.load_dataset", refuse)
    with pytest.raises(DataError, match=r"hub data set \(subset 'en', split 'test'\): no network"):
        read_records(SourceConfig(path="owner/name", subset="en", split="test"))
    assert calls == [("owner/name", "en", "test")]


def test_hub_data_set_is_reduced_to_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi"}]
    data = datasets.Dataset.from_dict({"conversation": [chat] * 3, "id": [1, 2, 3]})
    monkeypatch.setattr("largekd.data.sources.load_dataset", lambda *_, **__: data)
    records = read_records(SourceConfig(path="owner/name", messages_field="conversation", max_samples=2))
    assert records.dataset.column_names == ["messages"]
    assert (len(records), records.origin(1)) == (2, "owner/name: record 1")


def test_refusals_that_name_the_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"data\.train: .*empty\.jsonl is empty"):
        read_records(SourceConfig(path=str(empty)))
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(DataError, match=r"data\.train: .*empty\.parquet is empty"):
        read_records(SourceConfig(path=str(tmp_path / "empty.parquet")))
    other = write_lines(tmp_path / "other.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(
        DataError, match=r"'messages' \(data\.train\.messages_field\) nor 'text' .*'answer', 'question'"
    ):
        read_records(SourceConfig(path=str(other)))
    with pytest.raises(DataError, match=r"data\.train\.subset = 'en' is for hub"):
        read_records(SourceConfig(path=str(other), subset="en"))
    with pytest.raises(DataError, match="mixes json, parquet files"):
        read_records(SourceConfig(path=str(tmp_path)))
    array = tmp_path / "array.json"
    array.write_text('[{"text": "one"},\n{"text": }]')
    with pytest.raises(DataError, match=r"array\.json:2: broken JSON array"):
        read_records(SourceConfig(path=str(array)))
