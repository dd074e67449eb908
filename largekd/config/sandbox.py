"""How programs that a model wrote are run."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class SandboxConfig(Frozen):
    """Isolation and limits of one program."""

    isolation: Literal["namespaces", "limits_only"] = Field(
        "namespaces",
        description="namespaces: no network, no files but a small scratch folder, no other process; refused where the "
        "kernel or bubblewrap do not allow it. limits_only: resource limits alone, for programs that you trust.",
    )
    python: str = Field("/usr/bin/python3", description="Interpreter; must be outside of home folders.")
    packages: tuple[str, ...] = Field(
        (), description="Folders with Python packages that programs may import; they are shown read-only."
    )
    wall_s: float = Field(5.0, gt=0, description="Seconds until the whole process tree is killed.")
    cpu_s: float = Field(2.0, gt=0, description="CPU seconds of all processes together.")
    memory_bytes: int = Field(
        512_000_000, ge=16_000_000, description="Address space of a process, and memory of all of them together."
    )
    processes: int = Field(16, ge=1, description="Processes and threads at the same time.")
    scratch_bytes: int = Field(16_000_000, ge=0, description="Room in the only writable folder, and size of a file.")
    output_bytes: int = Field(
        65_536,
        ge=1,
        description="Most on standard output, and on standard error; a program that writes more is ended.",
    )
