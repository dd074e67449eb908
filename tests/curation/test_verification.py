"""Verdicts on answers, on rows of samples, and of judges."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from largekd.config.curation import CurationConfig, VerifyConfig
from largekd.curation.equality import exact
from largekd.curation.judge import judge_verdict
from largekd.curation.mathematics import Mathematics
from largekd.curation.parsing import parse
from largekd.curation.records import Item, Parsed
from largekd.curation.verification import Means, gold_of, output_answer, verify, verify_row
from largekd.curation.votes import vote


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: str = "ok"
    stdout: str = ""


@dataclass(frozen=True)
class Outcome:
    """What tests said."""

    passed: bool
    problems: Sequence[str] = ()


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Mathematics]:
    with Mathematics(cpu_s=3.0) as found:
        yield found


def item(answer: str | None = "18", **more: Any) -> Item:
    return Item(id="a", question="q", answer=answer, **more)


def verdict(answer: str | None, gold: str | None = "18", *, kind: Any = "numeric", **more: Any) -> tuple[str, str]:
    parsed = Parsed(answer=answer, program=more.pop("program", None), problem=None if answer else "no final answer")
    result = more.pop("result", None)
    config = VerifyConfig(kind=kind, **more)
    found = verify(parsed, item(gold), config=config, program_result=result)
    return found.outcome, found.how


def test_kinds() -> None:
    assert verdict("$18.00") == ("right", "numeric")
    assert verdict("19") == ("wrong", "numeric")
    assert verdict("some") == ("unknown", "numeric")
    assert verdict(None) == ("unknown", "numeric")
    assert verdict("18", None) == ("unknown", "numeric")
    assert verdict("18", kind="none") == ("unknown", "none")
    assert verdict("Paris.", "paris", kind="exact") == ("right", "exact")
    assert verdict("(B)", "B", kind="choice") == ("right", "choice")
    assert verdict("18.1", tolerance=0.01) == ("right", "numeric")


def test_formulas(mathematics: Mathematics) -> None:
    config = VerifyConfig(kind="symbolic")
    means = Means(mathematics=mathematics)
    for answer, outcome in (("(x+1)^2", "right"), ("(x-1)^2", "wrong"), (r"\frac{", "unknown"), (None, "unknown")):
        found = verify(Parsed(answer=answer), item("x^2+2x+1"), config=config, means=means)
        assert found.outcome == outcome, (answer, found)


def test_a_solution_as_the_right_answer() -> None:
    assert gold_of(item("She sells 9.\n#### 18")) == "18"
    assert gold_of(item(r"Thus $\boxed{\frac12}$.")) == r"\frac12"
    assert gold_of(item("The answer is 7")) == "The answer is 7"
    assert verdict("18", "9 * 2 = <<9*2=18>>18\n#### 18") == ("right", "numeric")


def test_unit_tests() -> None:
    asked = []

    def run(code: str, tests: str) -> Outcome:
        asked.append((code, tests))
        return Outcome("good" in code, () if "good" in code else ("assert f(1) == 2 failed",))

    config, means = VerifyConfig(kind="tests"), Means(run_tests=run)
    with_tests = item(None, tests="assert f(1) == 2")
    good = verify(Parsed(program="good"), with_tests, config=config, means=means)
    bad = verify(Parsed(program="bad"), with_tests, config=config, means=means)
    assert (good.outcome, bad.outcome, bad.detail) == ("right", "wrong", "assert f(1) == 2 failed")
    assert asked == [("good", "assert f(1) == 2"), ("bad", "assert f(1) == 2")]
    assert verify(Parsed(problem="cut off"), with_tests, config=config, means=means).detail == "cut off"
    assert verify(Parsed(program="good"), item(), config=config, means=means).outcome == "unknown"
    assert len(asked) == 2, "nothing runs without tests or without a program"


def test_programs() -> None:
    run: dict[str, Any] = {"programs": "run", "program": "print(18)"}
    assert verdict("5", result=Ended(stdout="working\n18\n"), **run) == ("right", "numeric")
    assert verdict("18", result=Ended(stdout="The answer is 19.\n"), **run) == ("wrong", "numeric")
    assert verdict("18", result=Ended("timeout", "18"), **run) == ("wrong", "program")
    assert verdict("18", result=Ended(), **run) == ("wrong", "program")
    assert verdict("18", result=None, **run) == ("unknown", "program")
    assert verdict("18", programs="run") == ("right", "numeric"), "no program: the text's answer"
    assert output_answer("x\nresult: 5\n\n") == "result: 5"
    assert output_answer("Answer: 5") == "5"
    assert output_answer(" \n") is None


def test_text_and_program_must_agree() -> None:
    agree: dict[str, Any] = {"programs": "must_agree", "program": "p"}
    assert verdict("18", result=Ended(stdout="18.0"), **agree) == ("right", "numeric")
    assert verdict("18", result=Ended(stdout="19"), **agree) == ("wrong", "agreement")
    assert verdict("19", result=Ended(stdout="19"), **agree) == ("wrong", "numeric")
    assert verdict(None, result=Ended(stdout="18"), **agree) == ("right", "numeric"), "the program's alone"
    assert verdict("18", None, kind="none", result=Ended(stdout="18"), **agree) == ("right", "agreement")
    assert verdict("east", None, kind="none", result=Ended(stdout="East"), **agree) == ("right", "agreement")
    assert verdict("18", None, kind="none", result=Ended(stdout="17"), **agree) == ("wrong", "agreement")


def outcomes(answers: Sequence[str | None], **settings: Any) -> str:
    config = VerifyConfig(**{"kind": "majority", **settings})
    row = item(None, fields={"choices": ["x", "y", "z"]}) if settings.pop("choices", False) else item(None)
    found = verify_row([Parsed(answer=answer) for answer in answers], row, config=config)
    return "".join({"right": "R", "wrong": "W", "unknown": "?"}[one.outcome] for one in found)


def test_majority() -> None:
    assert outcomes(["18", "$18.00", "17", "18 dollars"]) == "RRWR"
    assert outcomes(["18", "17", "18", "17"]) == "????", "a tie"
    assert outcomes(["18", "18", None, None, None]) == "?????", "two of five"
    assert outcomes(["18", "18", None, None, None], agree_share=0.4) == "RR???"
    assert outcomes(["18"]) == "?"
    assert outcomes(["18", "17", "16"], agree_share=0.1) == "???", "nobody agrees with anybody"
    assert outcomes([None, None]) == "??"
    assert outcomes(["east", "East.", "west"]) == "RRW"


def test_votes_are_counted_over_all_samples() -> None:
    found = vote(["a", "A", "b", None], same=lambda one, other: exact(one, other).same, agree_share=0.5)
    assert found.groups == ((0, 1), (2,))
    assert found.winner == 0
    assert found.why == "2 of 4 samples agree"
    tie = vote(["a", "a", "b", "b", "c"], same=lambda one, other: one == other, agree_share=0.1)
    assert tie.winner is None
    assert tie.why == "a tie of 2 answers with 2 of 5 each"
    unsure = vote(["a", "b"], same=lambda one, other: None, agree_share=0.1)
    assert unsure.groups == ((0,), (1,)), "unknown is different"


def test_votes_of_programs() -> None:
    parsed = [Parsed(answer="1", program="p"), Parsed(answer="3", program="p"), Parsed(program="p"), Parsed(answer="4")]
    ended = [Ended(stdout="4"), Ended(stdout="4"), Ended("error"), None]
    config = VerifyConfig(kind="majority", programs="run")
    found = verify_row(parsed, item(None), config=config, program_results=ended)
    assert [one.outcome for one in found] == ["right", "right", "wrong", "right"]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("Both say 18.\nVerdict: correct", "right"),
        ("**Verdict:** Incorrect.", "wrong"),
        ("Verdict: not correct", "wrong"),
        ('{"reason": "ok", "verdict": "correct"}', "right"),
        ("The steps are fine. [[incorrect]]", "wrong"),
        (r"Final decision: \boxed{correct}", "right"),
        (r"\boxed{\text{incorrect}}", "wrong"),
        ("First I thought. Verdict: correct. Wait.\nVerdict: incorrect", "wrong"),
        ("Reasoning here.\n\nYes.", "right"),
        ("no", "wrong"),
        ("<think>Verdict: correct? No.</think>\nVerdict: incorrect", "wrong"),
        ("<think>Verdict: correct", "unknown"),
        ("The correct answer is 18 and the student wrote 18.", "unknown"),
        ("Verdict: unsure", "unknown"),
        ("Verdict: correct, since both are 18.", "right"),
        ("Verdict: correct or incorrect", "unknown"),
        ("Verdict: correct/incorrect", "unknown"),
        ("Verdict: [correct]", "right"),
        ("Correct?", "unknown"),
        ("Verdict: correct? It is not.", "unknown"),
        ("Verdict: correct reasoning but incorrect answer", "unknown"),
        ("Verdict: correct, but the unit is missing", "unknown"),
        ("The student wrote 'Verdict: correct'. I do not agree.", "unknown"),
        ("The student wrote: Verdict: correct\nIncorrect.", "wrong"),
        ("", "unknown"),
    ],
)
def test_judges(text: str, outcome: str) -> None:
    found = judge_verdict(text)
    assert (found.outcome, found.how) == (outcome, "judge")


def test_a_judge_that_was_cut_off_has_said_nothing() -> None:
    assert judge_verdict("Verdict: correct", finish="length").outcome == "unknown"


def test_texts_of_a_row_are_parsed_and_verified(mathematics: Mathematics) -> None:
    texts = [
        "#### 18",
        "```python\nprint(18)\n```",
        "```python\nprint(7)\n```",
        "Answer: 36/2",
        "I do not know, sorry to say.",
    ]
    parsed = [parse(text, finish="stop", config=CurationConfig()) for text in texts]
    ended = [None, Ended(stdout="18\n"), Ended(stdout="7\n"), None, None]
    config, means = VerifyConfig(kind="symbolic", programs="run"), Means(mathematics=mathematics)
    found = verify_row(parsed, item(), config=config, program_results=ended, means=means)
    assert [one.outcome for one in found] == ["right", "right", "wrong", "right", "unknown"]
    assert found[-1].detail == "no final answer (answer_format: auto)"


def test_votes_compare_formulas(mathematics: Mathematics) -> None:
    texts = (r"\boxed{\frac{1}{2}}", "Answer: 0.5", "The answer is sqrt(1/4).", "#### 2")
    parsed = [parse(text, finish="stop", config=CurationConfig()) for text in texts]
    config, means = VerifyConfig(kind="majority"), Means(mathematics=mathematics)
    found = verify_row(parsed, item(None), config=config, means=means)
    assert [one.outcome for one in found] == ["right", "right", "right", "wrong"]
