"""What freezing the lower half of the student's layers saves of a step: CPU time and bytes of the optimizer.

python tools/bench/freezing.py [--quick] [--rounds N] [--json FILE]

Each measurement is a process of its own, at one thread; the ways to freeze take turns, untied and tied.
Exit status 1: a bar was missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from fused_vocab import environment  # noqa: E402
from step_cell import Cell, Job, make_models  # noqa: E402
from step_run import Runner  # noqa: E402
from vocab_bars import median  # noqa: E402

ALL, LAYERS, BOTH = "ours", "ours_frozen_layers", "ours_frozen"
LABELS = {ALL: "nothing", LAYERS: "lower half of the layers", BOTH: "lower half and the embeddings"}
TIME = 0.80
"""Bar of CPU time with the lower half and the embeddings frozen, of that with nothing frozen."""
# Layers are most of the work: a small vocabulary, and a teacher that costs little.
SIZES: dict[str, Any] = {"student": (8, 384), "teacher": (2, 128), "vocab": 4096, "positions": 256}
QUICK: dict[str, Any] = {"student": (4, 128), "teacher": (2, 128), "vocab": 512, "positions": 64}

Runs = dict[str, dict[str, list[dict[str, Any]]]]


def measure(sizes: Mapping[str, Any], *, rounds: int, folder: Path) -> Runs:
    """Ties -> contender -> reports, one for each round."""
    runner = Runner(trl_python=sys.executable, environment={})
    cells = {"tied" if tied else "untied": Cell(**sizes, tied=tied) for tied in (False, True)}
    for name, cell in cells.items():
        make_models(cell, folder / name)
    runs: Runs = {name: {contender: [] for contender in LABELS} for name in cells}
    for turn in range(rounds):
        for name, cell in cells.items():
            for contender in LABELS:
                print(f"{name}, {LABELS[contender]}, round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
                job = Job(cell=cell, contender=contender, models=str(folder / name))
                runs[name][contender].append(runner.alone(job, threads=1))
    return runs


def judge(runs: Runs, /, *, counts: bool) -> list[dict[str, str]]:
    """Medians over rounds of the ratio within a round. Without `counts` (a small cell) nothing is judged."""
    bars = []
    for name, found in runs.items():
        ratio = ratios(found, BOTH, "cpu_s")
        verdict = ("passed" if ratio <= TIME else "MISSED") if counts else "not judged"
        text = f"CPU time, {name}, {LABELS[BOTH]} / {LABELS[ALL]}"
        bars.append({"text": text, "found": f"{ratio:.3f}", "must": f"<= {TIME}", "verdict": verdict})
    return bars


def ratios(found: Mapping[str, list[dict[str, Any]]], contender: str, field: str) -> float:
    """The median over rounds of a figure to that with nothing frozen."""
    return median(run[field] / base[field] for run, base in zip(found[contender], found[ALL], strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small cell, one round; nothing is judged")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(sizes, rounds=1 if options.quick else options.rounds, folder=Path(folder))
    bars = judge(runs, counts=not options.quick)
    print(f"\n{Cell(**sizes).name.replace(' (tied)', '')}, one thread\n")
    print(f"{'frozen':40} {'CPU-s/step':>10} {'ratio':>7} {'optimizer MB':>13} {'ratio':>7}")
    for name, found in runs.items():
        for contender, label in LABELS.items():
            cpu, size = (median(run[field] for run in found[contender]) for field in ("cpu_s", "optimizer_bytes"))
            time, share = (ratios(found, contender, field) for field in ("cpu_s", "optimizer_bytes"))
            print(f"{f'{name}: {label}':40} {cpu:10.2f} {time:7.3f} {size / 1e6:13.1f} {share:7.3f}")
    for bar in bars:
        print(f"{bar['text']:66} {bar['found']:>8}  must {bar['must']:>8}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in environment().items()))
    if options.json:
        report = {"environment": environment(), "cell": asdict(Cell(**sizes)), "runs": runs, "bars": bars}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
