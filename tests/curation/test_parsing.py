"""Texts taken apart: realistic outputs, and properties that hold for every text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largekd.config.curation import CurationConfig
from largekd.curation.final_answers import FINDERS
from largekd.curation.parsing import CUT_OFF, parse, spans_of
from largekd.curation.records import Parsed

OUTPUTS = [
    json.loads(line) for line in Path(__file__).with_name("outputs.jsonl").read_text(encoding="utf-8").splitlines()
]
FORMATS = sorted(FINDERS)
MARKS = (
    "<think>|</think>|\\boxed{|}|{|#### |Answer:| the answer is |**|$|\n|\n\n|```python\n|```|\n```\n|1. |2) |Step 1:"
    '|- |(B)|B.|{"answer": "|"|42|3.5| |.|\\frac{1}{2}|print(1)|x = 5|<answer>|</answer>|é|٤٢|🙂|\\|\r\n|\ud800'
)
PIECES = st.sampled_from(MARKS.split("|"))
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=30).map("".join))


def parsed(text: str, *, finish: Any = "stop", format: str = "auto") -> Parsed:
    return parse(text, finish=finish, config=CurationConfig(answer_format=format))


def test_there_are_enough_outputs() -> None:
    assert len({one["name"] for one in OUTPUTS}) == len(OUTPUTS) >= 60


@pytest.mark.parametrize("case", OUTPUTS, ids=[one["name"] for one in OUTPUTS])
def test_outputs(case: dict[str, Any]) -> None:
    found = parsed(case["text"], finish=case["finish"], format=case["format"])
    assert found.answer == case["answer"]
    expected = {name: case[name] for name in ("program", "reasoning", "problem") if name in case}
    assert {name: getattr(found, name) for name in expected} == expected
    if "steps" in case:
        assert list(found.steps) == case["steps"]


@given(text=TEXTS, finish=st.sampled_from(["stop", "length", "failed"]), format=st.sampled_from(FORMATS))
@settings(max_examples=400, deadline=None)
def test_parsing_never_raises_and_never_invents(text: str, finish: Any, format: str) -> None:
    found = parsed(text, finish=finish, format=format)
    for part in (found.answer, found.program, found.reasoning, *found.steps):
        assert part is None or (part and part in text)
    assert found == parsed(text, finish=finish, format=format)
    if finish != "stop" or not text.strip():
        assert found.problem
    if found.problem is None and format != "none":
        assert found.answer or found.program


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_parsing_an_answer_again_gives_the_answer(text: str) -> None:
    found = parsed(text, format="boxed").answer
    if found is not None:
        assert parsed(f"So \\boxed{{{found}}}.", format="boxed").answer == found


@given(text=TEXTS, cut=st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_a_cut_text_keeps_no_more_than_it_shows(text: str, cut: int) -> None:
    head = text[:cut]
    found = parsed(head, finish="length")
    assert found.problem is not None
    if found.answer is not None:
        # Something stands behind the answer, so that more tokens could not have made it longer.
        assert head.index(found.answer) + len(found.answer) < len(head)
    if found.program is not None:
        assert "```" in head[head.index(found.program) + len(found.program) :]


@given(text=TEXTS, format=st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_spans_are_places_of_the_parts(text: str, format: str) -> None:
    found = parsed(text, format=format)
    spans = spans_of(found, text)
    for span in spans:
        words = text[span["start"] : span["end"]]
        assert words
        if span["name"] == "answer":
            assert words == found.answer
        elif span["name"] == "program":
            assert words == found.program
        else:
            assert words in (found.reasoning or "")
    assert {span["name"] for span in spans} >= {name for name in ("answer", "program") if getattr(found, name)}


def named(text: str) -> list[tuple[str, str]]:
    return [(span["name"], text[span["start"] : span["end"]]) for span in spans_of(parsed(text), text)]


def test_spans_of_texts() -> None:
    assert named("3 cats and 3 dogs.\n\nThe answer is 3. I like 3.") == [
        ("reasoning", "3 cats and 3 dogs."),
        ("answer", "3"),
    ]
    text = "3 cats.\nThe answer is 3. I like 3."
    (_, answer) = spans_of(parsed(text), text)
    assert answer["start"] == text.index("3. I like"), "where it is marked, not where it also stands"
    assert named("<think>We need\n```python\nprint(1)\n```\nthen</think>\n#### 4") == [
        ("reasoning", "We need\n```python\nprint(1)\n```\nthen"),
        ("answer", "4"),
    ]
    assert named("Compute:\n```python\nprint(4)\n```\nSo it is 4.\nAnswer: 4") == [
        ("reasoning", "Compute:\n```python"),
        ("program", "print(4)"),
        ("reasoning", "```\nSo it is 4."),
        ("answer", "4"),
    ]


def test_spans_are_where_the_part_stands_and_not_where_its_characters_do() -> None:
    thinking = "<think>First \\boxed{18}, no: \\boxed{8}.</think>\nThe answer is 8."
    (_, answer) = spans_of(parsed(thinking), thinking)
    assert answer == {"name": "answer", "start": len(thinking) - 2, "end": len(thinking) - 1}
    other = "In box \\boxed{18} there are\nAnswer: 8\nmore"
    assert spans_of(parsed(other, format="answer_line"), other)[-1]["start"] == other.index("8\nmore")
    named_again = "Run:\n```python\nprint(4)\n```\nHere print(4) gives 4."
    (program,) = [span for span in spans_of(parsed(named_again), named_again) if span["name"] == "program"]
    assert program["start"] == named_again.index("print(4)")
    tag = "<think>i</think>\n#### 4"
    assert spans_of(parsed(tag), tag)[0] == {"name": "reasoning", "start": 7, "end": 8}


def test_spans_of_a_message_made_of_parts() -> None:
    found = parsed("<think>4 + 4 is 8</think>\n\\boxed{8}")
    message = "Answer: 8"
    assert spans_of(found, message) == [{"name": "answer", "start": 8, "end": 9}]
    assert spans_of(found, "nothing of it") == []
    assert spans_of(found, "18 or 8?") == [{"name": "answer", "start": 6, "end": 7}], "no part of another number"


def test_long_and_hostile_texts_take_linear_time() -> None:
    marks = ["\\boxed{", "<think>", "**", "```python\n", '"answer": "', "1. ", "answer is ", "{", "$", "####", " "]
    marks += [
        "<answer>",
        "Answer:\n\n",
        "Answer: not " + "word " * 13 + "\n",
        "\\(",
        "' ",
        "Answer:",
        "so: ",
        "\\boxed{5},",
    ]
    for piece in marks:
        found = parsed(piece * 20_000, finish="length")
        assert found.problem is not None
        assert found.problem.startswith((CUT_OFF, "nothing"))
    announced = parsed("so " * 100_000 + "\n#### 5")
    assert announced.answer == "5"
    assert spans_of(announced, "Answer: **" * 10_000 + "5") == [{"name": "answer", "start": 100_000, "end": 100_001}]
    spaces = " " * 100_000
    for text in (
        "Answer" + spaces,
        "1" + spaces + "!",
        "#### 1" + spaces + "!",
        spaces + "x y z " * 100,
        "answer is" + spaces,
    ):
        assert parsed(text).answer in (None, text.strip())
