"""Stages: invented instructions, conversations, revisions, and rows from files."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factory_jobs import ScriptedBackend, answers_in, job_settings, run_job
from tiny_run import changed

from largekd.config.generate import RowSourceConfig
from largekd.curation.answer_shards import read_answers
from largekd.curation.records import Written
from largekd.errors import ConfigError, DataError, GenerationError
from largekd.factory.distinct import Distinct
from largekd.factory.sources import read_items


class InstructionBackend(ScriptedBackend):
    """Writes a different task for every ask, and the same one for every third."""

    def _written(self, ask):
        if ask.template not in ("similar_instruction", "new_instruction"):
            return super()._written(ask)
        if self._fail_on is not None and self._fail_on in ask.messages[-1]["content"]:
            return super()._written(ask)
        number = ask.seed % 1000 if ask.seed % 3 else 0
        text = f'1. "Explain subject{number} to reader{number} using example{number} and number{number}"'
        return Written(ask.key, text, "stop", 3, 5)


def test_a_conversation_alternates_and_ends_with_the_question_to_answer(tmp_path):
    tree = job_settings(tmp_path, rows=3, prompts__turns=3, prompts__system="Be kind.")
    assert run_job(tree, backend=ScriptedBackend())
    found = list(read_answers(tmp_path / "job/raw"))
    assert len(found) == 3 * 2 * 2
    for ask, _ in found:
        assert [m["role"] for m in ask.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert ask.messages[3]["content"].startswith("user_turn")
        assert ask.messages[2]["content"].startswith(ask.template)
    turns = sorted(path.name for path in (tmp_path / "job/turns").iterdir())
    assert turns == ["answer_0", "answer_1", "user_0", "user_1"]
    assert all(len(answers_in(tmp_path / "job/turns" / name)) == 12 for name in turns)
    again = ScriptedBackend()
    assert run_job(tree, backend=again) and again.asked == []


def test_a_conversation_that_cannot_go_on_is_a_failed_row_with_the_reason(tmp_path):
    tree = job_settings(tmp_path, rows=4, prompts__turns=2, prompts__revise=True)
    assert run_job(tree, backend=ScriptedBackend(fail_on="What is 2"))
    found = list(read_answers(tmp_path / "job/raw"))
    failed = [answer for answer in found if answer.written.finish == "failed"]
    assert len(found) == 16 and len(failed) == 4
    assert {answer.ask.item.id for answer in failed} == {"r2"}
    assert {answer.written.failure for answer in failed} == {"asked to fail"}


def test_a_revision_follows_the_answer_and_names_both_templates(tmp_path):
    tree = job_settings(tmp_path, rows=2, prompts__templates=["direct"], prompts__revise=True)
    assert run_job(tree, backend=ScriptedBackend())
    found = list(read_answers(tmp_path / "job/raw"))
    drafts = dict(answers_in(tmp_path / "job/turns/answer_0"))
    assert {answer.ask.template for answer in found} == {"direct+critique_and_revise"}
    for ask, _ in found:
        assert [message["role"] for message in ask.messages] == ["user", "assistant", "user"]
        assert ask.messages[1]["content"] in drafts.values()
        assert "error" in ask.messages[2]["content"]


def test_topics_become_instructions_that_differ_and_are_answered(tmp_path):
    source = {"kind": "topics", "topics": ["tides", "bees"], "tasks": ["explain"], "per_combination": 6}
    tree = job_settings(tmp_path, prompts__templates=["instruction"], sampling__samples=1)
    tree["source"] = source
    assert run_job(tree, backend=InstructionBackend())
    asked = list(read_answers(tmp_path / "job/turns/instructions"))
    found = list(read_answers(tmp_path / "job/raw"))
    questions = [answer.ask.item.question for answer in found]
    assert len(asked) == 12 and 3 < len(questions) < 12
    assert len(set(questions)) == len(questions) and all(text.startswith("Explain subject") for text in questions)
    assert {answer.ask.item.fields["topic"] for answer in found} <= {"tides", "bees"}


def test_seeds_grow_in_rounds_without_what_is_like_a_seed(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seed = "Explain subject0 to reader0 using example0 and number0"
    seeds.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in (seed, "Sing.", "Write a poem.")))
    tree = job_settings(tmp_path, prompts__templates=["instruction"], sampling__samples=1)
    tree["source"] = {"kind": "seeds", "path": str(seeds), "rows": 12, "examples": 2, "rounds": 6}
    assert run_job(tree, backend=InstructionBackend())
    rounds = list((tmp_path / "job/turns").iterdir())
    questions = [answer.ask.item.question for answer in read_answers(tmp_path / "job/raw")]
    assert len(rounds) > 1 and len(questions) == 12 and seed not in questions


def test_no_new_instruction_at_all_is_told(tmp_path):
    tree = job_settings(tmp_path)
    tree["source"] = {"kind": "topics", "topics": ["tides"], "tasks": ["explain"]}
    with pytest.raises(GenerationError, match="none of 1 instructions"):
        run_job(tree, backend=ScriptedBackend(fail_on="Subject"))


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.9])
def test_prefix_filtering_finds_what_comparing_all_pairs_finds(limit):
    import random

    generator = random.Random(7)
    texts = [" ".join(generator.choices("abcdefghijkl", k=generator.randint(1, 9))) for _ in range(300)]
    kept: list[set[str]] = []
    distinct = Distinct(max_similarity=limit)
    for text in texts:
        words = set(text.split())
        new = all(len(words & other) / len(words | other) <= limit for other in kept)
        assert distinct.accept(text) == new
        if new:
            kept.append(words)
    assert 5 < len(kept) < 300


def _rows() -> list[dict[str, object]]:
    return [{"name": f"n{n}", "q": f"Question {n}?", "a": str(n), "level": n} for n in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_of_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    elif kind == "json":
        path.write_text(json.dumps(_rows()))
    elif kind == "csv":
        path.write_text("name,q,a,level\n" + "".join(",".join(map(str, row.values())) + "\n" for row in _rows()))
    else:
        pq.write_table(pa.Table.from_pylist(_rows()), path)
    source = RowSourceConfig(path=str(path), question="q", answer="a", id="name", skip_rows=1, max_rows=3)
    items = read_items(source)
    # A CSV file holds nothing but text.
    assert [(item.id, item.question, item.answer, item.fields) for item in items] == [
        (f"n{n}", f"Question {n}?", str(n), {"level": str(n) if kind == "csv" else n}) for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_stands_in_a_row_does_not_depend_on_other_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    answers = ["5", "007", "2020-01-01", "NA", "None", "1e5", "2.5", "True"]
    if kind == "csv":
        path.write_text("question,answer\n" + "".join(f"q{n},{text}\n" for n, text in enumerate(answers)))
    else:
        values = [5, *answers[1:6], 2.5, "True"]
        path.write_text("".join(json.dumps({"question": f"q{n}", "answer": v}) + "\n" for n, v in enumerate(values)))
    one = read_items(RowSourceConfig(path=str(path), answer="answer"))
    assert [item.answer for item in one] == answers
    # Nor does its name: what was paid for stays.
    two = read_items(RowSourceConfig(path=str(path), answer="answer", max_rows=2))
    assert [item.id for item in two] == [item.id for item in one[:2]]
    dates = tmp_path / "dates.jsonl"
    dates.write_text('{"question": "When?", "answer": "2020-01-01"}\n')
    assert read_items(RowSourceConfig(path=str(dates), answer="answer"))[0].answer == "2020-01-01"


def test_the_same_question_of_two_personas_is_two_rows_and_whole_doubles_are_one(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"question": "Why?", "persona": "{who}"}}\n' for who in ("a nurse", "a child", "a nurse", "a child")]
    path.write_text("".join(lines))
    found = read_items(RowSourceConfig(path=str(path)))
    assert [item.fields["persona"] for item in found] == ["a nurse", "a child"] and found[0].id != found[1].id
    assert "2 rows are left out" in caplog.text
    path.write_text(lines[0])
    assert read_items(RowSourceConfig(path=str(path))) == found[:1]


def test_a_row_may_lack_a_right_answer_but_not_a_question(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?", "answer": null, "score": NaN}\n{"question": "How?", "answer": "so"}\n')
    found = read_items(RowSourceConfig(path=str(path), answer="answer"))
    assert [item.answer for item in found] == [None, "so"]
    json.dumps(found[0].fields, allow_nan=False)
    path.write_text('{"question": " "}\n')
    with pytest.raises(DataError, match="'question': the column is empty in row 0"):
        read_items(RowSourceConfig(path=str(path)))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("rows.jsonl", '{"question": "Why?"}\n{"question"\n', r"rows\.jsonl:2 .*broken JSON"),
        ("rows.jsonl", '["Why?"]\n', "not an object"),
        ("rows.csv", "question,x\nWhy?,1,2\n", "line 2 .*more cells"),
        ("rows.csv", 'question\n"Why?\n', "cannot be read"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        read_items(RowSourceConfig(path=str(tmp_path / name)))


def test_rows_without_a_name_get_one_of_their_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?"}\n{"question": "How?"}\n{"question": "Why?"}\n')
    first = read_items(RowSourceConfig(path=str(path)))
    path.write_text('{"question": "How?"}\n{"question": "Why?"}\n')
    second = read_items(RowSourceConfig(path=str(path)))
    assert len(first) == 2 and {item.id for item in first} == {item.id for item in second}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": "prompt"}, "source.question = 'prompt'.*missing in row 0"),
        ({"answer": "gold"}, "source.answer = 'gold'"),
        ({"id": "kind"}, "rows 0 and 1 .* are both 'x'"),
        ({"path": "nowhere.jsonl"}, "no such file"),
        ({"skip_rows": 9}, "no row was read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, told):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?", "kind": "x"}\n{"question": "How?", "kind": "x"}\n')
    with pytest.raises(DataError, match=told):
        read_items(RowSourceConfig(**{"path": str(path), **change}))


def test_chat_records_give_question_and_answer(tmp_path):
    path = tmp_path / "chat.jsonl"
    said = [("assistant", "Hello."), ("user", "Why?"), ("assistant", "So."), ("user", "Oh.")]
    messages = [{"role": role, "content": text} for role, text in said]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (item,) = read_items(RowSourceConfig(path=str(path), question="messages", answer="messages"))
    assert (item.question, item.answer) == ("Why?", "So.")


class CutOffBackend(ScriptedBackend):
    """Never gets to an end on rows with a 1 in them."""

    def _written(self, ask):
        written = super()._written(ask)
        return replace(written, finish="length") if "1 and 1" in ask.messages[0]["content"] else written


@pytest.mark.parametrize(("change", "turns"), [({"prompts__turns": 3}, 1), ({"prompts__revise": True}, 3)])
def test_nothing_is_said_after_a_text_that_was_cut_off_unless_it_is_revised(tmp_path, change, turns):
    tree = job_settings(tmp_path, rows=3, **change)
    assert run_job(tree, backend=CutOffBackend())
    found = list(read_answers(tmp_path / "job/raw"))
    cut = [(len(ask.messages), written.finish) for ask, written in found if ask.item.id == "r1"]
    assert len(found) == 12 and cut == [(turns, "length")] * 4


@pytest.mark.parametrize("kind", ["rows", "topics", "seeds"])
@pytest.mark.parametrize("place", ["templates", "user_template", "revise_template"])
def test_a_template_that_will_lack_something_is_told_before_anything_is_written(tmp_path, kind, place):
    template = tmp_path / "wants.jinja"
    template.write_text("{% block user %}{{ question }} {{ mood }}{% endblock %}")
    name = [str(template)] if place == "templates" else str(template)
    tree = job_settings(tmp_path, prompts__turns=2, prompts__revise=True, **{f"prompts__{place}": name})
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Sing."}\n')
    if kind == "topics":
        tree["source"] = {"kind": "topics", "topics": ["tides"], "tasks": ["explain"]}
    elif kind == "seeds":
        tree["source"] = {"kind": "seeds", "path": str(tmp_path / "seeds.jsonl"), "rows": 2}
    backend = ScriptedBackend()
    with pytest.raises(DataError, match="'mood' is undefined"):
        run_job(tree, backend=backend)
    assert backend.asked == []


def test_a_round_that_a_later_one_made_up_for_is_not_asked_again(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"instruction": "Sing."}\n{"instruction": "Write a poem."}\n')
    tree = job_settings(tmp_path, prompts__templates=["instruction"], sampling__samples=1)
    tree["source"] = {"kind": "seeds", "path": str(seeds), "rows": 8, "examples": 1, "rounds": 6}
    assert run_job(tree, backend=InstructionBackend(fail_on="1. Sing."))
    finishes = [written.finish for _, written in read_answers(tmp_path / "job/turns/round_0")]
    assert {"failed", "stop"} <= set(finishes)
    again = InstructionBackend()
    assert run_job(changed(tree, output__retry_failed=True), backend=again) and again.asked == []


def test_other_seeds_are_another_job(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"instruction": "Sing."}\n')
    tree = job_settings(tmp_path, prompts__templates=["instruction"], sampling__samples=1)
    tree["source"] = {"kind": "seeds", "path": str(seeds), "rows": 4}
    assert run_job(tree, backend=InstructionBackend())
    seeds.write_text('{"instruction": "Dance."}\n')
    with pytest.raises(ConfigError, match="seeds: "):
        run_job(tree, backend=InstructionBackend())


def test_another_text_of_the_template_that_invents_instructions_is_refused(tmp_path):
    template = tmp_path / "new_instruction.jinja"
    template.write_text("{% block user %}A task about {{ topic }}, please.{% endblock %}")
    tree = job_settings(tmp_path, prompts__templates=["instruction"])
    tree["source"] = {"kind": "topics", "topics": ["tides"], "tasks": ["explain"], "template": str(template)}
    assert run_job(tree, backend=InstructionBackend())
    template.write_text("{% block user %}One more task about {{ topic }}.{% endblock %}")
    with pytest.raises(ConfigError, match=r"templates\.source\.template: "):
        run_job(tree, backend=InstructionBackend())
