"""The commit protocol without faults, and the names it accepts."""

import json
import os
from pathlib import Path

import pytest
from forked import run_forked
from savers import Job, run_job

from largekd.checkpoint import commit
from largekd.checkpoint.commit import CheckpointStore, require_shared
from largekd.checkpoint.manifest import hash_file, read_manifest, write_marker
from largekd.errors import CheckpointError, ConfigError
from largekd.runtime.ranks import Ranks, barrier, current_ranks, new_control_group


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path / "checkpoints", ranks=Ranks(), keep=3)
    job.store.prepare()
    return job


def test_no_checkpoint_means_a_new_run(job: Job) -> None:
    assert job.store.newest() is None
    (job.store.folder / "latest").write_text("step_00000900")
    (job.store.folder / "notes").mkdir()
    assert job.store.newest() is None


def test_saved_state_comes_back(job: Job) -> None:
    path = job.save(7)
    assert path == job.store.folder / "step_00000007"
    job.step = 0
    assert job.resume() == 7
    manifest = read_manifest(path)
    assert (manifest.step, manifest.world_size, manifest.fingerprint) == (7, 1, "test")
    assert set(manifest.files) == {
        "engine/shard_0.bin",
        "progress/state.json",
        "rng/rank_00000.json",
        "rng/rank_00000.safetensors",
    }
    marker = json.loads((path / "COMPLETE").read_text())
    assert marker == {"manifest_sha256": hash_file(path / "manifest.json")}
    assert "torch" in manifest.versions


def test_nothing_temporary_is_left(job: Job) -> None:
    for step in (1, 2, 3, 4, 5):
        job.save(step)
    assert sorted(os.listdir(job.store.folder)) == ["step_00000003", "step_00000004", "step_00000005"]


def test_order_is_by_number_not_by_spelling(job: Job) -> None:
    for step in (99_999_999, 100_000_000):
        job.save(step)
    assert job.resume() == 100_000_000


def test_leftovers_are_removed_at_the_start(job: Job, tmp_path: Path) -> None:
    job.save(1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    (job.store.folder / ".tmp-2-abc" / "engine").mkdir(parents=True)
    (job.store.folder / ".tmp-probe-1").touch()
    (job.store.folder / ".tmp-link").symlink_to(outside)
    job.store.prepare()
    assert os.listdir(job.store.folder) == ["step_00000001"]
    assert (outside / "file").read_text() == "kept"


def test_a_whole_step_is_not_saved_twice(job: Job) -> None:
    path = job.save(3)
    inode = path.stat().st_ino
    assert job.save(3) == path
    assert path.stat().st_ino == inode
    with pytest.raises(CheckpointError, match="step_00000003 is complete already"), job.store.writing(step=3):
        pass


def test_a_damaged_step_is_replaced(job: Job) -> None:
    job.save(3)
    path = job.save(4)
    (path / "engine" / "shard_0.bin").write_bytes(b"short")
    assert job.resume() == 3
    job.save(4)
    assert job.resume() == 4
    assert sorted(os.listdir(job.store.folder)) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", ["../../x", "step_1", "/etc", "step_00000001/..", "latest", "", "step_00000001\n"])
def test_other_names_are_refused(job: Job, name: str) -> None:
    job.save(1)
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
        job.store.named(name)
    assert job.store.named("step_00000001") == job.store.folder / "step_00000001"


def test_an_error_in_the_body_leaves_nothing(job: Job) -> None:
    job.save(1)
    with pytest.raises(ZeroDivisionError), job.store.writing(step=2) as folder:
        (folder / "half").write_text("x")
        _ = 1 / 0
    assert os.listdir(job.store.folder) == ["step_00000001"]


def test_an_interrupted_first_save_is_finished_only_if_proven_whole(job: Job) -> None:
    path = job.save(1)
    (path / "COMPLETE").unlink()
    assert job.resume() == 1
    assert (path / "COMPLETE").is_file()
    (path / "COMPLETE").unlink()
    (path / "engine" / "shard_0.bin").write_bytes(b"x" * 40_000)
    with pytest.raises(CheckpointError, match=r"none can be used .*run\.fresh=true"):
        job.resume()


def test_an_unmarked_folder_loses_to_an_older_complete_one(job: Job) -> None:
    job.save(1)
    (job.save(2) / "COMPLETE").unlink()
    assert job.resume() == 1


def test_the_parent_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file" / "checkpoints", ranks=Ranks())
    with pytest.raises(ConfigError, match=r"cannot be written .* choose another run\.dir"):
        store.prepare()


def test_two_ranks_save_and_resume(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    for expected in (0, 6):
        outcomes = run_forked(run_job, tmp_path=tmp_path, world_size=2, folder=folder, steps=[2, 4, 6])
        assert [(o.status, o.value, o.error) for o in outcomes] == [(0, expected, "")] * 2
    files = read_manifest(tmp_path / "checkpoints" / "step_00000006").files
    assert {"engine/shard_0.bin", "engine/shard_1.bin", "rng/rank_00001.json"} <= set(files)
    assert sorted(os.listdir(folder)) == ["step_00000004", "step_00000006"]


def _fail_between_collectives(folder: str) -> list[str]:
    """Rank 1 fails where rank 0 waits for it in a collective of the body."""
    ranks = current_ranks()
    store = CheckpointStore(Path(folder), ranks=ranks, group=new_control_group(timeout_s=20))
    store.prepare()
    try:
        with store.writing(step=1) as temporary:
            (temporary / f"{ranks.rank}").touch()
            if ranks.rank == 1:
                raise OSError(28, "No space left on device")
            barrier()
    except (CheckpointError, RuntimeError) as error:
        barrier(group=store.group)
        return [type(error).__name__, str(error), *os.listdir(folder)]
    return []


def test_a_failure_amid_the_bodys_collectives_reaches_the_others_after_their_time_out(tmp_path: Path) -> None:
    outcomes = run_forked(
        _fail_between_collectives, tmp_path=tmp_path, world_size=2, group_timeout_s=2, folder=str(tmp_path / "c")
    )
    assert "imed out" in outcomes[0].value[1], outcomes
    assert outcomes[1].value[0] == "CheckpointError" and "No space left" in outcomes[1].value[1]
    assert all(len(outcome.value) == 2 for outcome in outcomes), "nothing is left"


def _probe_unshared(folder: str) -> str:
    ranks = current_ranks()
    mine = Path(folder) / f"node_{ranks.rank}"
    mine.mkdir(parents=True)
    commit._SHARED_WAIT_S = 0.5
    try:
        require_shared(mine, ranks=ranks)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_an_unshared_folder_is_refused_on_all_ranks(tmp_path: Path) -> None:
    outcomes = run_forked(_probe_unshared, tmp_path=tmp_path, world_size=2, folder=str(tmp_path / "nodes"))
    assert all("rank 1 on node" in o.value and "all nodes share" in o.value for o in outcomes), outcomes
    assert list((tmp_path / "nodes" / "node_0").iterdir()) == []


def test_a_kill_inside_the_markers_write_leaves_nothing_unlisted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")

    def killed(source: Path, target: Path) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        write_marker(folder)
    assert os.listdir(folder) == ["manifest.json"]
