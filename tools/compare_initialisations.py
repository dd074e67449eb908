"""Compare first weights of students of the quick start's teacher: KL before training, and after the same few steps.

    python tools/compare_initialisations.py                              both shapes, all methods, seeds 0 to 2
    python tools/compare_initialisations.py --shapes width --methods random,truncate --seeds 0
    python tools/compare_initialisations.py --table

Two shapes: `depth` has 10 of the teacher's 30 layers, `width` two thirds of its hidden units, neurons and heads. Every
run trains in one process on the same rows of 4 x 128 tokens. Rows are appended to runs/initialisations/NAME/rows.jsonl,
and their means are kept in means.json beside them; the same command goes on where it stopped. Exit status: 0 all rows
are there, 1 a run failed, 2 an error to mend.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation import COMMON, Run, Variant, launch, plan, read_rows, run_all, seeds_of

from largekd.errors import ConfigError, LargeKDError
from largekd.runtime.files import atomic_write, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "initialisations"
ROWS, MEANS = "rows.jsonl", "means.json"
BASE = "recipes/quickstart.yaml"
TEACHER = ROOT / "assets/smollm2-135m-instruct"

SHAPES: Mapping[str, Mapping[str, int]] = {
    "depth": {"num_hidden_layers": 10},
    "width": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2},
}
METHODS: Mapping[str, Mapping[str, Mapping[str, Any] | None]] = {
    "depth": {
        "random": None,
        "uniform": {"layers": "uniform"},
        "first": {"layers": "first"},
        "first_last": {"layers": "first_last"},
        "block_influence": {"layers": "block_influence"},
    },
    "width": {
        "random": None,
        "truncate": {"width": "truncate"},
        "truncate_root_gain": {"width": "truncate", "gain": 0.5},
        "truncate_full_gain": {"width": "truncate", "gain": 1.0},
        "interpolate": {"width": "interpolate"},
        "interpolate_root_gain": {"width": "interpolate", "gain": 0.5},
        "interpolate_full_gain": {"width": "interpolate", "gain": 1.0},
        "importance": {"width": "importance"},
        "pca": {"width": "pca"},
    },
}
# The head of this one holds the final norm's weight, which a tied embedding must not have.
UNTIED = frozenset({"pca"})
SETTINGS = (
    *COMMON,
    "train.max_steps=30",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.sequence_length=128",
    "optim.warmup_steps=3",
    "eval.before=true",
    "eval.max_rows=12",
)


def main(argv: list[str]) -> int:
    """Read the command line, do the runs that are missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, before a method's own keys")
    parser.add_argument("--name", default="quickstart", metavar="NAME", help="folder below runs/initialisations")
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--methods", metavar="A,B", help="of those the shapes have; all of them if not given")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="values of train.seed (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows so far, and run nothing")
    given = parser.parse_intermixed_args(argv)
    folder = RUNS / given.name
    try:
        failed: Sequence[Run] = ()
        if not given.table:
            # A stop of this tool stops the process that it waits for.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            runs = plan(
                folder,
                base=BASE,
                variants=variants(given.shapes, methods=given.methods, folder=folder),
                seeds=seeds_of(given.seeds),
                ranks=1,
                overrides=[*SETTINGS, *given.overrides],
            )
            failed = run_all(runs, folder=folder, runner=launch, extra=kl_before)
        found = means(read_rows(folder / ROWS))
        if found:
            write_json(folder / MEANS, value=found)
        sys.stdout.write(table(found) + "\n")
    except LargeKDError as error:
        sys.stderr.write(f"compare_initialisations: {error}\n")
        return 2
    return 1 if failed else 0


