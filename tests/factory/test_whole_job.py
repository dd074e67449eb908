"""The whole factory by its configuration alone: rows, answers, verdicts, training data, and a run on them."""

import json
from pathlib import Path
from typing import Any

import curate as tool
import pytest
from factory.chat_fakes import chat_server, completion
from teachers.remote_fakes import as_json
from tiny_run import ROOT, distil, metrics, settings

from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record

SPAN_WEIGHTS = {"answer": 2.0, "reasoning": 0.5}


def generated(*, tree: dict[str, Any]) -> dict[str, Any] | str | None:
    """For a rank pool: the whole job with curation; its summary, or what the user is told instead."""
    from largekd.errors import LargeKDError
    from largekd.factory.run import generate

    try:
        return generate(parse_record(GenerateConfig, mapping=tree))
    except LargeKDError as error:
        return f"{type(error).__name__}: {error}"


def rows(path: Path, *, count: int) -> Path:
    """Sums with their right answers."""
    lines = [json.dumps({"question": f"How much is {n} + {n}?", "answer": str(2 * n)}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def job(folder: Path, *, backend: dict[str, Any], curation: dict[str, Any], count: int = 6) -> dict[str, Any]:
    return {
        "output": {"dir": str(folder / "job")},
        "source": {"path": str(rows(folder / "rows.jsonl", count=count)), "answer": "answer"},
        "backend": backend,
        "sampling": {"samples": 2, "max_new_tokens": 24},
        "curation": curation,
        "log": {"progress": False},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(pool: Any, *, assets: Path, folder: Path, weights: dict[str, float]) -> list[float]:
    """Three steps on the job's training data with these weights of its spans; the losses."""
    source = {"path": str(folder / "job/data/train.jsonl"), "named_span_weights": weights}
    run = folder / ("weighted" if weights else "plain")
    tree = settings(assets, run, data__train=source, train__max_steps=3, train__sequence_length=256)
    (summary,) = pool.run(distil, tree=tree)
    assert summary is not None
    return [record["loss"] for record in metrics(run) if "loss" in record]


def test_a_models_answers_become_data_that_a_student_learns(tmp_path, tiny_assets, one_rank, capsys):
    backend = {
        "model": str(tiny_assets / "teacher"),
        "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json"),
        "precision": "fp32",
    }
    # A model with random weights proves nothing: what it writes is kept unverified, and its last number is its answer.
    tree = job(tmp_path, backend=backend, curation={"keep_unparsed": True, "answer_format": "last_number"})
    (summary,) = one_rank.run(generated, tree=tree)
    assert summary["answers"] == 12 and summary["curation"]["records"] == {"train": 12, "eval": 0}
    records = read(tmp_path / "job/data/train.jsonl")
    for record in records:
        text = record["messages"][-1]["content"]
        for span in record["spans"]:
            assert 0 <= span["start"] < span["end"] <= len(text)
    assert {span["name"] for record in records for span in record["spans"]} >= {"answer"}
    plain, weighted = (train(one_rank, assets=tiny_assets, folder=tmp_path, weights=own) for own in ({}, SPAN_WEIGHTS))
    assert len(plain) == len(weighted) == 3 and plain[0] != weighted[0]
    # The same answers against the right ones, which the rows brought along.
    assert tool.main([str(tmp_path / "job"), "curation.verify.kind=numeric"]) == 0
    found = json.loads((tmp_path / "job/data/curation.json").read_text())
    assert found["outcomes"].get("wrong", 0) + found["outcomes"].get("right", 0) > 0
    assert found["kept"] < 12 and "of 12 answers kept" in capsys.readouterr().out


@pytest.mark.parametrize("judged", ["unknown", "all"])
def test_rules_and_a_judge_verify_and_verdicts_count_again_without_being_asked_for(
    tmp_path, tiny_assets, one_rank, capsys, judged
):
    def writing(question, good):
        """Sums below 3 in the right form, 3 wrong, others in words that no rule reads."""
        number = int(question.split("+")[0].split()[-1])
        says = f"Answer: {2 * number + (number == 3)}" if number < 4 else "It is clear."
        return as_json(completion(f"I add {number} to itself.\n{says}"))

    def judging(question, good):
        return as_json(completion("No.\nVerdict: wrong" if "5 + 5" in question else "Well.\nVerdict: right"))

    with chat_server(writing) as writer, chat_server(judging) as judge:
        backend = {"kind": "endpoint", "url": writer.url, "model": "m"}
        curation = {"verify": {"kind": "numeric"}, "keep_unparsed": True}
        tree = job(tmp_path, backend=backend, curation=curation)
        tree["judge"] = {"backend": {**backend, "url": judge.url, "model": "j"}, "answers": judged}
        (summary,) = one_rank.run(generated, tree=tree)
        asked = 4 if judged == "unknown" else 12
        assert len(writer.requests) == 12 and len(judge.requests) == asked
        expected = {
            # 0, 1, 2 by the rule and 4 by the judge; 3 is wrong by the rule, and right if the judge has the last word.
            "unknown": ({"right": 8, "wrong": 4}, {"judge": 4, "numeric": 8}),
            "all": ({"right": 10, "wrong": 2}, {"judge": 12}),
        }
        outcomes, by = expected[judged]
        assert (summary["curation"]["outcomes"], summary["curation"]["verified_by"]) == (outcomes, by)
        data = (tmp_path / "job/data/train.jsonl").read_bytes()
        assert one_rank.run(generated, tree=tree) == [summary]
        assert tool.main([str(tmp_path / "job")]) == 0
        assert (tmp_path / "job/data/train.jsonl").read_bytes() == data
        assert tool.main([str(tmp_path / "job"), "curation.keep_unparsed=false", "curation.dataset.held_out=1"]) == 0
        # Both answers of a row are set aside together.
        assert "2 held out" in capsys.readouterr().out
        assert len(writer.requests) == 12 and len(judge.requests) == asked
