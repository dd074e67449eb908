"""Memory of the process, from the kernel's file and without it."""

import os
from pathlib import Path

import pytest

from largekd.monitoring.memory import memory_figures, process_memory


def test_status_fields_are_read_in_bytes(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t     512 kB\nThreads:\t1\n")
    memory = process_memory(status=status)
    assert (memory.rss_bytes, memory.peak_rss_bytes, memory.anonymous_bytes) == (1 << 20, 2 << 20, 1 << 19)


def test_allocation_shows_and_the_peak_stays():
    before = process_memory()
    block = bytearray(64_000_000)
    block[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(block[:: os.sysconf("SC_PAGE_SIZE")])
    during = process_memory()
    del block
    after = process_memory()
    assert during.rss_bytes - before.rss_bytes > 50_000_000
    assert after.peak_rss_bytes >= during.rss_bytes - 5_000_000
    assert after.rss_bytes < during.rss_bytes - 50_000_000


@pytest.mark.parametrize("text", [None, "Name:\tpython\nVmRSS:\t 1024 kB\n"])
def test_without_the_kernels_figures_psutil_answers(tmp_path: Path, text: str | None):
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    memory, known = process_memory(status=status), process_memory()
    assert memory.rss_bytes == pytest.approx(known.rss_bytes, rel=0.2)
    assert memory.peak_rss_bytes >= memory.rss_bytes
    assert memory.anonymous_bytes is None


def test_figures_have_the_accelerators_peak_only_where_it_is_given():
    figures = memory_figures()
    assert figures["memory/rss_bytes"] > 1_000_000
    assert figures["memory/peak_rss_bytes"] > 1_000_000
    assert "memory/accelerator_peak_bytes" not in figures
    assert memory_figures(accelerator_peak_bytes=lambda: 77)["memory/accelerator_peak_bytes"] == 77.0
