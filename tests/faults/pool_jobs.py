"""Whole runs inside the rank pool, watched and disturbed from within; every function here runs on each rank."""

import hashlib
import logging
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import largekd
import largekd.distillation.loop as loop
import largekd.distillation.run as run
from largekd.distillation.builder import Parts
from largekd.errors import LargeKDError
from largekd.runtime.faults import VARIABLE


def attempt(
    *,
    tree: Mapping[str, Any],
    stop_at: int | None = None,
    stop_in_evaluation: int | None = None,
    stop_rank: int = 0,
    poison: str | None = None,
    poison_rank: int = 0,
    poison_steps: tuple[int, ...] = (),
    faults: str = "",
) -> dict[str, Any]:
    """One run: its summary or its error, the sample ids of every step on this rank, and what the package logged.

    `stop_at`: rank `stop_rank` gets SIGTERM just before that step; `stop_in_evaluation`: at the start of that
    evaluation, counted from 1. `poison`: `loss`, `teacher` or `gradient` becomes
    NaN on rank `poison_rank` in `poison_steps`. `faults`: LARGEKD_TEST_FAULT for this run.
    """
    # What an earlier run left in the generators must not be what makes a resumed run equal.
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    answer: dict[str, Any] = {"summary": None, "error": None, "samples": {}, "stopped_at": None}
    here = {"step": 0}

    def before_step(step: int, samples: list[list[int]]) -> bool:
        here["step"] = step
        answer["samples"][step] = samples
        if step == stop_at and dist.get_rank() == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
            return True
        return False

    def poisoned() -> bool:
        return here["step"] in poison_steps and dist.get_rank() == poison_rank

    def before_evaluation(number: int) -> None:
        if number == stop_in_evaluation and dist.get_rank() == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    os.environ[VARIABLE] = faults
    with (
        _steps_observed(before_step),
        _evaluations_observed(before_evaluation),
        _poison(poison, when=poisoned),
        _messages() as messages,
    ):
        try:
            answer["summary"] = largekd.distill(tree)
        except LargeKDError as error:
            answer["error"] = [type(error).__name__, str(error)]
    del os.environ[VARIABLE]
    return answer | {"messages": messages}


@contextmanager
def _steps_observed(before_step: Callable[[int, list[list[int]]], bool]) -> Iterator[None]:
    """`before_step(step, sample ids per micro-batch)` is called before every step; True: this rank wants to stop."""
    original, trainers = loop.step_scales, loop.run_steps
    progress: list[Any] = []

    def observed_run(trainer: Any, **options: Any) -> bool:
        progress[:] = [options["journal"]]
        return trainers(trainer, **options)

    def observed_step(micro_batches: Any, **options: Any) -> Any:
        samples = [list(batch.sample_ids) for batch in micro_batches]
        options["stop"] = before_step(progress[0].progress.step + 1, samples) or options["stop"]
        return original(micro_batches, **options)

    loop.step_scales, run.run_steps = observed_step, observed_run
    try:
        yield
    finally:
        loop.step_scales, run.run_steps = original, trainers


@contextmanager
def _evaluations_observed(before_evaluation: Callable[[int], None]) -> Iterator[None]:
    """`before_evaluation(number)` is called before every evaluation, from 1."""
    original, count = loop.evaluate, iter(range(1, 10_000))

    def observed(*arguments: Any, **options: Any) -> Any:
        before_evaluation(next(count))
        return original(*arguments, **options)

    loop.evaluate = observed
    try:
        yield
    finally:
        loop.evaluate = original


@contextmanager
def _poison(kind: str | None, *, when: Callable[[], bool]) -> Iterator[None]:
    """While open, runs are built with a hook that turns values into NaN when `when()` says so."""
    original = run.build

    def with_hook(*arguments: Any, **options: Any) -> Parts:
        parts = original(*arguments, **options)
        if kind == "loss":
            parts.engine.module.vocabulary.register_forward_hook(_nan_loss(when))
        elif kind == "teacher":
            parts.teacher._engine._engine.module.register_forward_hook(_nan_output(when))
        elif kind == "gradient":
            blocks = parts.student.model.get_decoder().layers
            blocks[len(blocks) // 2].register_forward_hook(_nan_gradient(when))
        return parts

    run.build = with_hook
    try:
        yield
    finally:
        run.build = original


def _nan_loss(when: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: Any, inputs: Any, output: dict[str, torch.Tensor]) -> Any:
        return output | {"loss": output["loss"] * float("nan")} if when() else None

    return hook


def _nan_output(when: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: Any, inputs: Any, output: dict[str, torch.Tensor]) -> Any:
        return {name: tensor * float("nan") for name, tensor in output.items()} if when() else None

    return hook


def _nan_gradient(when: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if when() and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("nan"))

    return hook


@contextmanager
def _messages() -> Iterator[list[str]]:
    """What the package logs from INFO on."""
    found: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.levelname} {record.getMessage()}")

    keeper, logger = Keeper(), logging.getLogger("largekd")
    logger.addHandler(keeper)
    try:
        yield found
    finally:
        logger.removeHandler(keeper)


def engine_state(*, checkpoint: str) -> dict[str, Any]:
    """This rank's part of a checkpoint's engine folder: dotted name -> SHA-256 of a tensor, or a plain value."""
    found: dict[str, Any] = {}
    for path in sorted(Path(checkpoint, "engine").rglob("*.pt")):
        if f"rank_{dist.get_rank()}_" in path.name:
            _flatten(torch.load(path, map_location="cpu", weights_only=False), name=path.name, found=found)
    return found


def engine_tensors(*, checkpoint: str) -> dict[str, list[float]]:
    """The same with the tensors' values."""
    found: dict[str, Any] = {}
    for path in sorted(Path(checkpoint, "engine").rglob("*.pt")):
        if f"rank_{dist.get_rank()}_" in path.name:
            state = torch.load(path, map_location="cpu", weights_only=False)
            _flatten(state, name=path.name, found=found, keep=True)
    return {name: value.flatten().tolist() for name, value in found.items() if isinstance(value, torch.Tensor)}


def _flatten(value: Any, *, name: str, found: dict[str, Any], keep: bool = False) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value if keep else _digest(value)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            # The configuration is compared elsewhere; it names the run's own swap folder.
            if key != "ds_config":
                _flatten(child, name=f"{name}.{key}", found=found, keep=keep)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _flatten(child, name=f"{name}.{index}", found=found, keep=keep)
    else:
        found[name] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.dim() else tensor.reshape(1)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"
