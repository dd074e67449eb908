"""Training data of a job's answers, with the verdicts of its judge."""

from pathlib import Path
from typing import Any

from largekd.config.curation import CurationConfig
from largekd.config.generate import JudgeConfig
from largekd.curation.examination import Examiner
from largekd.curation.ordering import OrderedAnswers
from largekd.curation.pipeline import curate
from largekd.curation.standard_examiner import StandardExaminer
from largekd.factory.judge import JudgedRows, open_keys, stored_verdicts


def curate_job(folder: Path, *, config: CurationConfig, judge: JudgeConfig | None) -> dict[str, Any]:
    """As `curation.pipeline.curate`; what the judge wrote in earlier starts completes the verdicts of rules.

    An answer that was never judged keeps the verdict of the rule. Errors: ConfigError, DataError.
    """
    with StandardExaminer(config) as standard:
        examiner: Examiner = standard
        if judge is not None:
            examiner = JudgedRows(standard, verdicts=stored_verdicts(folder, config=judge), config=judge)
        return curate(folder, config=config, examiner=examiner)


def keys_to_judge(folder: Path, *, config: CurationConfig, judge: JudgeConfig) -> list[str]:
    """The answers that the judge is to see. It may run programs in the sandbox. Errors: ConfigError, DataError."""
    answers = OrderedAnswers(folder, seed=config.dataset.seed)
    with StandardExaminer(config) as examiner:
        return open_keys(answers.rows(), config=judge, curation=config, examiner=examiner)
