"""A sandbox to attack, and what must hold on the host afterwards."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from largekd.config.sandbox import SandboxConfig
from largekd.sandbox import process
from largekd.sandbox.availability import isolation_available


@pytest.fixture
def config() -> SandboxConfig:
    """The default limits; only the wall clock allows for a busy machine."""
    return SandboxConfig(wall_s=20.0)


@pytest.fixture
def system_python() -> None:
    """Skip where the default interpreter is not installed."""
    if not Path(SandboxConfig().python).exists():
        pytest.skip(f"no {SandboxConfig().python}")


@pytest.fixture
def isolated(system_python: None) -> None:
    """Skip where programs cannot be isolated."""
    if reason := isolation_available():
        pytest.skip(reason)


@pytest.fixture
def unharmed(isolated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Process namespaces of the test's sandboxes; no process of theirs and no descriptor of ours is left over."""
    namespaces: list[int] = []
    first_pid = process._first_pid

    def noted(info: int, **named: object) -> int:
        pid = first_pid(info, **named)  # type: ignore[arg-type]
        namespaces.append(os.stat(f"/proc/{pid}/ns/pid").st_ino)
        return pid

    monkeypatch.setattr(process, "_first_pid", noted)
    before = _descriptors(), threading.active_count()
    yield namespaces
    assert namespaces, "no sandbox was started"
    assert os.stat("/proc/self/ns/pid").st_ino not in namespaces
    assert [found for found in _namespaces_of_all() if found in namespaces] == []
    assert (_descriptors(), threading.active_count()) == before


def _descriptors() -> set[str]:
    # The listing's own descriptor is in the list.
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.exists()}


def _namespaces_of_all() -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                # A zombie runs nothing; it waits for its parent to take note.
                if state not in "ZX":
                    yield (folder / "ns" / "pid").stat().st_ino
            except OSError:
                continue
