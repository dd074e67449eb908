"""Compare objectives on one recipe: every variant with every seed, one row of figures per finished run.

    python tools/ablation.py                                  all variants, seeds 0 to 2, two ranks
    python tools/ablation.py --variants ce_only,jsd --seeds 0 --name short train.max_steps=4
    python tools/ablation.py --table

Rows are appended to runs/ablation/NAME/rows.jsonl. Start the same command again to go on: runs that have a row are
skipped, one that was cut short is resumed from its checkpoint or starts over. Checkpoints and exports are deleted when
the row is written. Exit status: 0 all rows are there, 1 a run failed, 2 an error to mend.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from largekd.config.load import load_config
from largekd.config.render import config_differences, render_config
from largekd.config.run import RunConfig
from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.files import atomic_write, read_json

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "ablation"
ROWS = "rows.jsonl"

# Eight steps of the quick start see about 15,000 label tokens; its five steps of warm-up would be most of them.
COMMON = (
    "train.max_steps=8",
    "optim.warmup_steps=2",
    "checkpoint.every_steps=0",
    "eval.before=false",
    "log.every_steps=1",
    "log.health_every_steps=0",
    "log.tensorboard=false",
    "log.progress=false",
)
CAVEAT = "So few tokens rank early learning only: a longer run may order the objectives differently."
FORWARD_KL = 'objective.divergences=[{"name": "forward_kl"}]'
HIDDEN = (
    'objective.features=[{"name": "hidden", "loss": "cosine", "projector": {"kind": "linear"}, '
    '"layers": {"map": "uniform", "count": 4}}]'
)
ATTENTION = 'objective.attention=[{"name": "attention", "loss": "kl", "layers": {"map": "uniform", "count": 4}}]'


@dataclass(frozen=True)
class Variant:
    """An objective: its name in the table, and the keys that make it."""

    name: str
    overrides: tuple[str, ...]


VARIANTS = (
    Variant("ce_only", ("objective.alpha=0",)),
    Variant("forward_kl", (FORWARD_KL,)),
    Variant("reverse_kl", ('objective.divergences=[{"name": "reverse_kl"}]',)),
    Variant("jsd", ('objective.divergences=[{"name": "jsd", "mix": 0.5}]',)),
    Variant("skewed_forward_kl", ('objective.divergences=[{"name": "skewed_forward_kl", "skew": 0.1}]',)),
    Variant("skewed_reverse_kl", ('objective.divergences=[{"name": "skewed_reverse_kl", "skew": 0.1}]',)),
    Variant("adaptive_kl", ('objective.divergences=[{"name": "adaptive_kl", "head_mass": 0.5}]',)),
    Variant("forward_kl+hidden", (FORWARD_KL, HIDDEN)),
    Variant("forward_kl+attention", (FORWARD_KL, ATTENTION)),
    Variant("forward_kl+both", (FORWARD_KL, HIDDEN, ATTENTION)),
)


@dataclass(frozen=True)
class Run:
    """One cell of the comparison: its variant and seed, its folder, and all keys that differ from the base recipe."""

    variant: str
    seed: int
    folder: Path
    base: str
    overrides: tuple[str, ...]
    ranks: int

    @property
    def key(self) -> dict[str, Any]:
        """What a row must agree in to be this run's."""
        return {"base": self.base, "ranks": self.ranks, "overrides": list(self.overrides)}

    def config(self) -> RunConfig:
        """The resolved configuration. Errors: ConfigError."""
        config = load_config(ROOT / self.base, overrides=[*self.overrides, f"run.dir={json.dumps(str(self.folder))}"])
        if config.data.eval is None:
            raise ConfigError(f"{self.base}: data.eval is null, and held-out text is what objectives are compared on.")
        return config


# (recipe, ranks, log file) -> exit status
Runner = Callable[[Path, int, Path], int]


