"""Whole runs with a tiny teacher: configurations, runs inside a rank pool, and runs in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from make_tiny_model import Shape, make_model, make_text

ROOT = Path(__file__).resolve().parent.parent


def make_assets(folder: Path) -> Path:
    """A teacher with a tokenizer, training and held-out text."""
    make_model(folder / "teacher", shape=Shape(), seed=0)
    for name, samples, seed in (("train", 120, 1), ("eval", 24, 2)):
        lines = (json.dumps(record) + "\n" for record in make_text(samples=samples, seed=seed))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def settings(assets: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The nested mapping of a tiny run; `changes` are dotted keys with `__` for the dots."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "teacher": {"model": str(assets / "teacher"), "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json")},
        "student": {"teacher_layers": [0, 1], "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json")},
        "data": {"train": {"path": str(assets / "train.jsonl")}, "eval": {"path": str(assets / "eval.jsonl")}},
        "train": {
            "max_steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 64,
            "precision": "fp32",
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "objective": {"alpha": 1.0},
        "eval": {"max_rows": 6},
        "checkpoint": {"every_steps": 0},
        "log": {"progress": False, "health_every_steps": 1},
    }
    return changed(tree, **changes)


def changed(tree: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a nested mapping with other values at dotted keys (`__` for the dots)."""
    copy: dict[str, Any] = deepcopy(dict(tree))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = copy
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return copy


def distil(*, tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """For a rank pool: the whole run in this process; its summary."""
    import largekd

    return largekd.distill(tree)


def distil_until(*, tree: Mapping[str, Any], step: int, rank: int) -> dict[str, Any] | None:
    """For a rank pool: the same, but `rank` gets SIGTERM just before optimizer step `step`."""
    import torch.distributed as dist

    import largekd.distillation.loop as loop

    train_step: Callable[..., Any] = loop.step_scales
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
            options["stop"] = True
        return train_step(*arguments, **options)

    loop.step_scales = interrupted
    try:
        return distil(tree=tree)
    finally:
        loop.step_scales = train_step


def write_recipe(path: Path, tree: Mapping[str, Any]) -> Path:
    """The mapping as a YAML file (JSON is YAML)."""
    path.write_text(json.dumps(tree))
    return path


def start_ranks(
    recipe: Path, *, ranks: int = 2, overrides: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """`launch/train.py` in processes of their own, as a launcher starts it, without the cost of DeepSpeed's command."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launch/train.py"), "--config", str(recipe), *overrides],
                env={**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def deepspeed_command(recipe: Path, *, overrides: Sequence[str] = ()) -> list[str]:
    """The command that a user types for two ranks."""
    launcher = Path(sys.executable).parent / "deepspeed"
    train = str(ROOT / "launch/train.py")
    return [
        str(launcher), "--num_accelerators", "2", "--master_port", str(free_port()), train,
        "--config", str(recipe), *overrides,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def cache(*, tree: Mapping[str, Any]) -> str | None:
    """For a rank pool: the whole caching job in this process; the cache's digest."""
    from largekd.config.load import parse_config
    from largekd.distillation.caching import cache_teacher

    return cache_teacher(parse_config(tree))


def from_cache(tree: Mapping[str, Any], *, model: bool = True, **changes: Any) -> dict[str, Any]:
    """`tree` with the teacher that `tree["cache"]` holds; `changes` as in `settings`."""
    teacher = {"kind": "cached", "path": tree["cache"]["path"]}
    if model:
        teacher["model"] = tree["teacher"]["model"]
    return changed({**tree, "teacher": teacher}, **changes)
