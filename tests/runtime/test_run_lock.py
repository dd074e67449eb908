"""One run per folder."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import run_forked, start_forked

from largekd.errors import ConfigError
from largekd.runtime.lock import run_lock
from largekd.runtime.ranks import Ranks, current_ranks


def _hold(folder: str) -> None:
    with run_lock(Path(folder), ranks=current_ranks()):
        (Path(folder) / "held").touch()
        time.sleep(60)


def _try(folder: str) -> str:
    try:
        with run_lock(Path(folder), ranks=current_ranks()):
            return "locked"
    except ConfigError as error:
        return str(error)


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [holder] = start_forked(_hold, tmp_path=tmp_path, folder=str(folder))
    deadline_s = time.monotonic() + 30
    while not (folder / "held").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    for outcome in run_forked(_try, tmp_path=tmp_path, world_size=2, folder=str(folder)):
        assert f"run.dir={folder}: another run (host {socket.gethostname()}, pid {holder.process.pid})" in outcome.value
    os.kill(holder.process.pid or 0, signal.SIGKILL)
    holder.process.join()
    with run_lock(folder, ranks=Ranks()):
        assert "another run" in _try(str(folder))
    assert _try(str(folder)) == "locked"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir=.*file/run: cannot be created or written"):  # noqa: SIM117
        with run_lock(tmp_path / "file" / "run", ranks=Ranks()):
            pass


def test_an_owner_file_that_cannot_be_read_does_not_matter(tmp_path: Path) -> None:
    with run_lock(tmp_path, ranks=Ranks()):
        (tmp_path / ".lock-owner.json").write_text("garbage")
        with pytest.raises(ConfigError, match="of unknown host and pid"), run_lock(tmp_path, ranks=Ranks()):
            pass
