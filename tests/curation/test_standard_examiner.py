"""Real texts through parsing, programs and verification, and a job's folder through tools/curate.py."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import curate as tool
import pytest
from factory_answers import answer, write_job

from largekd.config.curation import CurationConfig, VerifyConfig
from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record
from largekd.config.render import config_to_mapping
from largekd.curation.answer_shards import Answer
from largekd.curation.pipeline import curate
from largekd.curation.standard_examiner import StandardExaminer
from largekd.errors import ConfigError, LargeKDError
from largekd.sandbox.availability import check_isolation


def outcomes(answers: Sequence[Answer], **verify: Any) -> list[str]:
    with StandardExaminer(CurationConfig(verify=VerifyConfig(**verify))) as examiner:
        return [found.verdict.outcome for found in examiner.examine(answers)]


def program(code: str, **settings: Any) -> Answer:
    return answer(f"So we compute:\n```python\n{code}\n```\n", **settings)


@pytest.fixture
def _isolated() -> None:
    try:
        check_isolation(VerifyConfig().sandbox)
    except LargeKDError as error:
        pytest.skip(str(error))


def test_answers_are_parsed_verified_and_their_parts_found() -> None:
    texts = ["Six times seven.\n#### 42", "I say \\boxed{41}.", "No idea.", ""]
    answers = [answer(text, sample=place) for place, text in enumerate(texts)]
    answers[3] = Answer(answers[3].ask, replace(answers[3].written, finish="failed", failure="too long"))
    assert outcomes(answers, kind="numeric") == ["right", "wrong", "unknown", "unknown"]
    with StandardExaminer(CurationConfig(verify=VerifyConfig(kind="numeric"))) as examiner:
        parsed = examiner.examine(answers[:1])[0].parsed
        spans = examiner.spans(parsed, texts[0])
    assert {span["name"]: texts[0][span["start"] : span["end"]] for span in spans}["answer"] == "42"


def test_each_row_votes_for_itself() -> None:
    def row(name: str, found: str) -> list[Answer]:
        return [answer(f"So it is.\n#### {one}", row=name, right=None, sample=place) for place, one in enumerate(found)]

    answers = [*row("a", "778"), *row("b", "887"), *row("c", "12")]
    assert outcomes(answers, kind="majority") == ["right", "right", "wrong"] * 2 + ["unknown"] * 2


@pytest.mark.usefixtures("_isolated")
def test_programs_run_in_the_sandbox_and_must_agree_where_asked() -> None:
    answers = [
        program("print(6 * 7)"),
        program("print(6 * 8)", sample=1),
        program("raise SystemExit(3)", sample=2),
        answer("By hand.\n#### 42", sample=3),
    ]
    assert outcomes(answers, kind="numeric", programs="run") == ["right", "wrong", "wrong", "right"]
    assert outcomes(answers, kind="numeric")[:3] == ["unknown"] * 3, "not run"
    both = [
        answer("```python\nprint(42)\n```\nThe answer is 42.", right=None),
        answer("```python\nprint(42)\n```\nThe answer is 24.", right=None, sample=1),
    ]
    assert outcomes(both, kind="none", programs="must_agree") == ["right", "wrong"]


@pytest.mark.usefixtures("_isolated")
def test_unit_tests_decide() -> None:
    def asked(code: str, sample: int, tests: str | None = "assert double(4) == 8") -> Answer:
        ask, written = program(code, row=f"with {tests}", sample=sample)
        return Answer(replace(ask, item=replace(ask.item, tests=tests)), written)

    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x + 3"
    answers = [asked(right, 0), asked(wrong, 1), asked(right, 2)]
    answers += [Answer(answers[0].ask, answer("No program here.").written), asked(right, 0, tests=None)]
    answers.append(asked(right, 0, tests="if __name__ == '__main__':\n    assert double(4) == 8"))
    assert outcomes(answers, kind="tests") == ["right", "wrong", "right", *["unknown"] * 3], "the last tests nothing"


def job_folder(tmp_path: Path, **curation: Any) -> Path:
    texts = ["Six times seven.\n#### 42", "It is 0.42e2.\n#### 42.0", "I guess.\n#### 41"]
    made = [answer(text, row=f"row{place}") for place, text in enumerate(texts)]
    folder = write_job(tmp_path / "job", shards=[made])
    tree = {
        "output": {"dir": str(folder)},
        "source": {"path": "rows.jsonl", "licence": "CC0 ${not.a.key}"},
        "backend": {"model": "m", "deepspeed": "d.json"},
        "curation": curation,
    }
    config = config_to_mapping(parse_record(GenerateConfig, mapping=tree))
    (folder / "job.json").write_text(json.dumps({"identity": {}, "config": config}))
    return folder


def test_the_tool_repeats_the_curation_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job_folder(tmp_path, verify={"kind": "exact"})
    assert tool.main([str(folder)]) == 0
    assert "1 of 3 answers kept" in capsys.readouterr().out
    assert tool.main([str(folder), "curation.verify.kind=numeric", "curation.dataset.held_out=1"]) == 0
    assert "2 of 3 answers kept (66.7%), 1 records for training, 1 held out" in capsys.readouterr().out
    assert json.loads((folder / "data" / "curation.json").read_text())["settings"]["verify"]["kind"] == "numeric"
    before = (folder / "data" / "train.jsonl").read_bytes()
    assert tool.main([str(folder), "curation.verify.kind=nonsense"]) == 2
    assert "curation.verify.kind" in capsys.readouterr().err
    assert tool.main([str(folder), "sampling.seed=3"]) == 2
    assert "only keys of `curation` can change now" in capsys.readouterr().err
    assert (folder / "data" / "train.jsonl").read_bytes() == before


def test_a_folder_without_a_job_needs_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job_folder(tmp_path, verify={"kind": "exact"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(json.loads((folder / "job.json").read_text())["config"]).replace("${", "$ {"))
    (folder / "job.json").unlink()
    assert tool.main([str(folder)]) == 2
    assert "name a recipe with --config" in capsys.readouterr().err
    assert tool.main([str(folder), "--config", str(recipe)]) == 0
    assert "1 of 3 answers kept" in capsys.readouterr().out


def test_isolation_that_is_missing_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> None:
        raise ConfigError("no isolation here")

    monkeypatch.setattr("largekd.curation.standard_examiner.check_isolation", refuse)
    folder = write_job(tmp_path / "job", shards=[[program("print(42)")]])
    with pytest.raises(ConfigError, match="no isolation here"):
        curate(folder, config=CurationConfig(verify=VerifyConfig(kind="numeric", programs="run")))
    assert [path.name for path in folder.iterdir()] == ["raw"]
    curate(folder, config=CurationConfig(verify=VerifyConfig(kind="numeric"), keep_unknown=True))
    assert (folder / "data" / "train.jsonl").stat().st_size > 0
