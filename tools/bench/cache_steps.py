"""Steps on a cache against steps with the online teacher, and against fine-tuning without a teacher, in one run.

python tools/bench/cache_steps.py [--rounds N] [--steps N] [--codec top_k|sampled|hidden] [--json FILE]

Every measurement is a process of its own with one rank and one thread; the contenders take turns. A step's time is the
median over a run's steps but the first two. Bars: online / cached is at least 0.85 of the bound, the online step over
the online step without its teacher, and cached / plain is at most 1.10. Exit status 1: a bar was missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from make_tiny_model import Shape, make_model, make_text

ROOT = Path(__file__).resolve().parents[2]
SHARE_OF_BOUND, OVER_PLAIN = 0.85, 1.10
TEACHER = Shape(layers=12, hidden=512, heads=8, kv_heads=4, vocab=32_768)
WARM_STEPS = 2
SIGNALS = {
    "top_k": {"kind": "top_k", "k": 64},
    "sampled": {"kind": "sampled", "draws": 12},
    "hidden": {"kind": "full"},
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default 8)")
    parser.add_argument("--codec", choices=sorted(SIGNALS), default="top_k", help="what the cache holds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = contenders(folder, codec=options.codec, steps=options.steps)
        launch("cache_teacher", trees["online"], folder=folder)
        rounds = [
            {way: measured(tree, folder=folder / f"{way}-{number}") for way, tree in trees.items()}
            for number in range(options.rounds)
        ]
    report = summarised(rounds)
    if options.json:
        options.json.write_text(json.dumps({"rounds": rounds, **report}, indent=2) + "\n")
    return judge(report)


def contenders(folder: Path, *, codec: str, steps: int) -> dict[str, dict[str, Any]]:
    """The configurations by name."""
    make_model(folder / "teacher", shape=TEACHER, seed=0)
    lines = (json.dumps(record) + "\n" for record in make_text(samples=800, seed=1))
    (folder / "train.jsonl").write_text("".join(lines))
    placement = str(ROOT / "ds_configs/zero3.json")
    online = {
        "run": {"dir": ""},
        "teacher": {"model": str(folder / "teacher"), "deepspeed": str(ROOT / "ds_configs/teacher_zero3.json")},
        "cache": {"path": str(folder / "cache"), "codec": {"kind": codec}},
        "student": {"teacher_layers": [0, 4, 8, 11], "deepspeed": placement},
        "data": {"train": {"path": str(folder / "train.jsonl")}},
        "train": {
            "max_steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "sequence_length": 256,
            "precision": "bf16",
        },
        "optim": {"lr": 1e-4},
        "objective": {"alpha": 1.0},
        "checkpoint": {"every_steps": 0},
        "log": {"progress": False, "tensorboard": False},
    }
    cached = {"kind": "cached", "path": str(folder / "cache"), "model": str(folder / "teacher")}
    return {
        "online": online,
        "cached": {**online, "teacher": cached, "objective": {"alpha": 1.0, "signal": SIGNALS[codec]}},
        "plain": {**online, "teacher": cached, "objective": {"alpha": 0.0}},
    }


def launch(launcher: str, tree: dict[str, Any], *, folder: Path) -> None:
    """One rank of a launcher; its output is shown when it fails."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({**tree, "run": {"dir": str(folder / "run")}}))
    finished = subprocess.run(
        [sys.executable, str(ROOT / f"launch/{launcher}.py"), "--config", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise SystemExit(f"{launcher}: {finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")


def measured(tree: dict[str, Any], *, folder: Path) -> dict[str, float]:
    """Median seconds of a run's steps and of their sections."""
    launch("train", tree, folder=folder)
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    names = ("perf/step_s", "perf/teacher_s", "perf/student_s", "perf/optimizer_s")
    return {name: statistics.median(record[name] for record in records[WARM_STEPS:]) for name in names}


def summarised(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians over the rounds of each round's ratios."""

    def median(ratio: Any) -> float:
        return statistics.median(ratio(found) for found in rounds)

    def step(found: dict[str, dict[str, float]], way: str) -> float:
        return found[way]["perf/step_s"]

    return {
        "online / cached": median(lambda found: step(found, "online") / step(found, "cached")),
        "bound": median(
            lambda found: step(found, "online") / (step(found, "online") - found["online"]["perf/teacher_s"])
        ),
        "cached / plain": median(lambda found: step(found, "cached") / step(found, "plain")),
        "cached step, s": median(lambda found: step(found, "cached")),
    }


def judge(report: dict[str, float]) -> int:
    """0 when both bars are reached."""
    for name, value in report.items():
        sys.stdout.write(f"{name:36} {value:8.4f}\n")
    share = report["online / cached"] / report["bound"]
    bars = {
        f"share of the bound {share:.3f} >= {SHARE_OF_BOUND}": share >= SHARE_OF_BOUND,
        f"cached / plain {report['cached / plain']:.3f} <= {OVER_PLAIN}": report["cached / plain"] <= OVER_PLAIN,
    }
    for text, reached in bars.items():
        sys.stdout.write(f"{text}  {'reached' if reached else 'MISSED'}\n")
    return int(not all(bars.values()))


if __name__ == "__main__":
    raise SystemExit(main())
