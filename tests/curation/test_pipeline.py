"""From raw answers to a data set: what is in it, what is told, and that it is the same whenever it is made."""

import json
import os
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pytest
from factory_answers import MARK, MarkExaminer, answer, with_text, write_job

from largekd.config.curation import (
    CurationConfig,
    DatasetConfig,
    DifficultyFilterConfig,
    DuplicateFilterConfig,
    LengthFilterConfig,
    VerifyConfig,
)
from largekd.curation.answer_shards import Answer
from largekd.curation.dataset import json_line, targets
from largekd.curation.ordering import OrderedAnswers
from largekd.curation.pipeline import curate
from largekd.curation.records import Curated, Parsed, Verdict
from largekd.errors import ConfigError, DataError

ROWS = 12
SAMPLES = 3


def config(**settings: Any) -> CurationConfig:
    dataset = settings.pop("dataset", {})
    return CurationConfig(verify=VerifyConfig(kind="exact"), dataset=DatasetConfig(**dataset), **settings)


def answers() -> list[Answer]:
    """Of each row a right answer, a wrong one, and one that is cut off; the last row failed."""
    made = []
    for place in range(ROWS):
        row = {"row": f"row{place}", "question": f"What is {place} and one?", "right": str(place + 1)}
        if place == ROWS - 1:
            made.append(answer("", **row, finish="failed", failure="prompt too long"))
            continue
        made.append(answer(f"We add one to {place}. {MARK} {place + 1}", **row))
        made.append(answer(f"We guess. {MARK} {place + 7}", **row, sample=1))
        made.append(answer(f"We begin with {place} and <b>then", **row, sample=2, finish="length"))
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def run(folder: Path, settings: CurationConfig) -> dict[str, Any]:
    return curate(folder, config=settings, examiner=MarkExaminer())


