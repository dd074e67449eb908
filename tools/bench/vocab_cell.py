"""The inputs of one benchmark cell and what a process measures about itself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

HEAD_STD = 0.02
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cell:
    """One problem: `tokens` counted tokens, heads of `vocab` ids, both models `hidden` wide."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str = "bf16"
    divergence: str = "forward_kl"
    temperature: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, vocabulary {self.vocab}, hidden {self.hidden}, {self.dtype}, {self.divergence}"

    @property
    def bytes_per_number(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Inputs:
    """Hidden states (tokens, width), heads (vocabulary, width); student tensors want a gradient."""

    hidden_TD: Tensor
    weight_VD: Tensor
    teacher_hidden_TE: Tensor
    teacher_weight_VE: Tensor
    labels_T: Tensor

    def first(self, tokens: int, /) -> "Inputs":
        """The same heads with fewer tokens, for warming up."""
        hidden_TD = self.hidden_TD.detach()[:tokens].requires_grad_()
        teacher_TE, labels_T = self.teacher_hidden_TE[:tokens], self.labels_T[:tokens]
        return Inputs(hidden_TD, self.weight_VD, teacher_TE, self.teacher_weight_VE, labels_T)


def make_inputs(cell: Cell, /, *, seed: int = 0) -> Inputs:
    """Hidden states of unit variance, as after a final norm, and heads at the usual initial deviation of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[cell.dtype]

    def normal(rows: int, *, std: float) -> Tensor:
        return torch.empty(rows, cell.hidden, dtype=dtype).normal_(0, std, generator=generator)

    return Inputs(
        hidden_TD=normal(cell.tokens, std=1.0).requires_grad_(),
        weight_VD=normal(cell.vocab, std=HEAD_STD).requires_grad_(),
        teacher_hidden_TE=normal(cell.tokens, std=1.0),
        teacher_weight_VE=normal(cell.vocab, std=HEAD_STD),
        labels_T=torch.randint(0, cell.vocab, (cell.tokens,), generator=generator),
    )


def status_bytes(field: str, /) -> int:
    """A memory field of /proc/self/status in bytes (VmRSS: resident now, VmHWM: its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(work: Callable[[], float | None], /) -> dict[str, float]:
    """Process CPU-seconds, wall seconds, and peak resident bytes above what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before, cpu, wall = status_bytes("VmRSS"), time.process_time(), time.perf_counter()
    loss = work()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_bytes": status_bytes("VmHWM") - before,
        "loss": float("nan") if loss is None else loss,
    }


def spawn(script: Path, cell: Cell, name: str, /) -> dict[str, float]:
    """What `script --child` prints last, in a process of its own with one thread."""
    payload = json.dumps({"cell": asdict(cell), "name": name})
    command = [sys.executable, str(script.resolve()), "--child", payload]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
