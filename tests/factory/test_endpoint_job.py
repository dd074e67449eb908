"""Whole jobs that a server writes for: what is on the disk afterwards, and who asked."""

import json
import threading
from pathlib import Path

import pytest
from factory.chat_fakes import chat_server
from factory.endpoint_jobs import generated
from teachers.remote_fakes import as_json

from largekd.curation.answer_shards import RAW_FOLDER, read_answers
from largekd.factory.endpoint import JOURNAL


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"How much is {n} + {n}?"}) + "\n" for n in range(12)))
    return path


def job(rows: Path, folder: Path, url: str, *, samples=2, **backend):
    return {
        "output": {"dir": str(folder), "shard_rows": 5},
        "source": {"path": str(rows)},
        "backend": {"kind": "endpoint", "url": url, "model": "m", "input_price": 1.0, "output_price": 1.0} | backend,
        "sampling": {"samples": samples, "max_new_tokens": 20},
        "log": {"progress": False},
    }


def keys_on_disk(folder: Path) -> list[str]:
    return [written.key for _, written in read_answers(folder / RAW_FOLDER)]


def test_two_ranks_ask_once_and_more_samples_cost_no_more_than_they_are(two_ranks, rows, tmp_path):
    folder = tmp_path / "job"
    with chat_server() as server:
        first = two_ranks.run(generated, tree=job(rows, folder, server.url))
        assert [summary["answers"] for summary in first] == [24, 24]
        assert server.completed.total() == 24
        again = two_ranks.run(generated, tree=job(rows, folder, server.url, samples=3))
        assert again[0]["answers"] == 36 and server.completed.total() == 36
        two_ranks.run(generated, tree=job(rows, folder, server.url, samples=3))
        assert server.completed.total() == 36
    assert len(set(keys_on_disk(folder))) == 36
    assert len((folder / JOURNAL).read_text().splitlines()) == 1, "what is in shards is not kept twice"


def test_a_refusal_ends_both_ranks_and_the_same_command_goes_on(two_ranks, rows, tmp_path):
    folder, lock, calls = tmp_path / "job", threading.Lock(), []

    def misbehave(question, good):
        with lock:
            calls.append(question)
            return as_json({"error": "pay first"}, status=402) if len(calls) > 9 else good

    with chat_server(misbehave) as server:
        told = two_ranks.run(generated, tree=job(rows, folder, server.url, concurrency=1))
    assert all(text.startswith("GenerationError: ") and "no credit is left" in text for text in told)
    assert len(keys_on_disk(folder)) == 9
    with chat_server() as server:
        two_ranks.run(generated, tree=job(rows, folder, server.url))
        assert server.completed.total() == 24 - 9
    assert len(set(keys_on_disk(folder))) == 24


def test_a_cost_limit_stops_the_job_and_a_higher_one_goes_on(one_rank, rows, tmp_path):
    folder = tmp_path / "job"
    with chat_server() as server:
        stopped = one_rank.run(generated, tree=job(rows, folder, server.url, max_cost=300e-6))
        # An answer costs 15e-6, and at most 162e-6 with these prompts.
        assert stopped == [None] and len(keys_on_disk(folder)) == server.completed.total() == 10
        (summary,) = one_rank.run(generated, tree=job(rows, folder, server.url, max_cost=1.0))
        assert summary["answers"] == 24 == server.completed.total()
