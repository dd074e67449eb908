"""Numbers and units as models write them."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largekd.curation.numbers import read_quantity
from largekd.curation.units import converted, read_unit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("-3.5", "-7/2"), ("−7", -7), ("+4", 4), ("1,234.5", "2469/2"), ("1 000 000", 1_000_000),
        ("1.234,56", "123456/100"), ("0,5", "1/2"), (".25", "1/4"), ("3.", 3), ("007", 7),
        ("1/2", "1/2"), ("-1/2", "-1/2"), ("1 3/4", "7/4"), ("1½", "3/2"), ("¾", "3/4"), ("-1 1/2", "-3/2"),
        (r"\frac{1}{2}", "1/2"), (r"\dfrac{3}{4}", "3/4"), (r"\frac12", "1/2"), (r"-\frac{5}{2}", "-5/2"),
        (r"1\frac{3}{4}", "7/4"), (r"1{,}000", 1000), (r"\$1{,}000", 1000), ("$-5$", -5), ("$18$ dollars", 18),
        ("3e5", 300_000), ("1.5e-3", "3/2000"), ("3 × 10^5", 300_000), (r"3\times 10^{5}", 300_000), ("10⁵", 100_000),
        ("2^{10}", 1024), ("2**3", 8), ("$2 million", 2_000_000), ("50%", "1/2"), (r"12.5\%", "1/8"),
        ("٤٢", 42), ("४२", 42), ("４２", 42), ("x = 5", 5), ("= 5", 5), ("approximately 5", 5), ("≈ 2.5", "5/2"),
        ("She makes $18 every day", 18), ("18 dollars.", 18), ("\\text{5 cm}", 5), ("5 m^2", 5),
    ],
)  # fmt: skip
def test_numbers(text: str, value: int | str) -> None:
    found = read_quantity(text)
    assert found is not None
    assert found.value == Fraction(value)


NO_NUMBERS = (
    "|no|5 or 6|(1,2)|1,2,3|x+1|5x|2\\sqrt{3}|12:30|4-2|2 × 3|1/0|1 2/0|1e999|9**9**9|9^9^9|10^400|12^345|5th|[1, 2]"
    "|{5}|__import__('os')|2 hours 30 minutes"
)


@pytest.mark.parametrize("text", [*NO_NUMBERS.split("|"), "9" * 300])
def test_what_is_no_single_number(text: str) -> None:
    assert read_quantity(text) is None


@given(text=st.one_of(st.text(max_size=40), st.text("0123456789.,/^*-+e%$ {}\\", max_size=30)))
@settings(max_examples=500, deadline=None)
def test_reading_never_raises(text: str) -> None:
    found = read_quantity(text)
    assert found is None or found.value.denominator > 0


@given(value=st.integers(-(10**12), 10**12), digits=st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_written_numbers_are_read_back(value: int, digits: int) -> None:
    exact = Fraction(value, 10**digits)
    sign, whole = "-" if value < 0 else "", abs(value) // 10**digits
    decimals = f".{abs(value) % 10**digits:0{digits}}" if digits else ""
    for text in (f"{sign}{whole}{decimals}", f"{sign}{whole:,}{decimals}", f"{exact.numerator}/{exact.denominator}"):
        found = read_quantity(text)
        assert found is not None
        assert found.value == exact, text


def test_units() -> None:
    assert read_unit("km") == read_unit("kilometers")
    assert read_unit("square meters") == read_unit("m^2")
    assert read_unit("miles per hour") == read_unit("mile/hour") == "mile / hour"
    # Words that pint would read a unit into.
    assert [read_unit(word) for word in ("cats", "apples", "dollars", "pens", "of the pie", "x", "m^9^9", "")] == [
        None
    ] * 8
    assert converted(Fraction(5), unit="kilometer", to="meter") == 5000
    assert converted(Fraction(5), unit="kilometer", to="gram") is None
