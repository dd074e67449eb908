"""The whole online step against TRL's off-policy GKD step, and its weak scaling from one rank to two, in one run.

python tools/bench/step.py [--trl-python PATH] [--rounds N] [--quick] [--untied] [--huge-pages] [--json FILE]

Every measurement is a process of its own; the contenders take turns. Exit status 1: a bar was missed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step_cell import Cell, Job, make_models
from step_run import Runner, packages

NAMED = Cell()
QUICK = Cell(student=(2, 64), teacher=(2, 128), vocab=4096, positions=64, micro_batch=2)
LABELS = {
    "ours": "largekd, ZeRO-3",
    "ours_compiled": "largekd, ZeRO-3, compiled rows",
    "trl": "TRL GKD, weights in the cell's dtype",
    "trl_autocast": "TRL GKD, fp32 weights, autocast",
}
SPEED, MEMORY, SCALING = 1.5, 0.5, 0.85
# In bf16 both models are other models: their weights are rounded.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
# Share of a core that an independent process must get for its round's wall time to be judged.
IDLE_SHARE = 0.9


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="a small cell, one round; only the losses are judged")
    parser.add_argument("--untied", action="store_true", help="models with a head apart from the embedding")
    parser.add_argument("--huge-pages", action="store_true", help="every contender's large tensors on huge pages")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    cell = replace(QUICK if options.quick else NAMED, tied=not options.untied)
    rounds = 1 if options.quick else options.rounds
    found = packages(options.trl_python, ("trl", "transformers", "torch"))
    runner = Runner(
        trl_python=options.trl_python, environment={"THP_MEM_ALLOC_ENABLE": "1"} if options.huge_pages else {}
    )
    report: dict[str, Any] = {"environment": environment(found) | {"huge pages": str(options.huge_pages)}}
    with models_of(cell) as folder:
        report["named"] = run_cell(runner, cell, folder, rounds=rounds, trl=_has_trl(found), full=not options.quick)
        report["scaling"] = run_scaling(runner, cell, folder, rounds=rounds)
    exact = replace(cell, dtype="fp32")
    with models_of(exact) as folder:
        report["exact"] = run_cell(runner, exact, folder, rounds=1, trl=_has_trl(found), full=False)
    report["bars"] = judge(report, speed=not options.quick)
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in report["bars"]))


@contextmanager
def models_of(cell: Cell, /) -> Iterator[str]:
    """A folder with the cell's two models, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="largekd-bench-") as folder:
        make_models(cell, Path(folder))
        yield folder


def run_cell(runner: Runner, cell: Cell, folder: str, /, *, rounds: int, trl: bool, full: bool) -> dict[str, Any]:
    """Interleaved rounds at one thread; with `full` also a round at two threads and of the variants of each side."""
    names = [name for name in ("ours", "trl") if trl or name == "ours"]
    results: dict[str, Any] = {"cell": asdict(cell), "one_thread": {}, "two_threads": {}}
    plan = [("one_thread", 1, turn, name) for turn in range(rounds) for name in names]
    if full:
        variants = ["ours_compiled", *(["trl_autocast"] if trl else [])]
        plan += [("one_thread", 1, 0, name) for name in variants] + [("two_threads", 2, 0, name) for name in names]
    for key, threads, turn, name in plan:
        _say(f"{cell.name}: {LABELS[name]}, {threads} thread(s), round {turn + 1}")
        job = Job(cell=cell, contender=name, models=folder)
        results[key].setdefault(name, []).append(runner.alone(job, threads=threads))
    return results


def run_scaling(runner: Runner, cell: Cell, folder: str, /, *, rounds: int) -> list[dict[str, Any]]:
    """Per round: two ranks of one job, and two one-rank jobs at the same time, each process with one thread."""
    job, results = Job(cell=cell, contender="ours", models=folder), []
    for turn in range(rounds):
        _say(f"weak scaling, round {turn + 1}")
        ranks, alone = runner.ranks(job, world_size=2), runner.independent(job, processes=2)
        results.append({"ranks": _pair(ranks), "independent": _pair(alone)})
    return results


def _pair(reports: list[dict[str, Any]], /) -> dict[str, float]:
    return {
        "tokens_per_s": sum(report["tokens_per_s"] for report in reports),
        "cpu_s": sum(report["cpu_s"] for report in reports),
        "share": sum(report["cpu_s"] / report["wall_s"] for report in reports) / len(reports),
        "peak_bytes": max(report["peak_bytes"] for report in reports),
    }


