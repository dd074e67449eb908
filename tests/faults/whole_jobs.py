"""Whole jobs in processes of their own, for tests that kill, stop and signal them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tiny_run import free_port, metrics, write_recipe

SERVER = Path(__file__).with_name("job_server.py")


class JobServer:
    """Starts jobs through job_server.py; requests are answered one after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._answer() == {"ready": True}

    def start(
        self,
        tree: Mapping[str, Any],
        *,
        folder: Path,
        ranks: int = 2,
        overrides: Sequence[str] = (),
        port: int | None = None,
        script: str = "train",
        of_rank: Mapping[int, Mapping[str, str]] | None = None,
        **environment: str,
    ) -> "Job":
        """`launch/<script>.py` on `ranks` ranks with the configuration `tree`; recipe and output go to `folder`.

        `environment` is every rank's, `of_rank` what one rank has besides.
        """
        folder.mkdir(parents=True, exist_ok=True)
        recipe = write_recipe(folder / "recipe.yaml", tree)
        place = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port or free_port(),
        }
        started = []
        for rank in range(ranks):
            output = folder / f"output-{rank}-{time.monotonic_ns()}.txt"
            own = place | {"RANK": rank, "LOCAL_RANK": rank} | environment | dict((of_rank or {}).get(rank, {}))
            pid = self._ask(
                script=script,
                argv=["--config", str(recipe), *overrides],
                environment={name: str(value) for name, value in own.items()},
                output=str(output),
            )["pid"]
            started.append(JobRank(pid=pid, output=output))
        return Job(server=self, ranks=tuple(started))

    def wait(self, pid: int, *, timeout_s: float) -> int | None:
        """The exit status of a rank; None while it runs."""
        status = self._ask(wait=pid, timeout_s=timeout_s)["status"]
        return None if status is None else int(status)

    def close(self) -> None:
        """End the server and with it every rank that is left."""
        self._process.kill()
        self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the job server died with status {self._process.wait()}"
        return dict(json.loads(line))


@dataclass(frozen=True)
class JobRank:
    """One process and the file that holds what it printed."""

    pid: int
    output: Path

    def text(self) -> str:
        """Everything printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


@dataclass(frozen=True)
class Job:
    """A running job."""

    server: JobServer
    ranks: tuple[JobRank, ...]

    def wait(self, *, timeout_s: float = 90.0) -> list[int | None]:
        """Exit statuses; None for a rank that did not end within `timeout_s`: it prints its stacks and is killed."""
        deadline_s = time.monotonic() + timeout_s
        statuses = [
            self.server.wait(rank.pid, timeout_s=max(0.0, deadline_s - time.monotonic())) for rank in self.ranks
        ]
        late = [rank for rank, status in zip(self.ranks, statuses, strict=True) if status is None]
        for rank in late:
            os.kill(rank.pid, signal.SIGUSR2)
        if late:
            time.sleep(1)
        self.kill()
        return statuses

    def kill(self) -> None:
        """SIGKILL to every rank that is left."""
        for rank in self.ranks:
            if self.server.wait(rank.pid, timeout_s=0) is None:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            self.server.wait(rank.pid, timeout_s=10)

    def text(self) -> str:
        """What all ranks printed."""
        return "\n".join(rank.text() for rank in self.ranks)


def until(condition: Callable[[], object], *, timeout_s: float, what: str = "") -> float:
    """Wait for `condition`; the seconds that it took."""
    start_s = time.monotonic()
    while not condition():
        took_s = time.monotonic() - start_s
        assert took_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - start_s


def steps_done(run_dir: Path) -> int:
    """The last step that metrics.jsonl holds; 0 before the first."""
    with suppress(OSError, IndexError, json.JSONDecodeError):
        return int(metrics(run_dir)[-1]["step"])
    return 0


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are marked as complete."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*/COMPLETE"))


def processes_of(*words: str) -> list[psutil.Process]:
    """Live processes, zombies aside, whose command line contains one of `words`; never this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and any(word in line for word in words)
            ):
                found.append(process)
    return found
