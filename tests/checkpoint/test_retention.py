"""What is deleted, and that a damaged checkpoint never counts as one that is kept."""

import os
import shutil
from pathlib import Path

import pytest
from savers import Job

from largekd.checkpoint.retention import expired
from largekd.runtime.ranks import Ranks


def _names(folder: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in os.listdir(folder))


@pytest.mark.parametrize(
    ("names", "damaged", "keep", "deleted"),
    [
        ("", "", 2, ""),
        ("9 8", "", 2, ""),
        ("9 8 7", "", 2, "7"),
        ("9 8 7 6 5", "", 3, "6 5"),
        ("9 8 7", "8", 2, ""),
        ("9 8 7 6", "8", 2, "6"),
        ("9 8 7 6", "9 8 7", 2, ""),
        ("9 8 7 6 5", "9 6", 2, "6 5"),
        ("9 8 7", "7", 2, "7"),
    ],
)
def test_expired(names: str, damaged: str, keep: int, deleted: str) -> None:
    found = expired(names.split(), keep=keep, is_whole=lambda name: name not in damaged.split())
    assert found == deleted.split()


def test_a_rotten_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    job = Job(tmp_path / "checkpoints", ranks=Ranks(), keep=2)
    job.store.prepare()
    job.save(1)
    path = job.save(2) / "engine" / "shard_0.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    job.save(3)
    assert _names(job.store.folder) == [1, 2, 3]
    job.save(4)
    assert _names(job.store.folder) == [3, 4]


def test_a_deletion_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path / "checkpoints", ranks=Ranks(), keep=2)
    job.store.prepare()
    job.save(1)
    job.save(2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    job.save(3)
    assert "old checkpoints could not be removed" in caplog.text
    monkeypatch.undo()
    assert job.resume() == 3
    job.store.prepare()
    assert _names(job.store.folder) == [2, 3]
