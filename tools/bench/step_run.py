"""Running contenders' processes: alone, together, or as the ranks of one job, all released by one signal."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from step_cell import READY, Job

HERE = Path(__file__).resolve().parent
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Runner:
    """Which interpreter runs which contender, and what its processes find in their environment."""

    trl_python: str
    environment: Mapping[str, str]

    def alone(self, job: Job, *, threads: int) -> dict[str, Any]:
        """The report of one process of one contender."""
        return self._together([(job, self._variables(threads=threads))])[0]

    def independent(self, job: Job, *, processes: int) -> list[dict[str, Any]]:
        """Reports of several one-rank processes that know nothing of each other and step at the same time."""
        return self._together([(job, self._variables(threads=1))] * processes)

    def ranks(self, job: Job, *, world_size: int) -> list[dict[str, Any]]:
        """Reports of the ranks of one job, in order."""
        port, started = free_port(), []
        for rank in range(world_size):
            place: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started.append((job, self._variables(threads=1) | {key: str(value) for key, value in place.items()}))
        return self._together(started)

    def _variables(self, *, threads: int) -> dict[str, str]:
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        inherited = {key: value for key, value in os.environ.items() if key not in launcher}
        return {**inherited, "DS_ACCELERATOR": "cpu", **counts, **self.environment}

    def _together(self, jobs: Sequence[tuple[Job, dict[str, str]]]) -> list[dict[str, Any]]:
        started = []
        for job, variables in jobs:
            trl = job.contender.startswith("trl")
            script = "step_trl.py" if trl else "step_ours.py"
            python = self.trl_python if trl else sys.executable
            started.append(_Process([python, str(HERE / script), job.dumps()], variables=variables))
        try:
            for process in started:
                process.wait_until_ready()
            for process in started:
                process.release()
            return [process.report() for process in started]
        finally:
            for process in started:
                process.end()


class _Process:
    """A contender's process; what it says on stderr is shown only if it fails."""

    def __init__(self, command: list[str], *, variables: dict[str, str]) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                return
        self._fail()

    def release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def report(self) -> dict[str, Any]:
        output, _ = self._process.communicate(timeout=_TIMEOUT_S)
        if self._process.returncode != 0:
            self._fail()
        return json.loads(output.strip().splitlines()[-1])

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        raise SystemExit(
            f"{self._process.args!r} failed with status {self._process.returncode}:\n{self._errors.read()[-3000:]}"
        )


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def packages(python: str, names: Sequence[str], /) -> dict[str, str]:
    """Versions of these packages as another interpreter sees them; `not installed` for what it lacks."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try:\n        return m.version(name)\n"
        "    except m.PackageNotFoundError:\n        return 'not installed'\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"--trl-python {python}: not a working interpreter ({done.stderr.strip()[-300:]})")
    return json.loads(done.stdout)
