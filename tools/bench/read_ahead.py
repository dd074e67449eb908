"""What reading one step ahead from a remote teacher is worth: seconds per step with and without, side by side.

python tools/bench/read_ahead.py [--latency S] [--steps N] [--rounds N]

One rank and a server of one rank on this machine, tiny models; every request is made `--latency` seconds slower, as a
network and a large teacher would. The two ways take turns; a step's time is the median over a run's steps but the
first five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablation import free_port
from make_tiny_model import Shape, make_model, make_text

import largekd
from largekd.distillation import loop
from largekd.teachers.remote_own import OwnServers

ROOT = Path(__file__).resolve().parents[2]
PLACEMENT = str(ROOT / "ds_configs/zero3_tiny.json")
START_S = 120.0
COLD_STEPS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds added to a request (default 0.1)")
    parser.add_argument("--steps", type=int, default=25, help="steps of a run (default 25)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, _serving(Path(name)) as address:
        _slow_down(options.latency)
        read_ahead = loop._read_ahead
        found: dict[str, list[float]] = {"ahead": [], "in turn": []}
        for number in range(options.rounds):
            for way, times in found.items():
                loop._read_ahead = read_ahead if way == "ahead" else lambda *_, **__: None
                tree = settings(Path(name), f"{way}-{number}", steps=options.steps)
                tree["teacher"] = {"kind": "remote", "model": f"{name}/teacher", "servers": [address]}
                times.append(_step_s(tree))
    ratios = [turn / ahead for ahead, turn in zip(*found.values(), strict=True)]
    for way, times in found.items():
        sys.stdout.write(f"{way:10} {' '.join(f'{seconds:.4f}' for seconds in times)} s per step\n")
    sys.stdout.write(f"in turn / ahead: {statistics.median(ratios):.2f}\n")


def settings(folder: Path, name: str, *, steps: int) -> dict[str, Any]:
    """A tiny run with an online teacher."""
    return {
        "run": {"dir": str(folder / name)},
        "teacher": {"model": str(folder / "teacher"), "deepspeed": PLACEMENT},
        "student": {"teacher_layers": [0, 1], "deepspeed": PLACEMENT},
        "data": {"train": str(folder / "train.jsonl")},
        "train": {
            "max_steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "sequence_length": 64,
            "precision": "fp32",
        },
        "checkpoint": {"every_steps": 0},
        "log": {"progress": False, "health_every_steps": 0, "tensorboard": False},
    }


@contextmanager
def _serving(folder: Path) -> Iterator[str]:
    make_model(folder / "teacher", shape=Shape(), seed=0)
    lines = (json.dumps(record) + "\n" for record in make_text(samples=400, seed=1))
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe, log, port = folder / "server.yaml", folder / "server.log", free_port()
    recipe.write_text(json.dumps(settings(folder, "unused", steps=1)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "launch/serve_teacher.py"), "--config", str(recipe), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + START_S
        while "serving " not in log.read_text(encoding="utf-8", errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the server did not come up:\n{log.read_text(encoding='utf-8', errors='replace')}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _slow_down(latency_s: float) -> None:
    ask = OwnServers.ask

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(latency_s)
        return ask(*arguments, **options)

    OwnServers.ask = slow  # type: ignore[method-assign]


def _step_s(tree: dict[str, Any]) -> float:
    largekd.distill(tree)
    records = (Path(tree["run"]["dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["perf/step_s"] for line in records[COLD_STEPS:])


if __name__ == "__main__":
    main()
