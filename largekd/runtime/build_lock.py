"""Whether DeepSpeed's helper ops can be loaded or built, asked before DeepSpeed is imported.

torch compiles such an op at first use and guards the build with a file `lock` in the op's folder. A build that was
killed leaves the file behind, and every later start waits for it without a word and without end.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from largekd.errors import ConfigError

# The op that every CPU process loads when the process group is made.
CPU_COMM_OP = "deepspeed_shm_comm"

_BUILD_TOOLS = frozenset({"ninja", "cc1plus", "c++", "g++", "clang++", "nvcc", "hipcc", "cicc", "ptxas"})
_RELEASE_SECONDS = 1.0


def extensions_folder() -> Path:
    """The folder below which torch builds and finds extension ops for this environment."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    prebuilt = Path(sys.prefix) / "torch_extensions"
    if prebuilt.is_dir():
        return prebuilt
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def stale_locks(folder: Path) -> list[Path]:
    """Lock files of op builds below `folder` that no process of this host holds; sorted.

    The builder keeps its lock file open, so an open descriptor proves that it lives. Where the descriptors of another
    user's process cannot be read, a running compiler or ninja counts as a holder. Other hosts cannot be seen.
    """
    locks = sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])
    if not locks:
        return []
    held = set(_held_files())
    if None in held:
        return []
    return [path for path in locks if path.resolve() not in held and path.exists()]


def require_buildable_ops(*, on_cpu: bool | None = None) -> None:
    """Raise ConfigError when loading DeepSpeed's ops would hang or fail; returns within seconds.

    Found are stale build locks, a missing ninja, and on a CPU machine a missing C++ compiler while the op is not yet
    built. on_cpu: whether DeepSpeed will choose the CPU; None asks DS_ACCELERATOR, then torch. The environment's own
    ninja is put on PATH, which torch searches, for an interpreter that was called without activation.
    """
    folder = extensions_folder()
    _require_no_stale_lock(folder)
    if not (_runs_on_cpu() if on_cpu is None else on_cpu):
        return
    if not _find_ninja():
        raise ConfigError(
            "ninja is not on PATH: DeepSpeed loads its CPU ops through it. "
            "Run `bash launch/setup.sh`, or `pip install ninja` into this environment"
        )
    built = any((place / f"{CPU_COMM_OP}.so").is_file() for place in folder.rglob(CPU_COMM_OP))
    compiler = os.environ.get("CXX", "c++")
    if not built and shutil.which(compiler) is None:
        raise ConfigError(
            f"the C++ compiler {compiler!r} is not on PATH and DeepSpeed's op {CPU_COMM_OP} is not built in {folder}. "
            "Install a compiler (Debian: `apt-get install g++`), then run `bash launch/setup.sh`"
        )


def _require_no_stale_lock(folder: Path) -> None:
    suspects = stale_locks(folder)
    if not suspects:
        return
    # A builder that is just finishing closes its lock an instant before it removes the file.
    time.sleep(_RELEASE_SECONDS)
    stale = [str(path) for path in stale_locks(folder) if path in suspects]
    if stale:
        raise ConfigError(
            f"stale build lock {', '.join(stale)}: an earlier build of a DeepSpeed op was killed, and loading the op "
            "would wait for ever. If no other host or container builds into this folder, delete it: "
            f"`rm {' '.join(stale)}`"
        )


def _held_files() -> Iterator[Path | None]:
    """Resolved paths that this host's processes hold open; None for a build tool whose descriptors are hidden."""
    for process in psutil.process_iter(["name"]):
        try:
            for opened in process.open_files():
                yield Path(opened.path)
        except psutil.AccessDenied:
            if process.info["name"] in _BUILD_TOOLS:
                yield None
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue


def _runs_on_cpu() -> bool:
    named = os.environ.get("DS_ACCELERATOR")
    if named:
        return named == "cpu"
    import torch

    return not torch.accelerator.is_available()


def _find_ninja() -> bool:
    if shutil.which("ninja"):
        return True
    own = Path(sys.executable).parent
    if not (own / "ninja").is_file():
        return False
    os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"
    return True
