"""From raw answers to training data: parse, verify, filter, write. Cheap, and repeatable with other settings.

    summary = curate(folder, config=CurationConfig(…))

reads `raw/` of a job's folder and makes its folder `data/` anew, in one rename: `train.jsonl`, `eval.jsonl`, parquet
where it is asked for, `dropped.jsonl` with every answer that was not kept, the card `README.md`, `report.html` with its
picture, and `curation.json`. The same answers and settings give the same bytes.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from largekd.config.curation import CurationConfig
from largekd.curation.answer_shards import Answer
from largekd.curation.card import Split, write_card
from largekd.curation.dataset import json_line, records, without_target, write_parquet
from largekd.curation.examination import Examiner, examine_rows
from largekd.curation.filters import Filter, apply_filters
from largekd.curation.ordering import OrderedAnswers, canonical
from largekd.curation.records import Curated
from largekd.curation.report import REPORT_FILE, write_report
from largekd.curation.rules import build_filters, gate, rule_names
from largekd.curation.statistics import Statistics
from largekd.errors import ConfigError, DataError
from largekd.runtime.files import (
    TEMPORARY_PREFIX,
    fsync_path,
    read_json,
    remove_tree,
    swap_into_place,
    temporary_sibling,
    write_json,
)

logger = logging.getLogger(__name__)

DATA_FOLDER = "data"
JOB_FILE = "job.json"
SUMMARY_FILE = "curation.json"
TRAIN_FILE = "train.jsonl"
EVAL_FILE = "eval.jsonl"
DROPPED_FILE = "dropped.jsonl"


def check_settings(config: CurationConfig) -> None:
    """Find out before the answers are written what would stop their curation. Errors: ConfigError, DataError."""
    from largekd.curation.standard_examiner import StandardExaminer

    _check(config)
    build_filters(config)
    with StandardExaminer(config):
        pass


def curate(folder: Path, *, config: CurationConfig, examiner: Examiner | None = None) -> dict[str, Any]:
    """Makes `folder/data` from `folder/raw` and returns the summary that `curation.json` holds.

    Args: examiner: parses and verifies; None: as the configuration says, with programs in the sandbox.

    Errors: ConfigError, DataError for settings, evaluation sets and raw answers that cannot be used, before anything is
    written; the former `data` then stays.
    """
    _check(config)
    filters = build_filters(config)
    job = _job(folder)
    answers = OrderedAnswers(folder, seed=config.dataset.seed)
    with ExitStack() as stack:
        if examiner is None:
            # Needs the sandbox and the libraries of verification, which one's own examiner may not.
            from largekd.curation.standard_examiner import StandardExaminer

            examiner = stack.enter_context(StandardExaminer(config))
        summary = _replace(folder, answers=answers, config=config, filters=filters, examiner=examiner, job=job)
    logger.info("%s: %s", folder / DATA_FOLDER, tell(summary))
    if not summary["records"]["train"]:
        logger.warning("no record is left for training; %s shows why", folder / DATA_FOLDER / REPORT_FILE)
    return summary


def _replace(
    folder: Path,
    *,
    answers: OrderedAnswers,
    config: CurationConfig,
    filters: Sequence[tuple[str, Filter]],
    examiner: Examiner,
    job: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A new data folder in the place of the former one, or the former one after an error. What a killed curation has
    left is removed."""
    for label in (DATA_FOLDER, f"old-{DATA_FOLDER}"):
        for killed in folder.glob(f"{TEMPORARY_PREFIX}{label}-*"):
            remove_tree(killed)
    new = temporary_sibling(folder / DATA_FOLDER, label=DATA_FOLDER)
    new.mkdir()
    try:
        with ExitStack() as stack:
            output = _Output(new, config=config, examiner=examiner, stack=stack)
            for group in _curated(answers, config=config, filters=filters, output=output):
                output.write(group)
        title = folder.resolve().name
        summary = _finish(output, title=title, config=config, filters=filters, answers=answers, job=job)
        for path in new.iterdir():
            fsync_path(path)
        former = swap_into_place(new, target=folder / DATA_FOLDER)
    finally:
        remove_tree(new)
    if former is not None:
        remove_tree(former)
    return summary