def main(argv: list[str]) -> int:
    """Read the command line, do the runs that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(variant.name for variant in VARIANTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, before a variant's own keys")
    parser.add_argument(
        "--base", default="recipes/quickstart.yaml", metavar="FILE", help="recipe (default: %(default)s)"
    )
    parser.add_argument("--name", metavar="NAME", help="folder below runs/ablation; the recipe's name if not given")
    parser.add_argument("--variants", default=names, metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="values of train.seed (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of a run (default: 2)")
    parser.add_argument("--table", action="store_true", help="print the table of the rows so far, and run nothing")
    given = parser.parse_intermixed_args(argv)
    folder = RUNS / (given.name or Path(given.base).stem)
    try:
        if given.table:
            sys.stdout.write(table(read_rows(folder / ROWS)) + "\n")
            return 0
        # A stop of this tool stops the launcher that it waits for.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        runs = plan(
            folder,
            base=given.base,
            variants=_variants(given.variants),
            seeds=seeds_of(given.seeds),
            ranks=given.ranks,
            overrides=given.overrides,
        )
        failed = run_all(runs, folder=folder, runner=launch)
        sys.stdout.write(table(read_rows(folder / ROWS)) + "\n")
    except LargeKDError as error:
        sys.stderr.write(f"ablation: {error}\n")
        return 2
    return 1 if failed else 0


def _variants(text: str) -> list[Variant]:
    known = {variant.name: variant for variant in VARIANTS}
    names = text.split(",")
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"--variants: there is no {unknown!r}; known are {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)]


def seeds_of(text: str) -> list[int]:
    """The seeds of a comma-separated list. Errors: ConfigError."""
    wrong = next((seed for seed in text.split(",") if not seed.isdecimal()), None)
    if wrong is not None:
        raise ConfigError(f"--seeds: {wrong!r} is not a whole number.")
    return [int(seed) for seed in text.split(",")]


def plan(
    folder: Path,
    *,
    base: str,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    ranks: int,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """The runs in their order: all variants with the first seed, then with the next. Errors: ConfigError."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1.")
    runs = [
        Run(
            variant=variant.name,
            seed=seed,
            folder=folder / f"{variant.name}-seed{seed}",
            base=base,
            overrides=(*COMMON, *overrides, *variant.overrides, f"train.seed={seed}"),
            ranks=ranks,
        )
        for seed in dict.fromkeys(seeds)
        for variant in variants
    ]
    for run in runs:
        run.config()
    return runs


def run_all(
    runs: Sequence[Run],
    *,
    folder: Path,
    runner: Runner,
    extra: Callable[[Run], Mapping[str, Any]] = lambda run: {},
) -> list[Run]:
    """Do the runs that have no row yet and append their rows, with what `extra` adds; the runs that failed.

    Errors: ConfigError when rows are of other settings, or when another process works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    try:
        with FileLock(folder / ".lock", timeout=0):
            pending = _without_rows(runs, rows=read_rows(folder / ROWS))
            for number, run in enumerate(pending, start=1):
                _say(f"run {number} of {len(pending)}: {run.variant}, seed {run.seed}")
                if not is_finished(run) and not _do(run, runner=runner):
                    failed.append(run)
                    continue
                append_row(folder / ROWS, row={**row_of(run), **extra(run)})
                discard_weights(run)
    except Timeout as error:
        raise ConfigError(
            f"{folder}: another ablation is at work here; wait for it or choose another --name."
        ) from error
    return failed


def _without_rows(runs: Sequence[Run], *, rows: Iterable[Mapping[str, Any]]) -> list[Run]:
    found = {(row["variant"], row["seed"]): row for row in rows}
    pending = []
    for run in runs:
        row = found.get((run.variant, run.seed))
        if row is None:
            pending.append(run)
            continue
        differing = [name for name, value in run.key.items() if row[name] != value]
        if differing:
            raise ConfigError(
                f"{run.folder.parent / ROWS} has {run.variant}, seed {run.seed}, with other {' and '.join(differing)}: "
                f"{row[differing[0]]} there, {run.key[differing[0]]} now. Choose another --name, or delete that row."
            )
        # A stop between the row and the tidying up leaves them.
        discard_weights(run)
    return pending


def _do(run: Run, *, runner: Runner) -> bool:
    """Start or resume the run; whether it finished."""
    config = run.config()
    if run.folder.exists() and not _can_go_on(run, config=config):
        shutil.rmtree(run.folder)
    recipe, log = (run.folder.with_name(f"{run.folder.name}.{ending}") for ending in ("yaml", "log"))
    # A file needs no quoting on the way through the launcher, which overrides with spaces would.
    atomic_write(recipe, data=render_config(config).encode())
    status = runner(recipe, run.ranks, log)
    if is_finished(run):
        return True
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:] if log.exists() else []
    _say("\n  ".join([f"{run.variant}, seed {run.seed}: not finished (exit status {status}); see {log}", *last]))
    return False


def _can_go_on(run: Run, *, config: RunConfig) -> bool:
    """Whether what lies in the run's folder is the beginning of this very run."""
    try:
        earlier = load_config(run.folder / "config.yaml")
        ranks = read_json(run.folder / "environment.json")["ranks"]
    except (LargeKDError, OSError, ValueError, KeyError):
        return False
    return ranks == run.ranks and not config_differences(earlier, config, may_differ=())


