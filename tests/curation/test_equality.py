"""When two answers are the same."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largekd.curation.equality import Options, choice, exact, folded, letter_of, numeric, options_of, symbolic
from largekd.curation.mathematics import WORKER, Mathematics, latex_of
from largekd.curation.wording import formed_apart, worded_apart
from largekd.errors import DataError


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Mathematics]:
    with Mathematics(cpu_s=3.0) as found:
        yield found


def test_text() -> None:
    assert folded("  The  Answer. ") == "answer"
    assert exact("East", r"\text{ east }").same
    assert exact("it's", "It’s!").same
    assert not exact("east", "west").same
    assert not exact("!", ".").same, "nothing is left of either"
    assert not exact("x'", "x").same
    assert exact("'x'", "x").same


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("18", "$18.00", True), ("18", "18 dollars", True), ("18", "19", False), ("-5", "5", False), ("-5", "−5", True),
        ("0.5", "1/2", True), ("1/2", "2/1", False), ("0.5", "50", False), ("50", "0.5", False), ("0.5", "50%", True),
        ("50%", "0.5", True), ("50%", "50", True), ("50", "50%", True), ("50%", "5%", False), ("0.5", "0.5%", False),
        ("1000", "1,000", True), ("1000", "1,001", False), ("1.5", r"1\frac{1}{2}", True), ("3e5", "300,000", True),
        ("5 km", "5000 m", True), ("5 km", "5", True), ("5 km", "5 m", False), ("5 km", "5 kg", False),
        ("5", "5 km", True),
        ("2 hours", "120 minutes", True), ("90 km/h", "25 m/s", True), ("12 m^2", "12 square meters", True),
        ("12 m^2", "12 m", False), ("0.333333", "1/3", False), ("0.3333333", "1/3", True), ("0", "0.0000001", True),
        ("1", "1%", False), ("1", "100%", True), ("-5", "minus 5", True), ("60 eggs", "5 dozen eggs", True),
        ("50 cents", "$0.50", True), ("$5", "5 cents", False), ("$5", "€5", False), ("£5", "5 pounds", True),
        ("5 euros", "5 dollars", False), ("12 inches", "12 feet tall", False), ("12 m^2", r"12\text{ m}^2", True),
        ("5 cm^2", r"5\text{ cm}", False), ("5 km", "5 in total", True), ("x=5", "y=5", False), ("5", "y = 5", True),
        ("20% increase", "20% decrease", False), ("1 am", "1 p.m.", False), ("gain of $5", "loss of $5", False),
        ("5", "not 5", None), ("5", "It isn't 5", None), ("5", "less than 5", None), ("5", "at least 5", None),
        ("5", "5 or more", None), ("5", "half of 5", None), ("5", "5 squared", None), ("5", "over 5", None),
        ("5", "twice $5", None), ("5", "She needs 5 more apples", True), ("5", "He ran 5 times", True),
        ("5", r"x \ge 5", None), ("5", "x ≥ 5", None), ("5", r"\pm 5", None), ("5", "± 5", None), ("5", "5M", None),
        ("5 R2", "5 R3", None), ("52", "52_8", None), ("5", "5...", None), ("5", "5 M", None),
        ("0", "0.1", False), ("5", "five or six", None), ("5", "5 or 6", None), ("5", "x+5", None), ("five", "5", None),
    ],
)  # fmt: skip
def test_numbers_with_units_and_percent(gold: str, answer: str, same: bool | None) -> None:
    assert numeric(gold, answer, tolerance=1e-6).same is same


PIECES = "5 1/2 50% -3 x = ≥ \\pm \\text{ } cents $ km not at least dozen am (A) B. _2 ! , { \\{ \ud800"
WORDED = st.lists(st.sampled_from(PIECES.split()), max_size=6).map(" ".join)


@given(gold=WORDED, answer=st.one_of(WORDED, st.text(max_size=30)))
@settings(max_examples=300, deadline=None)
def test_comparing_never_raises_and_finds_nothing_unequal_to_itself(gold: str, answer: str) -> None:
    numeric(gold, answer, tolerance=1e-6)
    worded_apart(gold, answer)
    formed_apart(gold, answer)
    choice(gold, answer, options=Options(("x", answer), ("1", "2")))
    assert numeric(answer, answer, tolerance=1e-6).same is not False
    assert worded_apart(answer, answer) is None
    for changed in (f"not {answer}", f"{answer} or more"):
        assert "5" not in answer or numeric("5", changed, tolerance=1e-6).same is not True


def test_tolerance_is_relative() -> None:
    assert numeric("1000000", "1000100", tolerance=1e-3).same
    assert not numeric("1", "1.01", tolerance=1e-3).same
    assert not numeric("123456789", "123456788", tolerance=1e-6).same, "nothing was rounded"
    assert numeric("123456789", "1.234568e8", tolerance=1e-5).same
    assert numeric("12345678.9", "12345679", tolerance=1e-6).same
    assert numeric("1/3", "1/3", tolerance=0.0).same


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"\frac{1}{2}", "1/2", True), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("sqrt(2)/2", r"\sqrt{2}/2", True),
        ("x^2+2x+1", "(x+1)**2", True), ("x^2+2x+1", "(x-1)^2", False), (r"\frac{x^2-1}{x-1}", "x+1", True),
        ("-x", "x", False), ("2x", "x^2", False), ("(1,2)", "(1, 2)", True), ("(1,2)", "(2,1)", False),
        ("[1,2)", "[1,2]", False), ("[1,2)", r"\left[1,2\right)", True), (r"\{1,2,3\}", "{3,2,1}", True),
        (r"\{1,2\}", "{1,2,3}", False), ("1,2,3", "3,2,1", True), (r"(-\infty,3]", "(-inf, 3]", True),
        (r"(-\infty,3]\cup[5,\infty)", "(-∞,3]∪[5,∞)", True), ("x=5", "5", True), ("5", "x = 5", True),
        ("x > 3", "3 < x", True),
        ("x > 3", "x < 3", False), (r"2\pi", "2π", True), (r"2\pi", "2*pi", True), (r"2\pi", "6.28", False),
        ("3+4i", "4i+3", True), ("3+4i", "3-4i", False), (r"\text{east}", "East", True),
        (r"\text{east}", "west", False),
        ("5", r"x \ge 5", False), (r"x \ne 5", "5", False), (r"x \ne 5", "x = 5", False), ("x ≥ 5", "5", False),
        (r"x \ge 5", r"[5, \infty)", True), (r"\pm 5", "5", False), (r"\pm 5", "5, -5", True), ("10_3", "10_4", False),
        ("52", "52_8", None), ("52_8", "52", True), ("(1,2)", r"\{1,2\}", None), ("x=1,y=2", "2,1", None),
        ("cat", "act", None), ("cat", "dog", False), ("5!", "5", False), ("5", "5!", True), ("5", r"5\text{0}", None),
        ("5", r"\text{not }5", None), (r"5\text{ cents}", r"\$5", False),
        ("50\\%", "0.5", True), (r"90^\circ", "90", True), (r"\log_2 8", "3", True), ("5!", "120", True),
        ("2^{-1}", "0.5", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", False),
    ],
)  # fmt: skip
def test_formulas(mathematics: Mathematics, gold: str, answer: str, same: bool) -> None:
    assert symbolic(gold, answer, tolerance=1e-6, mathematics=mathematics).same is same


def test_plain_notation_becomes_latex() -> None:
    assert latex_of("$x^2$") == latex_of(r"\( x^2 \)") == latex_of(r"\[x^2\]") == "x^2"
    assert latex_of(r"\$40") == "40"
    assert latex_of("sqrt(2)") == r"\sqrt{2}"
    assert latex_of("{1,2}") == r"\{1,2\}"
    assert latex_of(r"\sin x").strip() == r"\sin x"


def test_hostile_formulas_end() -> None:
    with Mathematics(cpu_s=0.5) as mathematics:
        for hostile in (r"9^{9^{9^{9}}}", r"\sum_{n=1}^{100000000} \frac{1}{n}", "(10^8)!"):
            found = mathematics.equal(gold="1", answer=hostile)
            assert found.equal is not True, hostile
        assert found.why == "not decided within 0.5 CPU seconds"
        assert mathematics.equal(gold=r"\frac{2}{4}", answer="0.5").equal is True, "the next one is answered"


def test_the_worker_refuses_to_evaluate() -> None:
    worker = runpy.run_path(str(WORKER))
    assert worker["read_number"]("12") == 12
    assert float(worker["read_number"]("-1.5e2")) == -150
    for text in ("__import__('os')", "x", "1+1", "9**9", "1e9999", ""):
        with pytest.raises(ValueError, match="is no number"):
            worker["read_number"](text)
    forbid = worker["forbid"]
    refused = [
        ("os.system", ("ls",)),
        ("subprocess.Popen", ("ls", [], None, None)),
        ("socket.connect", (None, None)),
        ("open", ("f", "w", 0)),
        ("compile", (b"__import__('os')", "<string>")),
        ("compile", ("def monomial_mul(a): __import__", "<string>")),
    ]
    for event, arguments in refused:
        with pytest.raises(PermissionError):
            forbid(event, arguments)
    for event, arguments in (("open", ("f", "r", 0)), ("compile", ("def monomial_mul(A, B): return A", "<string>"))):
        forbid(event, arguments)


def test_nothing_is_evaluated(mathematics: Mathematics, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for code in (f"__import__('os').system('touch {trace}')", f"open('{trace}','w')", f"exec(open('{trace}','w'))"):
        for text in (
            code,
            f"$x$ {code}",
            rf"\text{{{code}}}",
            rf"\operatorname{{{code}}}",
            f"1+{code}",
            f"[{code}, 1]",
        ):
            assert mathematics.equal(gold="1", answer=text).equal is not True
    assert not trace.exists()
    assert mathematics.equal(gold="1", answer="x" * 501).equal is None
    assert mathematics.equal(gold="1", answer="\\frac{").equal is None
    assert mathematics.equal(gold="1", answer="\ud800\n[").equal is not True


def test_a_process_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(1)", encoding="utf-8")
    monkeypatch.setattr("largekd.curation.mathematics.WORKER", broken)
    with Mathematics() as mathematics, pytest.raises(DataError, match="math-verify"):
        mathematics.equal(gold="x", answer="y")


def test_choices() -> None:
    options = Options(("Paris", "Rome", "a dog"))
    rome = ("B", "(b)", "B. Rome", "rome", "option B", "**B**", r"\text{B}", r"\textbf{(B)}", "$B$")
    assert {letter_of(text, options=options) for text in rome} == {"B"}
    assert letter_of("a dog", options=options) == "C"
    several = ("(A) or (B)", "(A)(B)", "A) and B)", "A. Paris B. Rome", "**A** and **B**", "B.C")
    denied = ("(B) is wrong", "B. This isn't it")
    for text in ("a cat", "Berlin", "E", "", "B) Paris", *several, *denied):
        assert letter_of(text, options=options) is None, text
    assert choice("B", "(B) Rome", options=options).same is True
    assert choice("Rome", "B", options=options).same is True
    assert choice("1", "B", options=options).same is True, "a place from 0"
    assert choice("A", "B", options=options).same is False
    assert choice("B", "none of these", options=options).same is None
    assert options_of({"options": {"B": "y", "A": "x"}}) == (("x", "y"), ("A", "B"))
    assert options_of({"options": "abc"}) == ((), ())


def test_choices_by_the_labels_of_a_data_set() -> None:
    numbered = options_of({"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}})
    assert choice("1", "A", options=numbered).same is True, "a label, not a place from 0"
    assert choice("1", "B", options=numbered).same is False
    assert choice("2", "(2)", options=numbered).same is True
    turned = options_of({"choices": {"text": ["x", "y"], "label": ["B", "A"]}})
    assert choice("A", "y", options=turned).same is True
    clash = options_of({"choices": {"text": ["3", "1"], "label": ["1", "2"]}})
    assert choice("1", "A", options=clash).same is None, "a label and another option's text"