def tell(summary: Mapping[str, Any]) -> str:
    """The summary in one line."""
    dropped = ", ".join(f"{count} {rule}" for rule, count in summary["dropped"].items()) or "none"
    return (
        f"{summary['kept']} of {summary['answers']} answers kept ({summary['acceptance']:.1%}), "
        f"{summary['records']['train']} records for training, {summary['records']['eval']} held out; dropped: {dropped}"
    )


def _check(config: CurationConfig) -> None:
    if config.dataset.answer_text.count("{answer}") != 1:
        raise ConfigError(
            f"curation.dataset.answer_text = {config.dataset.answer_text!r}: must hold {{answer}} exactly once."
        )


def _curated(
    answers: OrderedAnswers, *, config: CurationConfig, filters: Sequence[tuple[str, Filter]], output: "_Output"
) -> Iterator[list[Curated]]:
    """Every row's answers with their verdicts, scores and rules."""
    for row in examine_rows(answers.rows(), examiner=output.examiner):
        group = []
        for (ask, written), (parsed, verdict) in row:
            rule, note = gate(written, parsed=parsed, verdict=verdict, config=config)
            curated = Curated(ask, written, parsed, verdict, dropped_by=rule, note=note)
            group.append(without_target(curated, config=config.dataset))
        yield apply_filters(group, filters=filters)


class _Output:
    """The files of a data set while rows are written to them, and the figures."""

    def __init__(self, folder: Path, *, config: CurationConfig, examiner: Examiner, stack: ExitStack) -> None:
        self.folder, self.examiner = folder, examiner
        self.statistics = Statistics()
        self.records = Counter(train=0, eval=0)
        self._config = config.dataset
        self._held_out = 0
        self._answers = hashlib.sha256()
        names = {"train": TRAIN_FILE, "eval": EVAL_FILE, "dropped": DROPPED_FILE}
        self._files = {name: stack.enter_context((folder / file).open("xb")) for name, file in names.items()}

    def write(self, group: Sequence[Curated]) -> None:
        """The answers of one row: training data, or held out all together, or dropped."""
        self.statistics.add_row(group)
        split = "train"
        if self._held_out < self._config.held_out and any(row.dropped_by is None for row in group):
            split = "eval"
            self._held_out += 1
        for row in group:
            self._answers.update(canonical(Answer(row.ask, row.written)))
            if row.dropped_by is not None:
                self._files["dropped"].write(json_line({"key": row.written.key, **asdict(row)}))
                continue
            for record in records(row, config=self._config, spans_of=self.examiner.spans):
                self._files[split].write(json_line(record))
                self.records[split] += 1

    @property
    def answers_sha256(self) -> str:
        """Over all answers, in the order of rows."""
        return self._answers.hexdigest()


def _finish(
    output: _Output,
    *,
    title: str,
    config: CurationConfig,
    filters: Sequence[tuple[str, Filter]],
    answers: OrderedAnswers,
    job: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Parquet, report and card, from closed files; returns the summary."""
    folder, statistics = output.folder, output.statistics
    names = {split: file for split, file in (("train", TRAIN_FILE), ("eval", EVAL_FILE)) if output.records[split]}
    if config.dataset.parquet:
        for split, file in names.items():
            names[split] = Path(file).with_suffix(".parquet").name
            write_parquet(folder / names[split], lines=folder / file, scores=sorted(statistics.score_names))
    splits = [
        Split(name=split, file=file, records=output.records[split], sha256=_file_hash(folder / file))
        for split, file in names.items()
    ]
    summary = {
        **statistics.as_dict(),
        "repeated_keys": answers.repeated,
        "records": dict(output.records),
        "filters": {name: dict(one.summary()) for name, one in filters},
        "answers_sha256": output.answers_sha256,
    }
    write_report(folder, statistics=statistics, rules=rule_names(filters), summary=summary, title=f"{title}: curation")
    settings = config.model_dump(mode="json")
    write_card(folder, title=title, splits=splits, summary=summary, settings=settings, job=job)
    hashes = {path.name: _file_hash(path) for path in sorted(folder.iterdir())}
    summary = {**summary, "settings": settings, "files_sha256": hashes}
    write_json(folder / SUMMARY_FILE, value=summary)
    return summary


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _job(folder: Path) -> Mapping[str, Any] | None:
    """What the generation says of itself. Errors: DataError where it cannot be read."""
    path = folder / JOB_FILE
    if not path.exists():
        return None
    try:
        job = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or remove it to go on without.") from error
    return job if isinstance(job, dict) else {"job": job}