def is_finished(run: Run) -> bool:
    """Whether the folder holds this run's end: its marker, its summary, and the configuration that is wanted."""
    ends = [(run.folder / name).is_file() for name in ("DONE", "summary.json")]
    return all(ends) and _can_go_on(run, config=run.config())


def launch(recipe: Path, ranks: int, log: Path, *, script: str = "train") -> int:
    """Run launch/<script>.py on as many ranks; its output goes to the log. Returns the exit status."""
    launched = str(ROOT / "launch" / f"{script}.py")
    command = [sys.executable, launched]
    if ranks > 1:
        beside = Path(sys.executable).with_name("deepspeed")
        command = [str(beside) if beside.exists() else "deepspeed", "--master_port", str(free_port())]
        command += ["--log_level", "error", "--num_accelerators", str(ranks), launched]
    environment = dict(os.environ)
    if environment.get("DS_ACCELERATOR") == "cpu":
        # More threads than cores per rank slow all ranks down.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    with log.open("ab") as output:
        finished = subprocess.run(
            [*command, "--config", str(recipe)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return finished.returncode


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def row_of(run: Run) -> dict[str, Any]:
    """The figures of a finished run, from the files that it left. Errors: ConfigError when they lack some."""
    summary, environment = (read_json(run.folder / name) for name in ("summary.json", "environment.json"))
    steps = _records(run.folder / "metrics.jsonl")
    evaluations = _records(run.folder / "evaluation.jsonl")
    after = next((record for record in reversed(evaluations) if record["step"] == summary["steps"]), None)
    if after is None or not steps:
        raise ConfigError(
            f"{run.folder}: no final evaluation or no records of steps; delete the folder to run it again."
        )
    return {
        "variant": run.variant,
        "seed": run.seed,
        "perplexity": summary["eval"]["after"]["perplexity"],
        "kl": summary["eval"]["after"]["kl"],
        "top1_agreement": after["eval/top1_agreement"],
        "tokens": summary["tokens"],
        "skipped_steps": summary["skipped_steps"],
        "step_s": statistics.median(record["perf/step_s"] for record in steps),
        "peak_rss_bytes": max(summary["peak_rss_bytes"]),
        **run.key,
        "versions": environment["packages"],
    }


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; none when there is no file. Errors: ConfigError for a line that is no row."""
    try:
        return _records(path)
    except ValueError as error:
        raise ConfigError(f"{path}: a line is not JSON ({error}); delete that line.") from error


def append_row(path: Path, *, row: Mapping[str, Any]) -> None:
    """Add one line; a crash leaves the file with it or without it, never with a part."""
    before = path.read_bytes() if path.exists() else b""
    atomic_write(path, data=before + json.dumps(row).encode() + b"\n")


def discard_weights(run: Run) -> None:
    """Delete the run's checkpoints and export, which take far more room than its figures."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(run.folder / name, ignore_errors=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± sample standard deviation over the seeds of each variant."""
    if not rows:
        return "no rows yet"
    order = {variant.name: place for place, variant in enumerate(VARIANTS)}
    names = sorted(dict.fromkeys(row["variant"] for row in rows), key=lambda name: order.get(name, len(order)))
    lines = [
        "| objective | seeds | perplexity | KL(teacher‖student) | top-1 agreement, % | s per step | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        cells = [
            _spread([row["perplexity"] for row in own], form=".2f"),
            _spread([row["kl"] for row in own], form=".4f"),
            _spread([_times(row["top1_agreement"], 100) for row in own], form=".2f"),
            _spread([row["step_s"] for row in own], form=".2f"),
            _spread([row["peak_rss_bytes"] / 1e9 for row in own], form=".2f"),
        ]
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    tokens = [row["tokens"] for row in rows]
    seen = f"{min(tokens):,}" if min(tokens) == max(tokens) else f"{min(tokens):,} to {max(tokens):,}"
    return "\n".join([*lines, "", f"Each run saw {seen} training tokens. {CAVEAT}"])


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _spread(values: Sequence[float | None], *, form: str) -> str:
    """`mean ± deviation`, the mean alone for one value; a figure that was not finite makes the whole so."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "not finite"
    mean = f"{statistics.fmean(finite):,{form}}"
    return f"{mean} ± {statistics.stdev(finite):,{form}}" if len(finite) > 1 else mean


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("ablation: stopped; the same command goes on") from None
