"""Say what this machine has, what would fail, and the remedy:  python tools/doctor.py [--json]

Marks: ok; note = something is absent that only some runs need; FAIL = training would not start.
Exit status 0 when nothing fails, else 1.
"""

import argparse
import configparser
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
SETUP = "bash launch/setup.sh"
MIN_SHM_BYTES = 64 << 20
MIN_FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty when there is nothing to do."""

    subject: str
    mark: Literal["ok", "note", "FAIL"]
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings; imports neither torch nor DeepSpeed."""
    findings = list(_python())
    findings += _packages()
    findings += _build_tools()
    findings += _ops()
    findings += _accelerator()
    findings += _machine()
    findings += _folders()
    findings += _network()
    findings += _sandbox()
    return findings


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036, the doctor is asked before anything is installed
        yield Finding(
            "python", "FAIL", f"{version} at {sys.executable}", f"use 3.11 or newer: PYTHON=python3.11 {SETUP}"
        )
    elif sys.prefix == sys.base_prefix:
        yield Finding("python", "note", f"{version}, no virtual environment", f"{SETUP}, then `. launch/env.sh`")
    else:
        yield Finding("python", "ok", f"{version} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    lines = [line.strip() for line in declared["options"]["install_requires"].splitlines()]
    for line in filter(None, lines):
        name, _, wanted = line.partition(" ")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "FAIL", f"not installed, wanted {wanted}", SETUP)
            continue
        mark = _in_range(found, wanted=wanted)
        yield Finding(name, mark, found if mark == "ok" else f"{found}, wanted {wanted}", "" if mark == "ok" else SETUP)


def _in_range(version: str, *, wanted: str) -> Literal["ok", "FAIL"]:
    from packaging.specifiers import SpecifierSet

    return "ok" if SpecifierSet(wanted).contains(version.partition("+")[0], prereleases=True) else "FAIL"


def _build_tools() -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "c++")
    built = _built("deepspeed_shm_comm")
    if path := shutil.which(compiler):
        yield Finding("c++ compiler", "ok", path)
    else:
        mark: Literal["note", "FAIL"] = "note" if built or _gpus() else "FAIL"
        yield Finding("c++ compiler", mark, f"{compiler} not found", "apt-get install g++ (or set CXX)")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        yield Finding("ninja", "ok", ninja)
    else:
        yield Finding("ninja", "FAIL", "not found; DeepSpeed loads its ops through it", SETUP)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        mark = "note" if built else "FAIL"
        yield Finding("python headers", mark, f"no {header}", "apt-get install python3-dev")


def _ops() -> Iterator[Finding]:
    from largekd.runtime.build_lock import extensions_folder, stale_locks

    folder = extensions_folder()
    for lock in stale_locks(folder):
        text = f"stale build lock {lock}: a build was killed, every start would wait for ever"
        yield Finding("build lock", "FAIL", text, f"rm {lock}   (or {SETUP})")
    if _gpus():
        return
    uses = {"deepspeed_shm_comm": "every run", "cpu_adam": "optim.implementation=deepspeed", "async_io": "NVMe offload"}
    for name, use in uses.items():
        if _built(name):
            yield Finding(f"op {name}", "ok", f"built in {folder}")
        else:
            text = f"not built in {folder}, needed by {use}; compiled at first use, minutes"
            yield Finding(f"op {name}", "note", text, "python tools/build_ops.py")
    if not _has_libaio():
        yield Finding("libaio", "note", "no libaio.h: NVMe offload will be refused", "apt-get install libaio-dev")


def _accelerator() -> Iterator[Finding]:
    chosen = os.environ.get("DS_ACCELERATOR")
    gpus = _gpus()
    if gpus and chosen == "cpu":
        yield Finding("accelerator", "note", f"{len(gpus)} GPU(s), unused: DS_ACCELERATOR=cpu", "unset DS_ACCELERATOR")
    elif gpus:
        yield Finding("accelerator", "ok", "; ".join(gpus))
        if "+cpu" in _version("torch"):
            yield Finding("torch build", "FAIL", "a GPU, but torch is the CPU build", "install torch's GPU build")
    else:
        yield Finding("accelerator", "ok", "no GPU found: CPU, two ranks with deepspeed --num_accelerators 2")


def _machine() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    mark: Literal["ok", "note"] = "ok" if memory.available >= 8 << 30 else "note"
    text = f"{cores} cores, {_gib(memory.available)} of {_gib(memory.total)} GiB memory free"
    yield Finding("machine", mark, text, "" if mark == "ok" else "the quick start needs about 8 GiB")
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shm < MIN_SHM_BYTES:
        text = f"{shm >> 20} MiB free, collectives between ranks of a host pass through it"
        yield Finding("/dev/shm", "FAIL", text, "containers: start with --shm-size=1g")
    else:
        yield Finding("/dev/shm", "ok", f"{_gib(shm)} GiB free")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < 1 << 30:
        text = f"{limit >> 20} MiB can be locked: pinned offload buffers do not fit"
        yield Finding("memlock", "note", text, "keep pin_memory false, or raise `ulimit -l`")


def _folders() -> Iterator[Finding]:
    for label, folder in (("checkout", ROOT), ("model cache", _hub_cache())):
        place = folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            mark: Literal["note", "FAIL"] = "FAIL" if label == "checkout" else "note"
            remedy = "set HF_HOME to a folder you can write" if label == "model cache" else "run.dir=FOLDER elsewhere"
            yield Finding(label, mark, f"no write permission in {place}", remedy)
        elif free < MIN_FREE_BYTES:
            yield Finding(label, "note", f"{_gib(free)} GiB free in {folder}", "checkpoints need space: free some")
        else:
            yield Finding(label, "ok", f"{folder}, {_gib(free)} GiB free")


def _network() -> Iterator[Finding]:
    absent = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if absent:
        text = f"{' and '.join(absent)} not found: no start of other hosts from this one"
        yield Finding(
            "several nodes", "note", text, "apt-get install pdsh openssh-client, or see launch/README.md: --no_ssh"
        )
    else:
        yield Finding("several nodes", "ok", "pdsh and ssh found")


def _sandbox() -> Iterator[Finding]:
    from largekd.sandbox.availability import isolation_available

    if reason := isolation_available():
        remedy = "apt-get install bubblewrap" if shutil.which("bwrap") is None else "see largekd/sandbox/README.md"
        yield Finding("sandbox", "note", f"programs that a model wrote will be refused: {reason}", remedy)
    else:
        yield Finding("sandbox", "ok", "programs that a model wrote can be isolated (bubblewrap)")


def _built(op: str) -> bool:
    from largekd.runtime.build_lock import extensions_folder

    return any(extensions_folder().glob(f"**/{op}/{op}.so"))


def _has_libaio() -> bool:
    places = [Path("/usr/include"), Path("/usr/local/include"), Path(sys.prefix) / "include"]
    return any((place / "libaio.h").is_file() for place in places)


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the findings as a JSON list")
    given = parser.parse_args(argv)
    try:
        findings = examine()
    except ImportError as error:
        # Packages are missing so far that not even the checks can run.
        findings = [*_python(), Finding("packages", "FAIL", str(error), SETUP)]
    if given.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.mark:4s}  {finding.subject:22s} {finding.text}")
            if finding.remedy:
                print(f"{'':28s} -> {finding.remedy}")
    failed = [finding for finding in findings if finding.mark == "FAIL"]
    if not given.json:
        print(f"\n{len(failed)} blocking" if failed else "\nnothing blocking")
    return 1 if failed else 0


if __name__ == "__main__":
    # The checkout also works before it is installed.
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
