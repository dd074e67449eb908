"""The models and tokens of one whole-step cell, and how a contender's process is timed.

Every contender imports this file, also from an environment that has neither largekd nor DeepSpeed.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from vocab_cell import DTYPES, status_bytes

READY = "READY"
LR = 1e-4
# Far enough from uniform that the divergence of two random models is a number worth comparing.
_INITIAL_STD = 0.05


@dataclass(frozen=True)
class Cell:
    """One problem. Models are random Llamas, `(layers, hidden)` each; every position but a row's last is counted."""

    student: tuple[int, int] = (4, 256)
    teacher: tuple[int, int] = (8, 512)
    vocab: int = 131_072
    positions: int = 512
    micro_batch: int = 4
    dtype: str = "bf16"
    tied: bool = True

    @property
    def name(self) -> str:
        """The cell in words."""
        (a, b), (c, d) = self.student, self.teacher
        tie = "tied" if self.tied else "untied"
        return (
            f"student {a}x{b}, teacher {c}x{d}, vocabulary {self.vocab} ({tie}), {self.positions} positions, "
            f"micro-batch {self.micro_batch}, {self.dtype}"
        )

    @property
    def tokens(self) -> int:
        """Positions of one step on one rank."""
        return self.positions * self.micro_batch


@dataclass(frozen=True)
class Job:
    """What one contender's process is told."""

    cell: Cell
    contender: str
    models: str
    warm_steps: int = 1
    timed_steps: int = 3

    def dumps(self) -> str:
        """This job as a command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Job":
        """The job that `dumps` wrote."""
        tree = json.loads(text)
        cell = tree.pop("cell")
        cell |= {name: tuple(cell[name]) for name in ("student", "teacher")}
        return cls(cell=Cell(**cell), **tree)

    @property
    def steps(self) -> int:
        """Steps of the process, warm ones first."""
        return self.warm_steps + self.timed_steps


def make_models(cell: Cell, folder: Path, /) -> None:
    """Both models with random weights as Hugging Face folders `student` and `teacher`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, (name, (layers, hidden)) in enumerate((("student", cell.student), ("teacher", cell.teacher))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=cell.vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            max_position_embeddings=cell.positions,
            tie_word_embeddings=cell.tied,
            initializer_range=_INITIAL_STD,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).to(DTYPES[cell.dtype]).save_pretrained(folder / name)


def token_ids(cell: Cell, /, *, step: int, rank: int = 0) -> Tensor:
    """Ids `[B, S]` of one step on one rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(3, cell.vocab, (cell.micro_batch, cell.positions), generator=generator)


class Clock:
    """Counts a process's steps and measures those after the warm ones; memory over its whole life since `__init__`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._losses: list[float] = []
        _reset_peak()
        self._baseline = status_bytes("VmRSS")
        self._start: tuple[float, float] | None = None
        self._end: tuple[float, float] | None = None

    def before_step(self, step: int) -> None:
        """Call before step `step` (from 0). Before the first timed one it waits until the parent says go."""
        if step == self._job.warm_steps:
            sys.stdout.write(f"{READY}\n")
            sys.stdout.flush()
            sys.stdin.readline()
            self._start = _now()

    def after_step(self, step: int) -> None:
        """Call after step `step`."""
        if step == self._job.steps - 1:
            self._end = _now()

    def add_loss(self, loss: float) -> None:
        """Note a step's loss per counted token."""
        self._losses.append(loss)

    def report(self) -> dict[str, Any]:
        """CPU- and wall-seconds per timed step, peak bytes above the imports, and the losses."""
        assert self._start is not None and self._end is not None
        cpu_s, wall_s = ((b - a) / self._job.timed_steps for a, b in zip(self._start, self._end, strict=True))
        tokens = self._job.cell.tokens
        return {
            "cpu_s": cpu_s,
            "wall_s": wall_s,
            "tokens_per_cpu_s": tokens / cpu_s,
            "tokens_per_s": tokens / wall_s,
            "peak_bytes": status_bytes("VmHWM") - self._baseline,
            "losses": self._losses,
        }


def serve(run: Callable[[Job], dict[str, Any]], /) -> NoReturn:
    """Run the job of this process's command line and print its report as the last line."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report = run(Job.loads(sys.argv[1]))
    sys.stdout.write(f"{json.dumps(report)}\n")
    raise SystemExit(0)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
