"""Memory, speed, growth and accuracy of the fused vocabulary pass against other implementations, in one run.

python tools/bench/fused_vocab.py [--quick] [--rounds N] [--divergence NAME] [--all-cells] [--json FILE]

Every measurement is a process of its own; the contenders take turns. Exit status 1: a bar was missed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from vocab_bars import judge, median  # noqa: E402
from vocab_cell import Cell, make_inputs, measure  # noqa: E402
from vocab_contenders import CONTENDERS, LABELS  # noqa: E402

NAMED = Cell(tokens=2048, vocab=131_072, hidden=1024)
QUICK = Cell(tokens=256, vocab=8192, hidden=128)
NEEDS = {"liger_256": "liger_kernel", "trl_chunked": "trl"}
REPORTED = ("ours", "ours_low_memory", "ours_compiled", "full_bf16", "liger_256", "matmul_floor")


def child(cell: Cell, name: str, /) -> dict[str, Any]:
    """One measurement of one contender in this process, after a few tokens to warm up libraries and compilation."""
    inputs = make_inputs(cell)
    warm = inputs.first(min(cell.tokens, 17))
    CONTENDERS[name](replace(cell, tokens=warm.labels_T.numel()), warm)
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None
    return measure(lambda: CONTENDERS[name](cell, inputs))


def child_accuracy(cell: Cell, names: tuple[str, ...], /) -> list[dict[str, object]]:
    from vocab_accuracy import accuracy

    return accuracy(cell, names=names)


def spawn(payload: dict[str, Any], /, *, threads: int) -> Any:
    """The JSON that a child process of this file prints last."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(payload)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{payload} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_cell(cell: Cell, names: Iterable[str], /, *, rounds: int) -> dict[str, Any]:
    """`rounds` interleaved measurements at one thread and one round at two; a list per contender."""
    results: dict[str, Any] = {"cell": asdict(cell), "one_thread": {}, "two_threads": {}}
    for key, threads, times in (("one_thread", 1, rounds), ("two_threads", 2, 1)):
        for turn in range(times):
            for name in names:
                _say(f"{cell.name}: {LABELS[name]}, {threads} thread(s), round {turn + 1}/{times}")
                results[key].setdefault(name, []).append(spawn({"cell": asdict(cell), "name": name}, threads=threads))
    return results


def run_growth(cell: Cell, /, *, tokens: tuple[int, int]) -> dict[str, float]:
    """Peak beyond the head's gradient at two numbers of tokens, and its slope in bytes per token."""
    head = cell.vocab * cell.hidden * cell.bytes_per_number
    peaks = []
    for count in tokens:
        _say(f"growth: {count} tokens")
        payload = {"cell": asdict(replace(cell, tokens=count)), "name": "ours"}
        peaks.append(spawn(payload, threads=1)["peak_bytes"] - head)
    slope = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
    limit = 2 * (cell.hidden + cell.hidden) * cell.bytes_per_number
    return {"low_bytes": peaks[0], "high_bytes": peaks[1], "slope": slope, "limit": limit}


def environment() -> dict[str, str]:
    """Hardware and versions that the figures belong to."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = {"cpu": models[0].split(":")[1].strip() if models else platform.processor(), "cores": str(os.cpu_count())}
    for package in ("torch", "transformers", "trl", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(results: dict[str, Any], /) -> str:
    """One line per contender: medians, and ratios to the first contender."""
    one, two = results["one_thread"], results["two_threads"]
    ours = {field: median(run[field] for run in one["ours"]) for field in ("cpu_s", "peak_bytes")}
    lines = [f"{'':40} {'CPU-s':>8} {'ratio':>7} {'wall-s (2)':>11} {'peak MB':>9} {'ratio':>7}"]
    for name, label in LABELS.items():
        if name not in one:
            absent = "not installed" if name in NEEDS and not _installed(name) else "not run"
            lines.append(f"{label:40} {absent}")
            continue
        cpu, peak = (median(run[field] for run in one[name]) for field in ("cpu_s", "peak_bytes"))
        wall = median(run["wall_s"] for run in two[name])
        ratios = cpu / ours["cpu_s"], peak / ours["peak_bytes"]
        lines.append(f"{label:40} {cpu:8.2f} {ratios[0]:6.2f}x {wall:11.2f} {peak / 1e6:9.1f} {ratios[1]:6.2f}x")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a small cell, one round; only the loss's accuracy is judged"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds on the named cell (default 3)")
    parser.add_argument("--divergence", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl")
    parser.add_argument("--all-cells", action="store_true", help="one round each of fp32 and of hidden 2,048 as well")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _run_child(json.loads(options.child))
    cell = replace(QUICK if options.quick else NAMED, divergence=options.divergence)
    names = [name for name in CONTENDERS if _installed(name)]
    gate = replace(cell, tokens=128 if options.quick else cell.tokens, vocab=8192 if options.quick else 16_384)
    _say("accuracy against float64")
    judged = ("ours", "ours_compiled")  # the settings whose speed is judged
    compared = tuple(name for name in ("ours_low_memory", "full_bf16", "liger_256") if name in names)
    report: dict[str, Any] = {"environment": environment(), "accuracy_cell": asdict(gate)}
    report["accuracy"] = spawn({"cell": asdict(gate), "accuracy": [*judged, *compared]}, threads=2)
    report["growth"] = run_growth(cell, tokens=(512, 2048 if options.quick else 8192))
    report["named"] = run_cell(cell, names, rounds=1 if options.quick else options.rounds)
    if options.all_cells:
        others = (replace(cell, dtype="fp32"), replace(cell, hidden=2 * cell.hidden))
        reported = [name for name in REPORTED if name in names]
        report["others"] = [run_cell(other, reported, rounds=1) for other in others]
    report["bars"] = judge(report, judged=judged, speed=not options.quick)
    _print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in report["bars"]))


def _run_child(payload: dict[str, Any], /) -> int:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cell = Cell(**payload["cell"])
    found = child_accuracy(cell, tuple(payload["accuracy"])) if "accuracy" in payload else child(cell, payload["name"])
    print(json.dumps(found))
    return 0


def _print_report(report: dict[str, Any], /) -> None:
    for results in [report["named"], *report.get("others", [])]:
        print(f"\n{Cell(**results['cell']).name}\n{table(results)}")
    print(
        f"\nRelative errors against float64 ({Cell(**report['accuracy_cell']).name}; largest over temperatures 1 and 2)"
    )
    for name in dict.fromkeys(record["contender"] for record in report["accuracy"]):
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            rows = [r for r in report["accuracy"] if (r["contender"], r["divergence"]) == (name, divergence)]
            loss, gradient = (max(row[field] for row in rows) for field in ("loss_error", "gradient_error"))
            label = LABELS.get(name, "float64 after rounding the logits (floor)")
            print(f"{label:40} {divergence:11} loss {loss:.1e}  gradient {gradient:.1e}")
    growth = report["growth"]
    print(f"\nGrowth beyond the head's gradient: {growth['slope']:.0f} bytes per token (limit {growth['limit']:.0f})\n")
    for bar in report["bars"]:
        print(f"{bar['bar']} {bar['text']:62} {bar['found']:>10}  must {bar['must']:>10}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))


def _installed(name: str, /) -> bool:
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


def _say(text: str, /) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
