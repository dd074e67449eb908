"""Whatever happens to the bytes of a checkpoint is found before anything of it is loaded."""

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_forked
from savers import Job, run_job

from largekd.errors import CheckpointError
from largekd.runtime.ranks import Ranks


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    job = Job(folder, ranks=Ranks())
    job.store.prepare()
    job.save(1)
    job.save(2)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "step_00000002").rglob("*") if path.is_file())


def _resume(folder: Path) -> int:
    return Job(folder, ranks=Ranks()).resume()


def test_a_hundred_flipped_bits_are_all_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    files = _files(folder)
    assert {path.name for path in files} >= {"COMPLETE", "manifest.json", "shard_0.bin", "state.json"}
    for trial in range(100):
        # Half of the trials go to the small files, which a draw by size would hardly ever hit.
        path = files[trial % len(files)] if trial % 2 else folder / "step_00000002/engine/shard_0.bin"
        content = path.read_bytes()
        damaged = bytearray(content)
        position = draw.randrange(len(damaged))
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert _resume(folder) == 1, (trial, path, position)
        path.write_bytes(content)
    assert "step_00000002 is damaged and is skipped" in caplog.text
    assert _resume(folder) == 2


def test_truncations_are_found(folder: Path) -> None:
    draw = random.Random(1)
    for path in _files(folder) * 2:
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(max(1, len(content) - 1))])
        assert _resume(folder) == 1, path
        path.write_bytes(content)
    assert len(_files(folder)) * 2 >= 10


def test_missing_empty_and_extra_files_are_found(folder: Path) -> None:
    for path in _files(folder):
        content = path.read_bytes()
        path.unlink()
        assert _resume(folder) == 1, path
        path.touch()
        assert _resume(folder) == 1, path
        path.write_bytes(content)
    for extra in ("engine/extra.pt", "zero.pt", "rng/.hidden"):
        path = folder / "step_00000002" / extra
        path.write_bytes(b"x")
        assert _resume(folder) == 1, path
        path.unlink()
    assert _resume(folder) == 2


def test_twenty_clean_loads_raise_no_alarm(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [_resume(folder) for _ in range(20)] == [2] * 20
    assert not caplog.records


def _link_the_folder(folder: Path, outside: Path) -> None:
    shutil.move(folder / "step_00000002", outside / "step_00000002")
    (folder / "step_00000002").symlink_to(outside / "step_00000002")


def _link_a_file(folder: Path, outside: Path) -> None:
    path = folder / "step_00000002/engine/shard_0.bin"
    shutil.move(path, outside / "shard_0.bin")
    path.symlink_to(outside / "shard_0.bin")


def _link_a_subfolder(folder: Path, outside: Path) -> None:
    shutil.move(folder / "step_00000002/engine", outside / "engine")
    (folder / "step_00000002/engine").symlink_to(outside / "engine")


def _rename_an_older_one(folder: Path, outside: Path) -> None:
    shutil.copytree(folder / "step_00000001", folder / "step_00000009")


def _put_a_pipe(folder: Path, outside: Path) -> None:
    os.mkfifo(folder / "step_00000002/engine/pipe")


def _put_a_file(folder: Path, outside: Path) -> None:
    (folder / "step_00000009").write_text("not a folder")


def _copy_a_manifest_path_out(folder: Path, outside: Path) -> None:
    path = folder / "step_00000002/manifest.json"
    path.write_text(path.read_text().replace("engine/shard_0.bin", "../step_00000001/engine/shard_0.bin"))


@pytest.mark.parametrize(
    ("disturb", "expected"),
    [
        (_link_the_folder, 1),
        (_link_a_file, 1),
        (_link_a_subfolder, 1),
        (_put_a_pipe, 1),
        (_copy_a_manifest_path_out, 1),
        (_rename_an_older_one, 2),
        (_put_a_file, 2),
    ],
)
def test_what_is_not_a_plain_checkpoint_is_skipped(
    folder: Path, tmp_path: Path, disturb: Callable[[Path, Path], None], expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    disturb(folder, outside)
    assert _resume(folder) == expected
    assert "is skipped" in caplog.text


def test_no_good_checkpoint_is_an_error_and_never_step_zero(folder: Path) -> None:
    for step in (1, 2):
        (folder / f"step_{step:08d}" / "engine" / "shard_0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"2 checkpoint\(s\) and none can be used .*shard_0.bin missing") as info:
        _resume(folder)
    assert "run.fresh=true" in str(info.value)


def test_two_ranks_agree_on_the_fallback(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_forked(run_job, tmp_path=tmp_path, world_size=2, folder=str(folder), steps=[1, 2])
    for rank in (0, 1):
        path = folder / f"step_00000002/engine/shard_{rank}.bin"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        outcomes = run_forked(run_job, tmp_path=tmp_path, world_size=2, folder=str(folder), steps=[])
        assert [(o.status, o.value) for o in outcomes] == [(0, 1)] * 2, outcomes
        path.write_bytes(content)
