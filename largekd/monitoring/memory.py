"""Memory of this process as the operating system counts it, in bytes."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of one process.

    rss_bytes: now, with mapped file pages; peak_rss_bytes: the largest since the process started;
    anonymous_bytes: now, without file pages (what the process itself allocated), None where the system does not tell.
    """

    rss_bytes: int
    peak_rss_bytes: int
    anonymous_bytes: int | None


def process_memory(*, status: Path = _STATUS) -> ProcessMemory:
    """This process's memory, from `status` (VmRSS, VmHWM, RssAnon), else from psutil and getrusage.

    `status` lets a test stand in for the kernel's file.
    """
    fields = _status_bytes(status)
    if "VmRSS" in fields and "VmHWM" in fields:
        return ProcessMemory(
            rss_bytes=fields["VmRSS"], peak_rss_bytes=fields["VmHWM"], anonymous_bytes=fields.get("RssAnon")
        )
    rss = psutil.Process().memory_info().rss
    # ru_maxrss is in kibibytes, except on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ProcessMemory(rss_bytes=rss, peak_rss_bytes=max(rss, peak), anonymous_bytes=None)


def memory_figures(*, accelerator_peak_bytes: Callable[[], int] | None = None) -> dict[str, float]:
    """Metrics `memory/*` of this process; `accelerator_peak_bytes` reads the device's peak where there is a device."""
    memory = process_memory()
    figures = {
        "memory/rss_bytes": float(memory.rss_bytes),
        "memory/peak_rss_bytes": float(memory.peak_rss_bytes),
    }
    if memory.anonymous_bytes is not None:
        figures["memory/anonymous_bytes"] = float(memory.anonymous_bytes)
    if accelerator_peak_bytes is not None:
        figures["memory/accelerator_peak_bytes"] = float(accelerator_peak_bytes())
    return figures


def _status_bytes(status: Path) -> dict[str, int]:
    """The `kB` lines of a /proc status file, in bytes; empty where there is none."""
    if not status.is_file():
        return {}
    fields = {}
    for line in status.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
