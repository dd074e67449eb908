"""JSON lines and TensorBoard events: what is read back, after kills and resumes."""

import errno
import json
import math
import random
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largekd.errors import ConfigError, LargeKDError
from largekd.monitoring.sinks import JsonlSink, TensorBoardSink


def write_steps(sink: JsonlSink | TensorBoardSink, *, steps: range, value: float) -> None:
    for step in steps:
        sink.write(step=step, values={"loss": value, "optim/lr/a b": 0.5})
    sink.close()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    # Sorted, because files that begin within one second are read in the order of their serial numbers as text.
    return sorted((event.step, event.value) for event in accumulator.Scalars(tag))


def test_jsonl_writes_one_flushed_object_per_record(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(step=1, values={"loss": 2.5, "tokens": 10, "kd/forward_kl": 0.25})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "tokens": 10, "kd/forward_kl": 0.25}\n'
    sink.close()
    sink.close()


def test_jsonl_nonfinite_numbers_are_null_and_listed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(step=1, values={"loss": math.nan, "optim/grad_norm": math.inf, "a/b": -math.inf, "tokens": 3})
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {
        "step": 1,
        "loss": None,
        "optim/grad_norm": None,
        "a/b": None,
        "tokens": 3,
        "nonfinite": {"loss": "nan", "optim/grad_norm": "inf", "a/b": "-inf"},
    }


def test_jsonl_resume_cuts_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_steps(JsonlSink(path, resume_step=0), steps=range(1, 9), value=1.0)
    write_steps(JsonlSink(path, resume_step=5), steps=range(6, 8), value=2.0)
    assert [(record["step"], record["loss"]) for record in lines(path)] == [(n, 1.0) for n in range(1, 6)] + [
        (6, 2.0),
        (7, 2.0),
    ]
    write_steps(JsonlSink(path, resume_step=0), steps=range(0, 2), value=3.0)
    assert [(record["step"], record["loss"]) for record in lines(path)] == [(0, 3.0), (1, 3.0)]
    write_steps(JsonlSink(path, resume_step=0), steps=range(0, 1), value=4.0)
    assert [(record["step"], record["loss"]) for record in lines(path)] == [(0, 4.0)]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0}', b"\0" * 40, b"\xff\xfe\n", b"[1]\n"])
def test_jsonl_torn_end_is_dropped_with_a_warning(tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    write_steps(JsonlSink(path, resume_step=0), steps=range(1, 4), value=1.0)
    with path.open("ab") as file:
        file.write(torn)
    write_steps(JsonlSink(path, resume_step=9), steps=range(10, 11), value=2.0)
    assert [record["step"] for record in lines(path)] == [1, 2, 3, 10]
    assert re.search(r"metrics\.jsonl, line 4 is no record", caplog.text)


def test_jsonl_cut_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(JsonlSink(path, resume_step=0), steps=range(1, 4), value=1.0)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("largekd.monitoring.json_records.os.fsync", full)
    with pytest.raises(LargeKDError, match=r"cannot write .*metrics\.jsonl: No space left on device.*run\.dir"):
        JsonlSink(path, resume_step=1)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_in_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LargeKDError, match=r"cannot write .*file/metrics\.jsonl"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl", resume_step=0)


def test_disk_full_while_writing_is_a_readable_error(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    with Path("/dev/full").open("w") as full:
        sink._file.close()
        sink._file = full
        with pytest.raises(LargeKDError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            sink.write(step=1, values={"loss": 1.0})
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_tensorboard_tags_are_sanitised_and_read_back(tmp_path: Path):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 4), value=1.5)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["scalars"]) == ["loss", "optim/lr/a_b"]
    assert events(tmp_path, "loss") == [(1, 1.5), (2, 1.5), (3, 1.5)]


def test_tensorboard_record_is_on_disk_before_close(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, resume_step=0)
    for step in range(1, 4):
        sink.write(step=step, values={"loss": 1.0})
        assert len(events(tmp_path, "loss")) == step
    sink.close()


