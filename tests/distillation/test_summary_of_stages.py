"""Which figures of a run in stages its summary sets side by side."""

import json
from dataclasses import replace

import pytest
from tiny_run import settings

from largekd.config.load import parse_config
from largekd.distillation.journal import Journal
from largekd.distillation.output import write_summary
from largekd.runtime.ranks import current_ranks

BEFORE = {"perplexity": 9.0, "kl": 2.0}
AFTER = {"perplexity": 5.0, "kl": 1.0, "teacher_perplexity": 4.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim.lr": 1e-5}, BEFORE),
        ({"train.sequence_length": 128}, None),
        ({"teacher.attention": "eager"}, {"perplexity": 9.0}),
    ],
)
def test_before_and_after_are_of_the_same_tokens_and_teacher(tiny_assets, tmp_path, changes, expected):
    tree = settings(tiny_assets, tmp_path, train__max_steps=None, optim__warmup_steps=0)
    tree["stages"] = [{"name": "one", "steps": 1}, {"name": "two", "steps": 1, "set": changes}]
    journal = Journal()
    journal.progress = replace(journal.progress, step=2)
    journal.evaluations = {"before": BEFORE, "after": AFTER}
    summary = write_summary(
        tmp_path, journal=journal, export_dir=tmp_path / "export", config=parse_config(tree), ranks=current_ranks()
    )
    assert summary["eval"]["before"] == expected
    assert summary["eval"]["after"] == {"perplexity": 5.0, "kl": 1.0}
    assert ("note" in summary) == (expected is None)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
