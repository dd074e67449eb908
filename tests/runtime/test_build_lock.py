"""A killed op build and a missing compiler are named within seconds instead of hanging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from largekd.errors import ConfigError
from largekd.runtime import build_lock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def _lock(folder: Path, *, op: str = "cpu_adam") -> Path:
    (folder / op).mkdir(parents=True)
    path = folder / op / "lock"
    path.touch()
    return path


def test_no_lock_is_fine(folder: Path) -> None:
    (folder / "cpu_adam").mkdir()
    assert build_lock.stale_locks(folder) == []
    build_lock.require_buildable_ops(on_cpu=False)


def test_abandoned_lock_is_named(folder: Path) -> None:
    path = _lock(folder)
    deep = _lock(folder, op="py311_cpu/async_io")
    with pytest.raises(ConfigError, match="stale build lock") as caught:
        build_lock.require_buildable_ops(on_cpu=False)
    assert str(path) in str(caught.value)
    assert str(deep) in str(caught.value)
    assert f"rm {path}" in str(caught.value)


def test_lock_of_a_live_builder_is_respected(folder: Path) -> None:
    path = _lock(folder)
    code = f"import os, sys; os.open({str(path)!r}, os.O_RDONLY); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "open\n"
        assert build_lock.stale_locks(folder) == []
        builder.kill()
        builder.wait()
        assert build_lock.stale_locks(folder) == [path]


def test_missing_compiler_is_named_only_while_the_op_is_not_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler.*deepspeed_shm_comm"):
        build_lock.require_buildable_ops(on_cpu=True)
    build_lock.require_buildable_ops(on_cpu=False)
    (folder / "deepspeed_shm_comm").mkdir()
    (folder / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    build_lock.require_buildable_ops(on_cpu=True)


def test_ninja_of_the_environment_is_put_on_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    with pytest.raises(ConfigError, match="ninja"):
        build_lock.require_buildable_ops(on_cpu=True)
    ninja = binaries / "ninja"
    ninja.touch(mode=0o755)
    build_lock.require_buildable_ops(on_cpu=True)
    assert os.environ["PATH"].split(os.pathsep)[0] == str(binaries)


def test_the_environment_folder_comes_before_the_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert build_lock.extensions_folder() == tmp_path / "cache" / "torch_extensions"
    (tmp_path / "venv" / "torch_extensions").mkdir(parents=True)
    assert build_lock.extensions_folder() == tmp_path / "venv" / "torch_extensions"
