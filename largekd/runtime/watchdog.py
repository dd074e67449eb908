"""Finding a rank that hangs: heartbeats, stacks of every rank, one line that names the culprit, and a way out.

A collective that waits for a missing peer cannot be interrupted from Python, so a silent rank ends its process.
"""

import faulthandler
import io
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from largekd.runtime.files import read_json
from largekd.runtime.ranks import Ranks, gather_objects

HUNG_EXIT_STATUS = 75
_STDERR = 2
_SHOWN_RANKS = 8
_SECTION_CHARS = 60
_RECORD_BYTES = 512
_RESUMED_S = 0.05
_DEAD_STATES = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, "gone")


@dataclass(frozen=True)
class Beat:
    """The loop was here: `section` began at `monotonic_s`, and `allowed_s` may pass until the next beat."""

    section: str
    monotonic_s: float
    allowed_s: float
    count: int


@dataclass(frozen=True)
class Peer:
    """Another rank's process."""

    rank: int
    host: str
    machine: str
    pid: int
    started_s: float

    def process(self) -> psutil.Process | None:
        """Its process if it runs on this machine and the pid still means it."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if self.machine == _machine() and process.create_time() == self.started_s:
                return process
        return None


class Watchdog:
    """Context manager around the loop; the loop calls `beat(section)` at every turn.

    `timeout_s` without a beat: this rank writes the stacks of its threads to `<folder>/stacks/rank_00000.txt` and to
    stderr, wakes the ranks of its host so that they write theirs (SIGUSR1 through faulthandler, which works inside C
    code, and SIGCONT), waits at most `grace_s` for them, names the rank that fell behind, and ends the process with
    status 75. Give the process group a longer time-out than this one, so that the stacks are written first.
    `folder` is shared by all ranks. Collective on entry.
    """

    def __init__(self, *, timeout_s: float, folder: Path, ranks: Ranks, grace_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._ranks = ranks
        self._stacks, self._heartbeats = folder / "stacks", folder / "heartbeats"
        self._check_s = min(1.0, timeout_s / 10)
        self._flush_s = min(30.0, timeout_s / 20)
        self._beat = Beat(section="start", monotonic_s=time.monotonic(), allowed_s=timeout_s, count=0)
        self._peers: list[Peer] = []
        self._heart = -1
        self._stream: io.TextIOWrapper | None = None
        self._closed = threading.Event()
        self._reporting = threading.Lock()
        self._thread: threading.Thread | None = None

    def beat(self, section: str, *, allowed_s: float | None = None) -> None:
        """`section` begins now; `allowed_s` replaces the time-out until the next beat (a long save, an evaluation)."""
        allowed = self._timeout_s if allowed_s is None else allowed_s
        self._beat = Beat(section, time.monotonic(), allowed, self._beat.count + 1)
        self._publish()

    def report_failure(self, error: BaseException) -> None:
        """Write the stacks of all ranks for an error that may come from a lost peer; the caller then raises it."""
        text = "".join(traceback.format_exception(error))
        self._report(f"{type(error).__name__} on rank {self._ranks.rank}", detail=text)

    def __enter__(self) -> "Watchdog":
        self._stacks.mkdir(parents=True, exist_ok=True)
        self._heartbeats.mkdir(parents=True, exist_ok=True)
        self._stack_path(self._ranks.rank).unlink(missing_ok=True)
        self._stream = open(self._stack_path(self._ranks.rank), "a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=self._stream, all_threads=True, chain=False)
        self._heart = os.open(self._heart_path(self._ranks.rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        self.beat("start")
        me = [self._ranks.rank, socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time()]
        self._peers = [Peer(*record) for record in gather_objects(me)]
        self._thread = threading.Thread(target=self._watch, name="largekd-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._publish(closed=True)
        os.close(self._heart)
        faulthandler.unregister(signal.SIGUSR1)
        # A peer that saw this rank alive a moment ago may still signal it; the default action would kill it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert self._stream is not None
        self._stream.close()
        if self._stack_path(self._ranks.rank).stat().st_size == 0:
            self._stack_path(self._ranks.rank).unlink()

    def _watch(self) -> None:
        flushed_s = time.monotonic()
        while not self._closed.wait(self._check_s):
            beat, now = self._beat, time.monotonic()
            if now - beat.monotonic_s > beat.allowed_s:
                self._report(f"rank {self._ranks.rank} is silent for {now - beat.monotonic_s:.1f} s", detail="")
                os._exit(HUNG_EXIT_STATUS)
            if now - flushed_s >= self._flush_s:
                # Other hosts see a heartbeat once it has left this one's page cache.
                with suppress(OSError):
                    os.fsync(self._heart)
                flushed_s = now

    def _report(self, title: str, *, detail: str) -> None:
        with self._reporting:
            # Before the peers are woken: a stopped process looks healthy afterwards.
            ranks = self.describe_ranks()
            self._dump(title, detail=detail)
            self._wake_peers()
            self._say(f"{title}. {ranks}. Stacks: {self._stacks}")

    def _say(self, text: str) -> None:
        """One line on stderr, not through logging: the thread that hangs may hold a handler's lock."""
        with suppress(OSError):
            os.write(_STDERR, f"[rank {self._ranks.rank}] {text}\n".encode())

    def _dump(self, title: str, *, detail: str) -> None:
        """Stacks of all threads of this process, with where it was, to its file and to stderr."""
        beat = self._beat
        header = (
            f"\n=== {title}: host {socket.gethostname()}, pid {os.getpid()}, last section {beat.section!r} "
            f"{time.monotonic() - beat.monotonic_s:.1f} s ago ===\n{detail}"
        )
        assert self._stream is not None
        for number in (self._stream.fileno(), _STDERR):
            with suppress(OSError):
                os.write(number, header.encode())
                faulthandler.dump_traceback(file=number, all_threads=True)

    def _wake_peers(self) -> None:
        """Make the ranks of this host that have not reported write their stacks; wait for them, at most `grace_s`."""
        waiting: dict[Peer, int] = {}
        for peer in self._peers:
            process = peer.process()
            if peer.rank == self._ranks.rank or process is None or self._dumped_bytes(peer.rank):
                continue
            record = self._read_heartbeat(peer.rank)
            if record.get("closed"):
                continue
            with suppress(psutil.Error, OSError):
                with open(self._stack_path(peer.rank), "a", encoding="utf-8") as stream:
                    stream.write(f"\n=== woken by rank {self._ranks.rank}: {_described(peer, record)} ===\n")
                waiting[peer] = self._dumped_bytes(peer.rank)
                process.send_signal(signal.SIGCONT)
                # A signal that waits for a stopped process may be taken by any thread, beside which the others run on
                # while they are written down; one that comes later interrupts the main thread.
                time.sleep(_RESUMED_S)
                process.send_signal(signal.SIGUSR1)
        deadline_s = time.monotonic() + self._grace_s
        while waiting and time.monotonic() < deadline_s:
            time.sleep(0.05)
            waiting = {
                peer: size for peer, size in waiting.items() if peer.process() and self._dumped_bytes(peer.rank) <= size
            }

    def describe_ranks(self) -> str:
        """Every rank's last section and its age; the others wait for the rank at the front.

        A process that is stopped or gone comes first: it may have got as far as the others. Then fewest beats.
        """
        records = [(peer, self._read_heartbeat(peer.rank)) for peer in self._peers]
        alive = [(peer, record) for peer, record in records if record and not record.get("closed")]
        alive.sort(
            key=lambda entry: (_process_state(entry[0]) not in _DEAD_STATES, entry[1]["count"], entry[1]["beat_s"])
        )
        lines = [_described(peer, record) for peer, record in alive[:_SHOWN_RANKS]]
        return "Furthest behind first: " + ("; ".join(lines) if lines else "no heartbeats to read")

    def _publish(self, *, closed: bool = False) -> None:
        """Overwrite this rank's heartbeat in place: readers on this host see it even after this process is stopped."""
        beat = self._beat
        beat_s = time.time() - (time.monotonic() - beat.monotonic_s)
        record = {"section": beat.section[:_SECTION_CHARS], "count": beat.count, "beat_s": beat_s, "closed": closed}
        try:
            # One write of a fixed length: neither a torn nor a longer, older record can remain.
            os.pwrite(self._heart, json.dumps(record).ljust(_RECORD_BYTES).encode()[:_RECORD_BYTES], 0)
        except OSError as error:
            self._say(f"heartbeat not written: {error}")

    def _read_heartbeat(self, rank: int) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(read_json(self._heart_path(rank)))
        return {}

    def _dumped_bytes(self, rank: int) -> int:
        with suppress(OSError):
            return self._stack_path(rank).stat().st_size
        return 0

    def _heart_path(self, rank: int) -> Path:
        return self._heartbeats / f"rank_{rank:05d}.json"

    def _stack_path(self, rank: int) -> Path:
        return self._stacks / f"rank_{rank:05d}.txt"


def _described(peer: Peer, record: Mapping[str, Any]) -> str:
    """One rank in words, for the report."""
    age_s = time.time() - float(record.get("beat_s", "nan"))
    where = f"{peer.host}, pid {peer.pid}, {_process_state(peer)}"
    return f"rank {peer.rank} ({where}) last section {record.get('section', 'unknown')!r} {age_s:.1f} s ago"


def _process_state(peer: Peer) -> str:
    """`running`, `stopped`, … for a process of this machine, `gone`, or `on another host`."""
    if peer.machine != _machine():
        return "on another host"
    process = peer.process()
    if process is None:
        return "gone"
    with suppress(psutil.Error):
        return str(process.status())
    return "gone"


def _machine() -> str:
    """Equal where a pid means the same process: host name and pid namespace."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