def test_tensorboard_that_is_running_forgets_the_steps_that_are_repeated(tmp_path: Path):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 9), value=1.0)
    (path,) = tmp_path.iterdir()
    # As in an earlier second, so that the running reader meets the new file after it.
    path.rename(tmp_path / re.sub(r"tfevents\.\d+", "tfevents.0000000001", path.name))
    running = EventAccumulator(str(tmp_path))
    running.Reload()
    assert len(running.Scalars("loss")) == 8
    write_steps(TensorBoardSink(tmp_path, resume_step=5), steps=range(6, 8), value=2.0)
    running.Reload()
    expected = [(n, 1.0) for n in range(1, 6)] + [(6, 2.0), (7, 2.0)]
    assert [(event.step, event.value) for event in running.Scalars("loss")] == expected


def test_tensorboard_tag_shared_by_two_metrics_is_refused(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, resume_step=0)
    with pytest.raises(ConfigError, match=r"'optim/lr/a b' and 'optim/lr/a:b' would share .*'optim/lr/a_b'"):
        sink.write(step=1, values={"optim/lr/a b": 1.0, "optim/lr/a:b": 1.0})
    sink.close()


def test_tensorboard_resumes_show_every_step_once(tmp_path: Path):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 9), value=1.0)
    write_steps(TensorBoardSink(tmp_path, resume_step=5), steps=range(6, 12), value=2.0)
    write_steps(TensorBoardSink(tmp_path, resume_step=7), steps=range(8, 10), value=3.0)
    expected = [(n, 1.0) for n in range(1, 6)] + [(n, 2.0) for n in range(6, 8)] + [(n, 3.0) for n in range(8, 10)]
    assert events(tmp_path, "loss") == expected
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(0, 2), value=4.0)
    assert events(tmp_path, "loss") == [(0, 4.0), (1, 4.0)]


def test_tensorboard_is_right_whatever_the_order_of_the_files(tmp_path: Path):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 9), value=1.0)
    write_steps(TensorBoardSink(tmp_path, resume_step=5), steps=range(6, 12), value=2.0)
    write_steps(TensorBoardSink(tmp_path, resume_step=7), steps=range(8, 10), value=3.0)
    paths = sorted(tmp_path.iterdir())
    # A clock that was set back gives the newest file the first name.
    for path, second in zip(paths, random.Random(0).sample(range(3), 3), strict=True):
        path.rename(tmp_path / re.sub(r"tfevents\.\d+", f"tfevents.000000000{second}", path.name))
    write_steps(TensorBoardSink(tmp_path, resume_step=9), steps=range(10, 11), value=4.0)
    expected = [(n, 1.0) for n in range(1, 6)] + [(n, 2.0) for n in range(6, 8)] + [(n, 3.0) for n in range(8, 10)]
    assert events(tmp_path, "loss") == [*expected, (10, 4.0)]


@pytest.mark.parametrize("cut", [1, 11, 40, 0])
def test_tensorboard_torn_event_file_does_not_hide_the_resumed_run(tmp_path: Path, cut: int):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 9), value=1.0)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    # A kill tears the last record; a power loss may leave zeros instead.
    path.write_bytes(data[:-cut] if cut else data + b"\0" * 64)
    write_steps(TensorBoardSink(tmp_path, resume_step=6), steps=range(7, 9), value=2.0)
    assert events(tmp_path, "loss") == [(n, 1.0) for n in range(1, 7)] + [(7, 2.0), (8, 2.0)]
    assert not path.read_bytes().endswith(b"\0" * 16)


def test_tensorboard_files_without_later_steps_are_left_alone(tmp_path: Path):
    write_steps(TensorBoardSink(tmp_path, resume_step=0), steps=range(1, 4), value=1.0)
    write_steps(TensorBoardSink(tmp_path, resume_step=3), steps=range(4, 6), value=1.0)
    first = min(tmp_path.iterdir())
    # The first file holds the purge mark of a new run and is rewritten once; from then on it stays.
    write_steps(TensorBoardSink(tmp_path, resume_step=5), steps=range(6, 7), value=1.0)
    before = first.stat()
    write_steps(TensorBoardSink(tmp_path, resume_step=6), steps=range(7, 8), value=1.0)
    after = first.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [step for step, _ in events(tmp_path, "loss")] == list(range(1, 8))
