"""summary.json and its text."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from largekd.errors import LargeKDError
from largekd.monitoring.summary import EvalFigures, RunSummary, render_summary

SUMMARY = RunSummary(
    steps=200,
    tokens=1_234_567,
    skipped_steps=2,
    wall_s=492.4,
    tokens_per_s=2510.2,
    peak_rss_bytes=(1_930_000_000, 1_910_000_000),
    before=EvalFigures(perplexity=812.1, kl=5.231),
    after=EvalFigures(perplexity=31.4, kl=1.9012),
    teacher=EvalFigures(perplexity=14.2),
    export_dir="runs/quick start/export",
    tensorboard_dir="runs/quick start/tensorboard",
)


def test_file_has_the_nested_objects(tmp_path: Path):
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    SUMMARY.write(path)
    assert json.loads(path.read_text()) == {
        "eval": {
            "before": {"perplexity": 812.1, "kl": 5.231},
            "after": {"perplexity": 31.4, "kl": 1.9012},
            "teacher": {"perplexity": 14.2},
        },
        "steps": 200,
        "tokens": 1_234_567,
        "skipped_steps": 2,
        "tokens_per_s": 2510.2,
        "wall_s": 492.4,
        "peak_rss_bytes": [1_930_000_000, 1_910_000_000],
        "export_dir": "runs/quick start/export",
        "tensorboard_dir": "runs/quick start/tensorboard",
    }
    assert [child.name for child in tmp_path.iterdir()] == ["summary.json"]


def test_text_tells_figures_places_and_commands(tmp_path: Path):
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    text = render_summary(json.loads(path.read_text()))
    assert text.splitlines()[0] == "200 steps, 1,234,567 tokens in 8 min 12 s (2,510 tokens/s)"
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
    assert rows["student, before"] == ["812.10", "5.2310"]
    assert rows["student, after"] == ["31.40", "1.9012"]
    assert rows["teacher"] == ["14.20"]
    assert "1.93 GB, 1.91 GB (one per rank)" in text
    assert "2 steps with a non-finite gradient" in text
    assert "tensorboard --logdir 'runs/quick start/tensorboard'" in text
    assert "python tools/chat.py 'runs/quick start/export'" in text
    assert 'AutoModelForCausalLM.from_pretrained("runs/quick start/export")' in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_stopped_run_and_nonfinite_figures(tmp_path: Path):
    stopped = replace(
        SUMMARY,
        before=EvalFigures(perplexity=math.inf, kl=math.nan),
        after=None,
        teacher=None,
        export_dir=None,
        tensorboard_dir=None,
        skipped_steps=0,
        wall_s=3.25,
        tokens_per_s=math.nan,
    )
    path = tmp_path / "summary.json"
    stopped.write(path)
    mapping = json.loads(path.read_text())
    assert mapping["eval"] == {"before": {"perplexity": None, "kl": None}, "after": None, "teacher": None}
    assert mapping["tokens_per_s"] is None
    text = render_summary(mapping)
    assert "not finite" in text and text.count("not evaluated") == 2 and "3.2 s" in text
    assert "tensorboard" not in text and "chat" not in text and "non-finite gradient" not in text


def test_what_a_teacher_does_not_tell_is_not_known(tmp_path: Path):
    """Ids drawn from a teacher: the student's own figures are there, and nothing that needs the teacher's."""
    drawn = replace(
        SUMMARY,
        before=EvalFigures(perplexity=812.1, kl=math.nan),
        after=EvalFigures(perplexity=31.4, kl=math.nan),
        teacher=EvalFigures(perplexity=math.nan),
    )
    text = render_summary(drawn.as_mapping())
    assert "not finite" not in text and text.count("not known") == 3 and "31.40" in text


def test_hours(tmp_path: Path):
    assert "in 2 h 05 min (" in render_summary(replace(SUMMARY, wall_s=7512.0).as_mapping())


def test_a_full_disk_keeps_the_old_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("largekd.monitoring.json_records.os.fsync", full)
    with pytest.raises(LargeKDError, match=r"cannot write .*summary\.json: No space left on device"):
        replace(SUMMARY, steps=1).write(path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["summary.json"]


def test_figures_that_are_not_comparable_are_left_out_and_it_says_why():
    noted = replace(SUMMARY, before=None, note="other tokens").as_mapping()
    lines = render_summary(noted).splitlines()
    assert [line.split("  ")[0] for line in lines if "not comparable" in line] == ["student, before"]
    assert "other tokens" in lines and noted["note"] == "other tokens"
