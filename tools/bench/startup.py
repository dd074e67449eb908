"""What starting costs: --help, --dry-run, and the way to the first optimizer step of a tiny two-rank run.

python tools/bench/startup.py [--trl-python PATH] [--rounds N] [--json FILE]

Every measurement is a process of its own; the contenders take turns. Exit status 1: a bar was missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tools")]

from make_tiny_model import Shape, make_model, make_text  # noqa: E402
from startup_first import FIRST_STEP, STARTED  # noqa: E402
from step_run import free_port, packages  # noqa: E402

HELP_CPU_S, DRY_RUN_CPU_S, FIRST_STEP_RATIO = 0.6, 1.0, 0.5
RANKS = 2
LABELS = {
    "ours": "largekd, ZeRO-3",
    "trl_zero3": "TRL GKD, ZeRO-3",
    "trl": "TRL GKD, plain data parallel",
}
# What every contender that runs a Hugging Face model has to import.
FLOOR = "import torch; from transformers import LlamaForCausalLM"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    found = packages(options.trl_python, ("trl", "deepspeed", "torch", "transformers"))
    names = ["ours"]
    if found["trl"] != "not installed":
        names += ["trl", *(["trl_zero3"] if found["deepspeed"] != "not installed" else [])]
    report: dict[str, Any] = {"environment": {f"TRL's {name}": version for name, version in found.items()}}
    with tempfile.TemporaryDirectory(prefix="largekd-bench-") as folder:
        recipe = make_recipe(Path(folder))
        train, rounds = str(ROOT / "launch" / "train.py"), range(options.rounds)
        plan = [train, "--config", str(recipe), "--dry-run", "--world-size", str(RANKS)]
        report["help"] = [command([train, "--help"], must_print="train.micro_batch_size") for _ in rounds]
        report["dry_run"] = [command(plan, must_print="micro_batch_size") for _ in rounds]
        report["floor"] = [command(["-c", FLOOR], must_print="") for _ in rounds]
        report["first_step"] = {name: [] for name in names}
        for turn in range(options.rounds):
            for name in names:
                _say(f"first step: {LABELS[name]}, round {turn + 1}")
                python = sys.executable if name == "ours" else options.trl_python
                report["first_step"][name].append(first_step(name, recipe, python=python, turn=turn))
    report["bars"] = judge(report)
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(bar["verdict"] == "MISSED" for bar in report["bars"]))


def make_recipe(folder: Path, /) -> Path:
    """A recipe for models of four and two layers and conversations, all of it written to `folder`."""
    make_model(folder / "teacher", shape=Shape(layers=4), seed=0)
    make_model(folder / "student", shape=Shape(layers=2), seed=1)
    with (folder / "train.jsonl").open("w") as file:
        for record in make_text(samples=200, seed=1):
            question, answer = record["text"].split("\n\n")
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    placement = str(ROOT / "ds_configs" / "zero3_tiny.json")
    tree = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"model": str(folder / "teacher"), "deepspeed": placement},
        "student": {"model": str(folder / "student"), "deepspeed": placement},
        "data": {"train": str(folder / "train.jsonl")},
        "train": {
            "max_steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 128,
            "precision": "fp32",
        },
        "optim": {"lr": 1e-4},
        "objective": {"alpha": 1.0, "divergences": [{"name": "forward_kl"}]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"


def command(arguments: list[str], /, *, must_print: str) -> dict[str, float]:
    """CPU- and wall-seconds of this interpreter with these arguments, its children included."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode != 0 or must_print not in text:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}:\n{text[-3000:]}")
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.perf_counter() - started}


