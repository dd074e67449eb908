"""A judge's job: who is judged, what is asked, whose verdict counts, and that nothing is judged twice."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from factory.chat_fakes import chat_server, completion
from factory.endpoint_jobs import answered_and_judged
from teachers.remote_fakes import as_json

from largekd.config.curation import CurationConfig
from largekd.config.generate import EndpointBackendConfig, JudgeConfig
from largekd.curation.answer_shards import RAW_FOLDER, Answer, write_shard
from largekd.curation.examination import Examined, Span
from largekd.curation.records import Ask, Draw, Item, Parsed, Verdict, Written
from largekd.errors import ConfigError
from largekd.factory.judge import JUDGE_FOLDER, JudgedRows, judge_asks, open_keys, stored_verdicts

DRAW = Draw(temperature=1.0, top_p=1.0, top_k=None, min_p=0.0, max_new_tokens=9, stop=())


class ByText:
    """Knows the answers "2" and "3" alone, and has to see whole rows."""

    def __init__(self):
        self.seen: list[tuple[str, str]] = []

    def examine(self, answers: Sequence[Answer]) -> list[Examined]:
        self.seen += [(ask.item.id, written.text) for ask, written in answers]
        known = {"2": "right", "3": "wrong"}
        texts = [written.text for _, written in answers]
        return [Examined(Parsed(answer=text), Verdict(known.get(text, "unknown"), "rule")) for text in texts]

    def spans(self, parsed: Parsed, text: str) -> list[Span]:
        return [Span(name="answer", start=0, end=len(text))]


def answers(*texts: str | None) -> list[Answer]:
    """Two samples to a row."""
    found = []
    for number, text in enumerate(texts):
        item = Item(f"row{number // 2}", f"1+1, {number // 2}?", answer="2")
        ask = Ask(item, "t", number % 2, DRAW, 0, ({"role": "user", "content": item.question},))
        written = Written(ask.key, text or "", "failed" if text is None else "stop", 1, 1)
        found.append(Answer(ask, written))
    return found


def test_only_what_no_rule_knows_is_judged_unless_all_is_asked_for():
    given = answers("2", "two", None, "II", "3", "3")
    examiner = ByText()
    rows = [given[0:2], given[2:4], given[4:6]]
    unknown = open_keys(rows, config=JudgeConfig(), curation=CurationConfig(), examiner=examiner)
    assert set(unknown) == {given[1].written.key, given[3].written.key}
    # Whole rows, for votes.
    texts = ["2", "two", "", "II", "3", "3"]
    assert examiner.seen == [(f"row{place // 2}", text) for place, text in enumerate(texts)]
    judge, curation = JudgeConfig(answers="all"), CurationConfig()
    everything = open_keys(rows[::-1], config=judge, curation=curation, examiner=ByText())
    assert set(everything) == {one.written.key for one in given if one.written.finish != "failed"}


@pytest.mark.parametrize("which", ["unknown", "all"])
def test_what_is_dropped_in_any_case_is_not_judged(which):
    ask, written = answers("two")[0]
    rows = [[Answer(ask, replace(written, finish="length"))]]
    for keep, expected in ((False, []), (True, [written.key])):
        curation = CurationConfig(keep_unparsed=keep)
        assert open_keys(rows, config=JudgeConfig(answers=which), curation=curation, examiner=ByText()) == expected


def test_the_judge_is_shown_question_answer_and_text_in_an_order_of_its_own():
    given = answers("two", "II")
    config = JudgeConfig(samples=2, temperature=0.5, max_new_tokens=77)
    keys = [one.written.key for one in given]
    asks = judge_asks(given, keys=keys, config=config)
    assert [ask.key for ask in asks] == [ask.key for ask in judge_asks(given[::-1], keys=keys[::-1], config=config)]
    assert len({ask.key for ask in asks}) == 4 and {ask.item.id for ask in asks} == set(keys)
    assert len({ask.seed for ask in asks}) == 4 and {ask.draw.max_new_tokens for ask in asks} == {77}
    texts = {ask.item.id: ask.messages[-1]["content"] for ask in asks}
    for one in given:
        assert one.written.text in texts[one.written.key] and "1+1, 0?" in texts[one.written.key]
    assert judge_asks(given, keys=keys[:1], config=JudgeConfig())[0].item.id == keys[0]
    with pytest.raises(ConfigError, match=r"judge\.template"):
        judge_asks(given, keys=keys, config=JudgeConfig(template="no_such"))


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (["Verdict: right", "Verdict: right", "Verdict: wrong"], "right"),
        (["Verdict: right", "Verdict: wrong", "hm"], "unknown"),
        (["Verdict: wrong", None, "Verdict: wrong"], "wrong"),
        ([None, None, None], "unknown"),
    ],
)
def test_most_samples_decide(tmp_path, said, outcome):
    given = answers("two")
    key = given[0].written.key
    asks = judge_asks(given, keys=[key], config=JudgeConfig(samples=3))
    judged = [
        Answer(ask, Written(ask.key, text or "", "failed" if text is None else "stop", 1, 1))
        for ask, text in zip(asks, said, strict=True)
    ]
    for folder, shard in ((RAW_FOLDER, given), (JUDGE_FOLDER, judged)):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder, number=0, answers=shard)
    assert stored_verdicts(tmp_path, config=JudgeConfig(samples=3))[key].outcome == outcome
    others = JudgeConfig(samples=3, temperature=1.0)
    assert stored_verdicts(tmp_path, config=others) == {}, "verdicts of other draws do not count"


def test_a_judge_completes_rules_or_replaces_them():
    given = answers("2", "two")
    verdicts = {one.written.key: Verdict("wrong", "judge") for one in given}
    for which, expected in (("unknown", ["right", "wrong"]), ("all", ["wrong", "wrong"])):
        rows = JudgedRows(ByText(), verdicts=verdicts, config=JudgeConfig(answers=which))
        examined = rows.examine(given)
        assert [verdict.outcome for _, verdict in examined] == expected
        assert [parsed.answer for parsed, _ in examined] == ["2", "two"]
        assert rows.spans(Parsed(answer="two"), "two") == [Span(name="answer", start=0, end=3)]
    unjudged = JudgedRows(ByText(), verdicts={}, config=JudgeConfig(answers="all"))
    assert [verdict.how for _, verdict in unjudged.examine(given)] == ["rule", "rule"]


def test_two_ranks_judge_once_and_another_judge_is_refused(two_ranks, tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "job"
    rows.write_text("".join(json.dumps({"question": f"How much is {n} + {n}?"}) + "\n" for n in range(6)))

    def judging(question, good):
        return as_json(completion("It is. Verdict: right" if "2 + 2" in question else "No. Verdict: wrong"))

    with chat_server() as writer, chat_server(judging) as judge:
        tree = {
            "output": {"dir": str(folder)},
            "source": {"path": str(rows)},
            "backend": {"kind": "endpoint", "url": writer.url, "model": "m"},
            "judge": {"backend": {"kind": "endpoint", "url": judge.url, "model": "j"}, "samples": 2},
            "sampling": {"max_new_tokens": 20},
            "log": {"progress": False},
        }
        first, second = two_ranks.run(answered_and_judged, tree=tree)
        assert first == second and sorted(first.values()) == ["right"] + ["wrong"] * 5
        assert len(writer.requests) == 6 and len(judge.requests) == 12
        assert {request["temperature"] for request in judge.requests} == {0.0}
        again = two_ranks.run(answered_and_judged, tree=tree)
        assert again == [first, first] and len(writer.requests) == 6 and len(judge.requests) == 12
        tree["judge"]["backend"]["model"] = "another"
        for told in two_ranks.run(answered_and_judged, tree=tree):
            assert "another judge" in told and "writer.model: 'j' -> 'another'" in told
    assert EndpointBackendConfig(**tree["judge"]["backend"]).model == "another"
    assert len(judge.requests) == 12