def test_kept_answers_become_records_and_all_others_are_told(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", shards=[answers()])
    summary = run(job, config(dataset={"held_out": 2}))
    right = ROWS - 1
    assert summary["dropped"] == {"failed": 1, "unfinished": right, "wrong": right}
    assert summary["records"] == {"train": right - 2, "eval": 2}
    assert summary["acceptance"] == pytest.approx(right / (3 * right + 1), abs=1e-6)
    train, held_out = lines(job / "data" / "train.jsonl"), lines(job / "data" / "eval.jsonl")
    assert len({row["id"] for row in train} | {row["id"] for row in held_out}) == right
    assert not {row["id"] for row in train} & {row["id"] for row in held_out}
    record = train[0]
    text = record["messages"][-1]["content"]
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert {span["name"]: text[span["start"] : span["end"]] for span in record["spans"]} == {
        "reasoning": text.split(MARK)[0],
        "answer": record["answer"],
    }
    dropped = lines(job / "data" / "dropped.jsonl")
    assert len(dropped) + right == summary["answers"] == len(answers())
    failed = next(row for row in dropped if row["dropped_by"] == "failed")
    assert (failed["note"], failed["key"]) == ("prompt too long", failed["written"]["key"])
    keys = {row["key"] for row in [*train, *held_out, *dropped]}
    assert keys == {one.written.key for one in answers()}, "nothing is lost"


def test_the_same_answers_give_the_same_bytes_whatever_their_shards(tmp_path: Path) -> None:
    long = " ".join(f"word{place}" for place in range(60))
    alike = [answer(f"{long} {name} {MARK} 42", row=name) for name in ("one", "two", "three")]
    made = [*answers(), *alike]
    settings = config(
        dataset={"held_out": 2, "parquet": True},
        filters=(DuplicateFilterConfig(kind="duplicates", field="answer"),),
    )
    shards = {"one": [made], "many": [made[::-1][place::5] for place in range(5)]}
    jobs = [write_job(tmp_path / name / "job", shards=parts) for name, parts in shards.items()]
    summaries = [run(job, settings) for job in jobs]
    assert summaries[0]["dropped"]["duplicates.near"] == 2
    assert contents(jobs[0]) == contents(jobs[1])
    before = contents(jobs[0])
    run(jobs[0], settings)
    assert contents(jobs[0]) == before, "made again"
    assert set(before) == {
        *("train.jsonl", "eval.jsonl", "train.parquet", "eval.parquet", "dropped.jsonl"),
        *("README.md", "report.html", "report.png", "curation.json"),
    }
    assert before["report.png"].startswith(b"\x89PNG")
    run(jobs[0], settings.model_copy(update={"dataset": DatasetConfig(seed=1, held_out=2)}))
    assert contents(jobs[0])["eval.jsonl"] != before["eval.jsonl"], "another seed sets other rows aside"
    assert [path.name for path in jobs[0].iterdir()].count("data") == 1 == len(list(jobs[0].glob("*data*")))


def test_rows_come_in_a_random_order_with_their_samples_together(tmp_path: Path) -> None:
    made = answers()
    job = write_job(tmp_path / "job", shards=[made[::2], made[1::2], made[:3]])
    ordered = OrderedAnswers(job, seed=0)
    groups = list(ordered.rows())
    names = [group[0].ask.item.id for group in groups]
    assert sorted(names) == sorted({one.ask.item.id for one in made}) and names != sorted(names)
    assert all([one.ask.sample for one in group] == sorted(one.ask.sample for one in group) for group in groups)
    flat = [one for group in groups for one in group]
    assert sorted(flat, key=lambda one: one.written.key) == sorted(made, key=lambda one: one.written.key)
    assert ordered.repeated == 3 and len(ordered) == len(made) + 3


def test_data_sets_load_as_hugging_face_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for parquet in (True, False):
        job = write_job(tmp_path / str(parquet), shards=[answers()])
        filters = (LengthFilterConfig(kind="length"),)
        run(job, config(dataset={"held_out": 2, "parquet": parquet}, filters=filters))
        loaded = datasets.load_dataset(str(job / "data"))
        assert {name: len(split) for name, split in loaded.items()} == {"train": ROWS - 3, "eval": 2}
        assert [dict(row) for row in loaded["train"]] == lines(job / "data" / "train.jsonl")


@pytest.mark.parametrize("learn", ["last", "all"])
def test_drafts_are_shown_and_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ask, written = answer(f"Again. {MARK} 42")
    draft = ({"role": "assistant", "content": f"First. {MARK} 41"}, {"role": "user", "content": "Look again."})
    ask = replace(ask, messages=(*ask.messages, *draft))
    job = write_job(tmp_path / "job", shards=[[Answer(ask, replace(written, key=ask.key)), *answers()[:2]]])
    run(job, config(dataset={"learn": learn, "parquet": True}))
    by_turns = {len(record["messages"]): record["messages"] for record in lines(job / "data" / "train.jsonl")}
    assert [message.get("weight") for message in by_turns[5]] == [
        None,
        None,
        0 if learn == "last" else None,
        None,
        None,
    ]
    assert all("weight" not in message for message in by_turns[3])
    loaded = datasets.load_dataset(str(job / "data"), split="train")
    assert {len(talk): [one.get("weight") for one in talk] for talk in loaded["messages"]} == {
        turns: [message.get("weight") for message in messages] for turns, messages in by_turns.items()
    }


@pytest.mark.parametrize(("reasoning", "count"), [("with", 1), ("without", 1), ("both", 2)])
def test_targets_with_and_without_reasoning(tmp_path: Path, reasoning: str, count: int) -> None:
    job = write_job(tmp_path / "job", shards=[[answer(f"Let me think. {MARK} 42")]])
    hint = {"answer_text": "The answer is {answer}.", "answer_hint": " Answer at once."}
    summary = run(job, config(dataset={"reasoning": reasoning, "prompt": "question", **hint}))
    records = lines(job / "data" / "train.jsonl")
    assert len(records) == count == summary["records"]["train"]
    by_kind = {record["reasoning"]: record for record in records}
    if reasoning != "without":
        assert by_kind[True]["messages"][1:] == [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": f"Let me think. {MARK} 42"},
        ]
    if reasoning != "with":
        assert by_kind[False]["messages"][1:] == [
            {"role": "user", "content": "How many? Answer at once."},
            {"role": "assistant", "content": "The answer is 42."},
        ]
        (span,) = by_kind[False]["spans"]
        assert "The answer is 42."[span["start"] : span["end"]] == "42"


def test_without_reasoning_a_program_stands_for_itself_and_nothing_is_dropped_silently(tmp_path: Path) -> None:
    ask, written = answer("text")
    row = Curated(ask, written, Parsed(program="print(42)\n"), Verdict("right", "program"))
    ((text, (span,)),) = targets(row, reasoning="without", answer_text="{answer}", spans_of=MarkExaminer().spans)
    assert text == "```python\nprint(42)\n```"
    assert (span["name"], text[span["start"] : span["end"]]) == ("program", "print(42)")
    job = write_job(tmp_path / "job", shards=[[answer("no answer")]])
    summary = run(job, config(keep_unparsed=True, keep_unknown=True, dataset={"reasoning": "without"}))
    assert summary["dropped"] == {"no_answer": 1}


def test_unknown_and_cut_off_answers_are_kept_on_demand(tmp_path: Path) -> None:
    cut = answer(f"So {MARK} 4", row="cut", right=None, finish="length")
    job = write_job(tmp_path / "job", shards=[[answer(f"So {MARK} 4", row="open", right=None), cut]])
    assert run(job, config())["dropped"] == {"unfinished": 1, "unverified": 1}
    assert run(job, config(keep_unknown=True))["dropped"] == {"unfinished": 1}
    assert run(job, config(keep_unknown=True, keep_unparsed=True))["dropped"] == {}


class _Balanced(HTMLParser):
    """Every element is closed where it was opened."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_is_whole_and_escapes_what_models_write(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script></pre>&amp;"
    kept, dropped = f"{attack} {MARK} 42", f"{attack} {MARK} 41"
    job = write_job(
        tmp_path / "job",
        shards=[[answer(kept, question=attack), answer(dropped, question=attack, sample=1, template="<i>mine</i>")]],
    )
    run(job, config(filters=(DifficultyFilterConfig(kind="difficulty"),)))
    page = (job / "data" / "report.html").read_text()
    parser = _Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and "script" not in parser.seen and "i" not in parser.seen
    assert kept in parser.text and dropped in parser.text, "shown as they are, as text"
    assert "rows_of_buckets" in page and "distinct_2" in page


def test_the_card_tells_the_licences_and_settings_and_cannot_be_broken_out_of(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", shards=[answers()])
    description = {
        "source": {"path": "rows.jsonl", "licence": "CC BY 4.0 | <b>"},
        "backend": {"model": "teacher", "licence": "Apache-2.0"},
        "sampling": {"stop": ["```\n# no heading"], "seed": 5},
    }
    kept = {"identity": {"writer": {"weights": "0123"}}, "config": description}
    aside = {"output": {"dir": "runs/x"}, "curation": {}, "log": {}}
    (job / "job.json").write_text(json.dumps({**kept, "config": {**description, **aside}}))
    summary = run(job, config(dataset={"held_out": 1}))
    card = (job / "data" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", maxsplit=1)
    assert "split: train" in head and "path: eval.jsonl" in head
    assert "CC BY 4.0 \\| \\<b\\>" in body and "| Apache-2.0 |" in body
    blocks = body.split("```")
    assert len(blocks) == 5 and json.loads(blocks[1].removeprefix("json")) == kept
    assert json.loads(blocks[3].removeprefix("json"))["verify"]["kind"] == "exact"
    assert summary["files_sha256"]["train.jsonl"] in body
    (job / "job.json").unlink()
    run(job, config())
    assert "holds no description" in (job / "data" / "README.md").read_text()


def test_a_failure_leaves_the_former_data(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", shards=[answers()])
    run(job, config())
    before = contents(job)

    class Broken(MarkExaminer):
        def examine(self, answers: Any) -> Any:
            raise DataError("the sandbox is gone")

    with pytest.raises(DataError, match="sandbox is gone"):
        curate(job, config=config(), examiner=Broken())
    with pytest.raises(ConfigError, match=r"answer_text = 'none': must hold \{answer\} exactly once"):
        run(job, config(dataset={"answer_text": "none"}))
    (job / "job.json").write_text("{")
    with pytest.raises(DataError, match=r"job\.json: cannot be read"):
        run(job, config())
    assert contents(job) == before
    assert sorted(path.name for path in job.iterdir()) == ["data", "job.json", "raw"]


@pytest.mark.parametrize("former", [False, True])
def test_a_killed_curation_leaves_no_half_data_set(tmp_path: Path, former: bool) -> None:
    class Killing(MarkExaminer):
        left = 5

        def spans(self, parsed: Parsed, text: str) -> list[Any]:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().spans(parsed, text)

    job = write_job(tmp_path / "job", shards=[answers()])
    if former:
        run(job, config())
    before = contents(job) if former else {}
    child = os.fork()
    if child == 0:
        try:
            curate(job, config=config(dataset={"seed": 1}), examiner=Killing())
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (job / "data").exists() is former
    assert not former or contents(job) == before
    run(job, config())
    assert sorted(path.name for path in job.iterdir()) == ["data", "raw"], "nothing is left of the killed one"


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="has no answers"):
        run(tmp_path, config())


def test_half_characters_are_kept_raw_and_replaced_in_training_data(tmp_path: Path) -> None:
    text = f"\ud83d is half a face {MARK} 42"
    assert json.loads(json_line({"text": text}).decode()) == {"text": text}
    job = write_job(tmp_path / "job", shards=[[with_text(answer(""), text), answer("\ud83d", sample=1)]])
    run(job, config(dataset={"parquet": True}))
    assert lines(job / "data" / "train.jsonl")[0]["messages"][-1]["content"] == text.replace("\ud83d", "\ufffd")
    assert lines(job / "data" / "dropped.jsonl")[0]["written"]["text"] == "\ud83d"