def judge(report: dict[str, Any], /, *, speed: bool) -> list[dict[str, str]]:
    """One record per bar. Without `speed` (a small cell) only the losses are judged."""
    bars = []
    exact = report["exact"]["one_thread"]
    reference = exact["trl"][0]["losses"] if "trl" in exact else None
    for dtype, runs in (("fp32", exact), ("bf16", report["named"]["one_thread"])):
        error = None if reference is None else loss_error(runs["ours"][0]["losses"], reference)
        bars.append(_bar("P5", f"losses in {dtype} against TRL's in fp32", error, most=LOSS_TOLERANCE[dtype]))
    runs = report["named"]["one_thread"]
    rates = _ratio(runs, "tokens_per_cpu_s")
    bars.append(_bar("P5", "tokens per CPU-second, ours / TRL", rates, least=SPEED, counts=speed))
    bars.append(_bar("P5", "peak memory, ours / TRL", _ratio(runs, "peak_bytes"), most=MEMORY, counts=speed))
    scaling = report["scaling"]
    # Two processes that do not get a core each measure the scheduler.
    idle = [turn for turn in scaling if turn["independent"]["share"] >= IDLE_SHARE]
    wall = _median(turn["ranks"]["tokens_per_s"] / turn["independent"]["tokens_per_s"] for turn in idle or scaling)
    cpu = _median(turn["independent"]["cpu_s"] / turn["ranks"]["cpu_s"] for turn in scaling)
    bars.append(_bar("P10", "weak scaling 1 -> 2 ranks, CPU time", cpu, least=SCALING, counts=speed))
    bars.append(_bar("P10", "weak scaling 1 -> 2 ranks, wall time", wall, least=SCALING, counts=speed and bool(idle)))
    return bars


def loss_error(losses: list[float], reference: list[float], /) -> float:
    """The largest relative difference over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def _ratio(runs: dict[str, Any], field: str, /) -> float | None:
    """Median over rounds of the ratio within a round, so that a slow moment of the machine hits both sides."""
    if "trl" not in runs:
        return None
    return _median(a[field] / b[field] for a, b in zip(runs["ours"], runs["trl"], strict=True))


def _bar(
    bar: str,
    text: str,
    found: float | None,
    /,
    *,
    most: float | None = None,
    least: float | None = None,
    counts: bool = True,
) -> dict[str, str]:
    limit = most if most is not None else least
    assert limit is not None
    record = {"bar": bar, "text": text, "must": f"{'<=' if most is not None else '>='} {limit:g}"}
    if found is None:
        return record | {"found": "-", "verdict": "not measured"}
    reached = found <= limit if most is not None else found >= limit
    return record | {
        "found": f"{found:.3g}",
        "verdict": ("passed" if reached else "MISSED") if counts else "not judged",
    }


def table(results: dict[str, Any], /) -> str:
    """One line per contender: medians, and ratios to the first."""
    one, two = results["one_thread"], results["two_threads"]
    lines = [
        f"{'':38} {'CPU-s/step':>10} {'tokens/CPU-s':>13} {'ratio':>7} {'tokens/s (2)':>13} {'peak MB':>9} {'ratio':>7}"
    ]
    ours = {field: _median(run[field] for run in one["ours"]) for field in ("tokens_per_cpu_s", "peak_bytes")}
    for name, label in LABELS.items():
        if name not in one:
            lines.append(f"{label:38} {'not installed or not run' if name.startswith('trl') else 'not run'}")
            continue
        cpu, rate, peak = (
            _median(run[field] for run in one[name]) for field in ("cpu_s", "tokens_per_cpu_s", "peak_bytes")
        )
        wall = f"{_median(run['tokens_per_s'] for run in two[name]):13.0f}" if name in two else f"{'-':>13}"
        ratios = rate / ours["tokens_per_cpu_s"], peak / ours["peak_bytes"]
        lines.append(
            f"{label:38} {cpu:10.2f} {rate:13.0f} {ratios[0]:6.2f}x {wall} {peak / 1e6:9.0f} {ratios[1]:6.2f}x"
        )
    return "\n".join(lines)


def print_report(report: dict[str, Any], /) -> None:
    """Tables, bars, environment."""
    for key in ("named", "exact"):
        cell = report[key]["cell"]
        print(f"\n{Cell(**cell).name}\n{table(report[key])}")
        for name, runs in report[key]["one_thread"].items():
            print(f"  losses, {LABELS[name]}: " + " ".join(f"{loss:.5f}" for loss in runs[0]["losses"]))
    print("\nWeak scaling, one thread per process: tokens/s together, CPU-s per step together, share of a core")
    for turn, pair in enumerate(report["scaling"]):
        for key, text in (("ranks", "two ranks"), ("independent", "two independent processes")):
            run = pair[key]
            print(
                f"  round {turn + 1}, {text:26} {run['tokens_per_s']:8.0f} tokens/s {run['cpu_s']:7.2f} CPU-s "
                f"{run['share']:5.2f}   {run['peak_bytes'] / 1e6:6.0f} MB the larger"
            )
    print()
    for bar in report["bars"]:
        print(f"{bar['bar']:4} {bar['text']:46} {bar['found']:>9}  must {bar['must']:>9}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))


def environment(trl: dict[str, str], /) -> dict[str, str]:
    """Hardware and versions that the figures belong to."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = {"cpu": models[0].split(":")[1].strip() if models else platform.processor(), "cores": str(os.cpu_count())}
    found |= packages(sys.executable, ("torch", "transformers", "deepspeed"))
    return found | {f"TRL's {name}" if name != "trl" else name: version for name, version in trl.items()}


def _has_trl(found: dict[str, str], /) -> bool:
    return found["trl"] != "not installed"


def _median(values: Iterable[float], /) -> float:
    return statistics.median(values)


def _say(text: str, /) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