def first_step(name: str, recipe: Path, /, *, python: str, turn: int) -> dict[str, float]:
    """CPU-seconds of all ranks together and wall-seconds of the slower, up to the end of the first step."""
    port, processes = free_port(), []
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        variables = {key: str(value) for key, value in (place | {"MASTER_PORT": port}).items()}
        # A folder of its own for every run: nobody finds data that was prepared before.
        variables |= {"MASTER_ADDR": "127.0.0.1", "HF_DATASETS_CACHE": str(recipe.parent / f"cache-{name}-{turn}")}
        variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", STARTED: str(time.time())}
        processes.append(
            subprocess.Popen(
                [python, str(HERE / "startup_first.py"), name, str(_own_run(recipe, name=name, turn=turn))],
                env={**os.environ, **variables, **_own_extensions(python)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    reports = [_report(process, name=name) for process in processes]
    return {
        "cpu_s": sum(report["cpu_s"] for report in reports),
        "wall_s": max(report["wall_s"] for report in reports),
    }


def _own_extensions(python: str, /) -> dict[str, str]:
    """DeepSpeed's compiled helpers beside another interpreter: two environments in one folder compile at each start."""
    if python == sys.executable:
        return {}
    return {"TORCH_EXTENSIONS_DIR": str(Path(python).parent.parent / "torch_extensions")}


def _own_run(recipe: Path, /, *, name: str, turn: int) -> Path:
    """The recipe with a run folder that nobody has used."""
    tree = json.loads(recipe.read_text())
    tree["run"]["dir"] = f"{tree['run']['dir']}-{name}-{turn}"
    own = recipe.with_name(f"recipe-{name}-{turn}.yaml")
    own.write_text(json.dumps(tree))
    return own


def _report(process: "subprocess.Popen[str]", /, *, name: str) -> dict[str, float]:
    output, _ = process.communicate(timeout=600)
    found = [line for line in output.splitlines() if line.startswith(FIRST_STEP)]
    if process.returncode != 0 or not found:
        raise SystemExit(f"{LABELS[name]} ended with {process.returncode}:\n{output[-3000:]}")
    return json.loads(found[0].removeprefix(FIRST_STEP))


def judge(report: dict[str, Any], /) -> list[dict[str, str]]:
    """One record per bar; ratios are medians over the rounds."""
    runs = report["first_step"]
    bars = [
        _bar("--help, CPU-s", _median(run["cpu_s"] for run in report["help"]), HELP_CPU_S),
        _bar("--dry-run, CPU-s", _median(run["cpu_s"] for run in report["dry_run"]), DRY_RUN_CPU_S),
    ]
    for other in ("trl_zero3", "trl"):
        ratio = None
        if other in runs:
            ratio = _median(a["cpu_s"] / b["cpu_s"] for a, b in zip(runs["ours"], runs[other], strict=True))
        bars.append(_bar(f"CPU-s to the first step, ours / {LABELS[other]}", ratio, FIRST_STEP_RATIO))
    return bars


def _bar(text: str, found: float | None, limit: float, /) -> dict[str, str]:
    record = {"bar": "P11", "text": text, "must": f"<= {limit:g}"}
    if found is None:
        return record | {"found": "-", "verdict": "not measured"}
    return record | {"found": f"{found:.3g}", "verdict": "passed" if found <= limit else "MISSED"}


def print_report(report: dict[str, Any], /) -> None:
    """Medians, bars, versions."""
    rows = [("--help", report["help"]), ("--dry-run", report["dry_run"])]
    rows += [("importing torch and one model of transformers", report["floor"])]
    rows += [(f"first step, {RANKS} ranks: {LABELS[name]}", report["first_step"].get(name)) for name in LABELS]
    print(f"{'':50} {'CPU-s':>7} {'wall-s':>7}")
    for text, runs in rows:
        if runs is None:
            print(f"{text:50} not installed")
            continue
        cpu, wall = (_median(run[field] for run in runs) for field in ("cpu_s", "wall_s"))
        print(f"{text:50} {cpu:7.2f} {wall:7.2f}")
    print()
    for bar in report["bars"]:
        print(f"{bar['bar']} {bar['text']:62} {bar['found']:>7}  must {bar['must']:>7}  {bar['verdict']}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))


def _median(values: Iterable[float], /) -> float:
    return statistics.median(values)


def _say(text: str, /) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
