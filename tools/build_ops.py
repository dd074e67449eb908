"""Build the ops that DeepSpeed would otherwise compile at the first start of a run.

    python tools/build_ops.py [--folder FOLDER] [--op NAME ...]

On a CPU machine these are the shared-memory collectives, the CPU Adam and, when libaio is there, asynchronous I/O for
NVMe. On a GPU machine nothing is built: the default recipes use none of DeepSpeed's compiled GPU ops, and those that
other settings ask for are compiled at first use with the nvcc that matches torch.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from filelock import FileLock

from largekd.runtime.build_lock import stale_locks

# DeepSpeed's builder -> (folder of the op, what it is for, header it cannot do without)
OPS = {
    "ShareMemCommBuilder": ("deepspeed_shm_comm", "collectives between ranks of one host", None),
    "CPUAdamBuilder": ("cpu_adam", "optimizer in host memory", None),
    "AsyncIOBuilder": ("async_io", "offload to NVMe; brings pin_memory with it", "libaio.h"),
}
_LOAD_ONE = (
    "import sys; from deepspeed.accelerator import get_accelerator;"
    "builder = get_accelerator().create_op_builder(sys.argv[1]);"
    "sys.exit('DeepSpeed has no such op here') if builder is None else builder.load(verbose=True)"
)


def build(builder: str, *, folder: Path) -> None:
    """Build one op below `folder` and show the seconds; raises RuntimeError with the log's end when it fails."""
    name, purpose, _ = OPS[builder]
    log = folder / f"{name}.log"
    environment = dict(os.environ, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(folder))
    # A compiler process of these sources takes up to 2 GB.
    jobs = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // (2 << 30))
    environment.setdefault("MAX_JOBS", str(max(1, jobs)))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    started = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-c", _LOAD_ONE, builder],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(child, label=f"{name} ({purpose})", started=started)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"building {name} failed, log {log}:\n{tail}")


def clear_stale_locks(folder: Path) -> None:
    """Remove the locks of killed builds, after compilers that such a build left behind have ended."""
    for lock in stale_locks(folder):
        while orphans := _processes_in(lock.parent):
            _say(f"waiting for process {orphans[0]}, left in {lock.parent} by a killed build")
            time.sleep(5)
        _say(f"removing the stale build lock {lock}")
        lock.unlink(missing_ok=True)


def _watch(child: subprocess.Popen, *, label: str, started: float) -> None:  # type: ignore[type-arg]
    shown = 0.0
    live = sys.stderr.isatty()
    while child.poll() is None:
        elapsed = time.monotonic() - started
        if live or elapsed - shown >= 10:
            shown = elapsed
            print(
                f"\r  {label} ... {elapsed:.0f} s" if live else f"  {label} ... {elapsed:.0f} s",
                end="",
                file=sys.stderr,
            )
            print("", end="" if live else "\n", file=sys.stderr, flush=True)
        time.sleep(0.5)
    _say(
        f"{chr(13) if live else ''}  {label} {'done' if child.returncode == 0 else 'FAILED'} "
        f"in {time.monotonic() - started:.0f} s"
    )


def _processes_in(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                found.append(process.pid)
        except (psutil.Error, FileNotFoundError):
            continue
    return found


def _has_header(header: str) -> bool:
    command = [os.environ.get("CXX", "c++"), "-E", "-x", "c++", "-"]
    return subprocess.run(command, input=f"#include <{header}>\n", capture_output=True, text=True).returncode == 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(sys.prefix) / "torch_extensions"
    parser.add_argument("--folder", type=Path, default=default, help="where the ops go (default: in this environment)")
    parser.add_argument("--op", action="append", choices=list(OPS), help="build this one only; may be repeated")
    parser.add_argument("--mark", type=Path, help="file that is created when this is a CPU machine, removed otherwise")
    arguments = parser.parse_args(argv)
    import torch

    on_cpu = os.environ.get("DS_ACCELERATOR", "cpu") == "cpu" and not torch.accelerator.is_available()
    if arguments.mark is not None:
        arguments.mark.touch() if on_cpu else arguments.mark.unlink(missing_ok=True)
    if not on_cpu:
        _say("GPU found: DeepSpeed compiles the ops that a run asks for at its first use; nothing to build now")
        return 0
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _say(f"building DeepSpeed's CPU ops into {folder}")
    with FileLock(folder / ".building"):
        clear_stale_locks(folder)
        for builder in arguments.op or OPS:
            header = OPS[builder][2]
            if header is not None and not _has_header(header):
                _say(
                    f"  {OPS[builder][0]} skipped: no {header}; install libaio-dev and run this again for NVMe offload"
                )
                continue
            try:
                build(builder, folder=folder)
            except RuntimeError as error:
                _say(str(error))
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
