"""Records that cannot be used, in a whole run: counted, listed, shared by both ranks, or refused by file and line."""

import json
import random
from pathlib import Path
from typing import Any

import pool_jobs
import pytest
from make_tiny_model import make_text
from tiny_run import settings

RECORDS, BAD = 2000, 100
BROKEN = (
    b'{"text": "cut off',
    b'{"text": "not \xff\xfe UTF-8"}',
    b'{"text": ""}',
    b'{"text": 17}',
    b'{"text": null}',
    b'["a", "list"]',
    b'{"other": "no text"}',
    b'{"messages": [{"role": "user", "content": "nobody answers"}]}',
    b'{"messages": "not a list"}',
    b'{"messages": [{"role": "assistant", "content": 3}]}',
)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> tuple[Path, dict[int, bytes]]:
    """2,000 lines of which 100 are unusable, and those by line number."""
    path = tmp_path_factory.mktemp("data") / "spoiled.jsonl"
    lines = [json.dumps(record).encode() for record in make_text(samples=RECORDS, seed=4)]
    places = sorted(random.Random(4).sample(range(RECORDS), BAD))
    bad = {place + 1: BROKEN[index % len(BROKEN)] for index, place in enumerate(places)}
    for number, line in bad.items():
        lines[number - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, bad


def recipe(assets: Path, run_dir: Path, *, path: Path, max_bad_frac: float) -> dict[str, Any]:
    return settings(
        assets,
        run_dir,
        data__train={"path": str(path), "max_bad_frac": max_bad_frac},
        train__max_steps=None,
        train__max_epochs=1,
        train__sequence_length=256,
        train__global_batch_size=64,
        train__micro_batch_size=32,
        data__eval=None,
        log={"progress": False, "health_every_steps": 0},
        student__teacher_layers=[0],
    )


def test_bad_records_are_set_aside_counted_and_listed(spoiled, tiny_assets, two_ranks, tmp_path):
    path, bad = spoiled
    answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, tmp_path / "run", path=path, max_bad_frac=0.1))
    assert [answer["error"] for answer in answers] == [None, None]
    rows = json.loads((tmp_path / "run/quarantine.json").read_text())
    assert sorted(row["origin"] for row in rows) == sorted(f"{path}:{number}" for number in bad)
    assert all(row["reason"] for row in rows) and {row["record"] for row in rows} == {number - 1 for number in bad}
    assert any("100 unusable records were set aside" in message for message in answers[0]["messages"])
    steps = [sorted(answer["samples"]) for answer in answers]
    assert steps[0] == steps[1] == list(range(1, answers[0]["summary"]["steps"] + 1))
    seen = sorted(i for answer in answers for step in answer["samples"].values() for batch in step for i in batch)
    assert len(seen) == len(set(seen)) == RECORDS - BAD, "every usable sample once in the epoch"


def test_without_a_tolerance_the_first_bad_line_is_named(spoiled, tiny_assets, two_ranks, tmp_path):
    path, bad = spoiled
    answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, tmp_path / "run", path=path, max_bad_frac=0.0))
    for answer in answers:
        kind, message = answer["error"]
        assert kind == "DataError" and answer["samples"] == {}
        assert f"100 of 2000 records of {path} are unusable (5.00%)" in message
        assert f"{path}:{min(bad)}: " in message and "data.train.max_bad_frac" in message


def test_a_share_above_the_tolerance_is_refused(spoiled, tiny_assets, two_ranks, tmp_path):
    path, _ = spoiled
    answers = two_ranks.run(pool_jobs.attempt, tree=recipe(tiny_assets, tmp_path / "run", path=path, max_bad_frac=0.04))
    assert all(answer["error"][0] == "DataError" for answer in answers)
