"""The doctor finds what would fail, names the remedy, and is quick."""

import json
import subprocess
import sys
from pathlib import Path

import doctor
import pytest


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without prebuilt ops."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def _by_subject() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_a_stale_lock_blocks_and_is_named(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (environment / "async_io").mkdir()
    (environment / "async_io" / "lock").touch()
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert f"FAIL  build lock             stale build lock {environment}/async_io/lock" in text
    assert f"rm {environment}/async_io/lock" in text


def test_a_missing_compiler_blocks_until_the_op_is_built(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "_gpus", list)
    found = _by_subject()["c++ compiler"]
    assert (found.mark, "no-such-compiler" in found.text, "g++" in found.remedy) == ("FAIL", True, True)
    (environment / "deepspeed_shm_comm").mkdir()
    (environment / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert _by_subject()["c++ compiler"].mark == "note"


def test_versions_out_of_range_and_absent_packages_block(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"deepspeed": "0.20.1", "torch": "2.13.0+cpu"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = {finding.subject: finding for finding in doctor._packages()}
    assert (found["deepspeed"].mark, found["deepspeed"].text) == ("FAIL", "0.20.1, wanted >=0.19.6,<0.20")
    assert found["torch"].mark == "ok"
    assert found["numpy"].mark == "FAIL"
    assert all(finding.remedy for finding in found.values() if finding.mark == "FAIL")


def test_a_gpu_with_a_cpu_build_of_torch_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(doctor, "_gpus", lambda: ["Some GPU, 80000 MiB, 1.2"])
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cpu")
    assert [finding.mark for finding in doctor._accelerator()] == ["ok", "FAIL"]
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0")
    assert [finding.mark for finding in doctor._accelerator()] == ["ok"]


def test_json(environment: Path) -> None:
    finished = subprocess.run(
        [sys.executable, doctor.__file__, "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    findings = json.loads(finished.stdout)
    assert {"python", "torch", "ninja", "machine", "/dev/shm"} <= {finding["subject"] for finding in findings}
    assert finished.returncode == int(any(finding["mark"] == "FAIL" for finding in findings))
    assert all(finding["remedy"] for finding in findings if finding["mark"] == "FAIL")


def test_no_torch_is_imported() -> None:
    code = "import sys, doctor; doctor.examine(); sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    folders = [str(Path(doctor.__file__).parent), str(doctor.ROOT)]
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}; {code}"], timeout=60, check=False
    )
    assert finished.returncode == 0
