"""A disk that fills up: every rank learns it, nothing half-written stays, the last good checkpoint does."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import run_forked
from savers import Job

from largekd.checkpoint.commit import CheckpointStore
from largekd.errors import CheckpointError
from largekd.runtime import files
from largekd.runtime.ranks import Ranks, barrier, current_ranks, new_control_group

MESSAGE = r"checkpoint of step 2 could not be written to .*No space left .* the last complete one is step_00000001"


def _save_twice(folder: str, size: int) -> list[str]:
    """The message of the failed second save and what is left."""
    job = Job(Path(folder), ranks=current_ranks(), size=size, group=new_control_group(timeout_s=20))
    job.store.prepare()
    job.shards.size = 1024
    job.save(1)
    job.shards.size = size
    try:
        job.save(2)
    except CheckpointError as error:
        barrier()  # rank 0 has tidied up when it gets here
        return [str(error), *sorted(os.listdir(folder))]
    return ["no error"]


@pytest.mark.parametrize("rank", ["0", "1", "*"])
@pytest.mark.parametrize("point", ["mid_shard", "before_manifest", "before_marker"])
def test_no_space_on_some_ranks_is_an_error_on_all(point: str, rank: str, tmp_path: Path) -> None:
    outcomes = run_forked(
        _save_twice,
        tmp_path=tmp_path,
        world_size=2,
        environment={"LARGEKD_TEST_FAULT": f"save:{point}:rank{rank}:step2:enospc"},
        folder=str(tmp_path / "checkpoints"),
        size=1024,
    )
    for outcome in outcomes:
        message, *left = outcome.value or [outcome.error]
        assert "No space left on device" in message and "the last complete one is step_00000001" in message, outcome
        assert "bytes are free" in message
        assert left == ["step_00000001"]
    assert Job(tmp_path / "checkpoints", ranks=Ranks()).store.newest() is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    folder = small_disk / "checkpoints"
    outcomes = run_forked(_save_twice, tmp_path=tmp_path, world_size=2, folder=str(folder), size=2_000_000)
    for outcome in outcomes:
        message, *left = outcome.value or [outcome.error]
        assert "No space left on device" in message, outcome
        assert left == ["step_00000001"]
    job = Job(folder, ranks=Ranks(), size=1024)
    assert job.resume() == 1
    job.save(2)
    assert job.resume() == 2


def test_torch_says_it_in_other_words(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", ranks=Ranks())
    store.prepare()
    with pytest.raises(CheckpointError, match="could not be written"), store.writing(step=1) as folder:
        # What torch.save turns a full disk into.
        raise RuntimeError(f"[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing {folder}")
    assert os.listdir(store.folder) == []
    with pytest.raises(RuntimeError, match="shape"), store.writing(step=1):
        raise RuntimeError("shape mismatch")


def test_fsync_and_rename_failures_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, value={"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, value={"a": 2})
    monkeypatch.undo()
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_failed_flush_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path / "checkpoints", ranks=Ranks())
    job.store.prepare()
    job.save(1)
    real = os.fsync

    def full_for_shards(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("shard_0.bin"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_for_shards)
    with pytest.raises(CheckpointError, match=MESSAGE):
        job.save(2)
    assert os.listdir(job.store.folder) == ["step_00000001"]