def variants(shapes: str, *, methods: str | None, folder: Path) -> list[Variant]:
    """The methods of each shape, whose config.json is written into `folder`. Errors: ConfigError for unknown names."""
    chosen = shapes.split(",")
    unknown = next((name for name in chosen if name not in SHAPES), None)
    if unknown is not None:
        raise ConfigError(f"--shapes: there is no {unknown!r}; known are {', '.join(SHAPES)}.")
    known = {name for shape in chosen for name in METHODS[shape]}
    wanted = known if methods is None else set(methods.split(","))
    if wanted - known:
        raise ConfigError(f"--methods: there is no {min(wanted - known)!r}; known are {', '.join(sorted(known))}.")
    return [
        Variant(f"{shape}-{method}", tuple(_keys(shape, method=method, folder=folder)))
        for shape in chosen
        for method in METHODS[shape]
        if method in wanted
    ]


def _keys(shape: str, *, method: str, folder: Path) -> list[str]:
    """The overrides of one method; what it adds to the recipe's student is a shape and a rule."""
    path = _write_config(folder / f"{shape}{'-untied' if method in UNTIED else ''}.json", shape=shape, method=method)
    rule = METHODS[shape][method]
    return [
        "student.teacher_layers=null",
        f"student.config={json.dumps(str(path))}",
        f"student.initialise={json.dumps(rule)}",
    ]


def _write_config(path: Path, *, shape: str, method: str) -> Path:
    try:
        config = read_json(TEACHER / "config.json")
    except OSError as error:
        raise ConfigError(
            f"{TEACHER}: no config.json; `python tools/fetch_assets.py {TEACHER.name}` brings it."
        ) from error
    # The width of a head is the teacher's whatever the hidden size.
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config |= {"head_dim": head_dim, **SHAPES[shape]}
    if method in UNTIED:
        config["tie_word_embeddings"] = False
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data=json.dumps(config, indent=1).encode())
    return path


def kl_before(run: Run) -> dict[str, Any]:
    """The KL to the teacher before the first step, of a finished run."""
    return {"kl_before": read_json(run.folder / "summary.json")["eval"]["before"]["kl"]}


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each shape and method: mean and sample standard deviation over seeds, and whether every seed beats random."""
    found = []
    for shape, methods in METHODS.items():
        baseline = {row["seed"]: row["kl"] for row in rows if row["variant"] == f"{shape}-random"}
        for method in methods:
            own = [row for row in rows if row["variant"] == f"{shape}-{method}"]
            if not own:
                continue
            pairs = [(row["kl"], baseline[row["seed"]]) for row in own if row["seed"] in baseline]
            entry: dict[str, Any] = {"shape": shape, "method": method, "seeds": len(own), "pairs": len(pairs)}
            for key in ("kl_before", "kl", "perplexity", "top1_agreement"):
                values = [row[key] for row in own]
                entry[key] = statistics.mean(values)
                entry[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
            entry["beats_random"] = all(ours < theirs for ours, theirs in pairs) if pairs else None
            found.append(entry)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a table for each shape."""
    if not found:
        return "no rows yet"
    lines = []
    for shape in dict.fromkeys(entry["shape"] for entry in found):
        lines += [
            f"\n{shape}: {', '.join(f'{key} = {value}' for key, value in SHAPES[shape].items())}\n",
            f"({', '.join(sorted(UNTIED))}: embedding and head apart, in random tied)\n"
            if any(entry["method"] in UNTIED for entry in found if entry["shape"] == shape)
            else "",
            "| first weights | seeds | KL before | KL after | top-1 agreement after, % | better than random |",
            "|---|---|---|---|---|---|",
        ]
        for entry in (entry for entry in found if entry["shape"] == shape):
            better = {None: "–", True: "every seed", False: "no"}[entry["beats_random"]]
            if entry["method"] == "random":
                better = "–"
            lines.append(
                f"| {entry['method']} | {entry['seeds']} | {_figure(entry, 'kl_before')} | {_figure(entry, 'kl')} | "
                f"{_figure(entry, 'top1_agreement', times=100)} | {better} |"
            )
    return "\n".join(lines)


def _figure(entry: Mapping[str, Any], key: str, *, times: float = 1) -> str:
    deviation = entry[f"{key}_deviation"]
    spread = "" if deviation is None else f" ± {times * deviation:.3f}"
    return f"{times * entry[key]:.3f}{spread}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
