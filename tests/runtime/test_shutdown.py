"""Being asked to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from largekd.runtime.shutdown import StopSignal, launcher_ancestors, process_lives


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopSignal() as stop:
        assert (stop.requested, stop.reason) == (False, "")
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason) == (True, number.name)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.request(reason="later")
        assert stop.reason == number.name
    assert signal.getsignal(number) == former


def test_notebooks_and_threads_keep_their_handlers() -> None:
    former = signal.getsignal(signal.SIGINT)
    with StopSignal(launched=False) as stop:
        assert signal.getsignal(signal.SIGINT) == former
        stop.request(reason="asked")
        assert stop.requested
    seen: list[bool] = []

    def enter() -> None:
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGINT) == former)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_forked_worker_still_dies_of_sigterm() -> None:
    with StopSignal():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([["bash"]], 0),
        ([["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], ["bash", "-l"]], 1),
        ([["python", "-m", "deepspeed.launcher.launch"], ["python3", "/v/bin/deepspeed", "train.py"]], 2),
        ([["python", "/v/bin/torchrun", "train.py"], ["bash"]], 1),
        ([["vim", "launch/train.py"]], 0),
        ([["bash", "-c", "deepspeed train.py; sleep 1"]], 0),
    ],
)
def test_only_launchers_are_watched(lines: list[list[str]], expected: int) -> None:
    class Fake:
        def __init__(self, lines: list[list[str]]) -> None:
            self._lines = lines

        def cmdline(self) -> list[str]:
            return self._lines[0]

        def parent(self) -> "Fake | None":
            return Fake(self._lines[1:]) if self._lines[1:] else None

    assert len(launcher_ancestors(Fake([["python", "train.py"], *lines]))) == expected  # type: ignore[arg-type]


def test_a_zombie_does_not_live() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    process = psutil.Process(child)
    deadline_s = time.monotonic() + 5
    while process_lives(process) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not process_lives(process)
    os.waitpid(child, 0)
    assert not process_lives(process)
    assert process_lives(psutil.Process())


RANK = """
import pathlib, sys, time
from largekd.runtime.shutdown import StopSignal
with StopSignal(poll_s=0.2) as stop:
    pathlib.Path(sys.argv[1]).write_text("ready")
    while not stop.requested:
        time.sleep(0.02)
pathlib.Path(sys.argv[1]).write_text(stop.reason)
"""
# Both processes start the next argument and wait for it, as the launcher and its command do.
STARTER = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[psutil.Process, psutil.Process, psutil.Process, Path]]:
    """Command, launcher and rank, three generations with the names of the real ones, and the rank's file."""
    command, launcher, rank = (
        tmp_path / "bin/deepspeed",
        tmp_path / "deepspeed/launcher/launch.py",
        tmp_path / "rank.py",
    )
    for path, text in ((command, STARTER), (launcher, STARTER), (rank, RANK)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    said = tmp_path / "said"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, command, launcher, rank, said], env=environment)
    _wait(lambda: said.exists() and said.read_text() == "ready")
    top = psutil.Process(process.pid)
    [middle] = top.children()
    [bottom] = middle.children()
    yield top, middle, bottom, said
    for left in (bottom, middle, top):
        if left.is_running():
            left.kill()
    process.wait()


def _wait(condition: Callable[[], bool]) -> float:
    """Seconds until `condition` held."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < 20
        time.sleep(0.02)
    return time.monotonic() - start_s


Job = tuple[psutil.Process, psutil.Process, psutil.Process, Path]


def test_a_killed_launcher_is_noticed_at_once(job: Job) -> None:
    _, launcher, rank, said = job
    launcher.kill()
    assert _wait(lambda: not process_lives(rank)) < 5
    assert said.read_text() == "SIGTERM"


def test_a_killed_command_is_noticed(job: Job) -> None:
    command, _, rank, said = job
    command.kill()
    assert _wait(lambda: not process_lives(rank)) < 5
    assert said.read_text() == f"the launcher (pid {command.pid}) is gone"
