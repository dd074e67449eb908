"""Share of problems that models solve, with confidence intervals, from generation jobs over the same problems.

    python tools/accuracy.py runs/reasoning_solved/before runs/reasoning_solved/distilled
    python tools/accuracy.py --json accuracies.json FOLDER ...

A FOLDER is output.dir of a finished launch/generate.py with one answer to each problem (sampling.samples=1, best at
sampling.temperature=0) and with the right answers. Answers are judged anew by the job's own `curation.verify`; one that
cannot be parsed, was cut off or failed counts as wrong. Intervals are Wilson's, of 95 %. Each model is compared with
the one before it on the same problems: how many only one of the two solved, and McNemar's exact two-sided p.
Exit status: 0 done, 2 an error to mend.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from curate import job_config

from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record
from largekd.curation.examination import examine_rows
from largekd.curation.ordering import OrderedAnswers
from largekd.curation.standard_examiner import StandardExaminer
from largekd.errors import ConfigError, DataError, LargeKDError
from largekd.runtime.files import write_json

CONFIDENCE = 0.95


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args(arguments)
    try:
        solved = {str(folder): solved_problems(folder) for folder in given.folders}
        figures = compare(solved)
    except LargeKDError as error:
        sys.stderr.write(f"accuracy: {error}\n")
        return 2
    sys.stdout.write(table(figures) + "\n")
    if given.json is not None:
        write_json(given.json, value=figures)
    return 0


def solved_problems(folder: Path) -> dict[str, bool]:
    """Whether each problem, by its id, was solved. Errors: ConfigError, DataError."""
    config = parse_record(GenerateConfig, mapping=job_config(folder)).curation
    if config.verify.kind in ("none", "majority"):
        raise ConfigError(f"{folder}: curation.verify.kind = {config.verify.kind!r} knows no right answers.")
    found: dict[str, bool] = {}
    with StandardExaminer(config) as examiner:
        for row in examine_rows(OrderedAnswers(folder, seed=0).rows(), examiner=examiner):
            (ask, written), (_, verdict) = row[0]
            if len(row) > 1:
                raise DataError(f"{folder}: problem {ask.item.id} has {len(row)} answers; set sampling.samples=1.")
            found[ask.item.id] = written.finish == "stop" and verdict.outcome == "right"
    if not found:
        raise DataError(f"{folder}: holds no answers; finish its job first.")
    return found


def compare(solved: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """Figures of each model, and against the one before it. Errors: DataError for unequal problems."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise ConfigError(f'{error}: install the extra, `pip install -e ".[factory]" -c constraints.txt`.') from error
    figures: list[dict[str, Any]] = []
    for name, own in solved.items():
        right = sum(own.values())
        interval = binomtest(right, len(own)).proportion_ci(CONFIDENCE, method="wilson")
        accuracy = {"accuracy": right / len(own), "low": float(interval.low), "high": float(interval.high)}
        figures.append({"model": name, "problems": len(own), "right": right, **accuracy})
    for ((former, theirs), (name, own)), figure in zip(pairwise(solved.items()), figures[1:], strict=True):
        if own.keys() != theirs.keys():
            raise DataError(f"{name} and {former}: not of the same problems; finish both jobs with the same source.")
        gained = sum(own[key] and not theirs[key] for key in own)
        lost = sum(theirs[key] and not own[key] for key in own)
        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        figure |= {"gained": gained, "lost": lost, "p": p}
    return figures


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| model | solved | accuracy | 95 % interval | gained / lost against the row above | p |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures:
        against = f"{figure['gained']} / {figure['lost']} | {figure['p']:.2g}" if "p" in figure else "– | –"
        lines.append(
            f"| {figure['model']} | {figure['right']} of {figure['problems']} | {figure['accuracy']:.1%} | "
            f"{figure['low']:.1%} to {figure['high']:.1%} | {against} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
