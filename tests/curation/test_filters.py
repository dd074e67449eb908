"""Filters of single answers and of rows: scores, limits, the first rule wins, hooks."""

from pathlib import Path

import pytest
from factory_answers import curated

from largekd.config.curation import (
    ConfidenceFilterConfig,
    CurationConfig,
    DifficultyFilterConfig,
    HookFilterConfig,
    LanguageFilterConfig,
    LengthFilterConfig,
    RepetitionFilterConfig,
    VerifyConfig,
)
from largekd.curation.difficulty import DifficultyFilter
from largekd.curation.filters import (
    apply_filters,
    confidence_filter,
    hook_filter,
    length_filter,
    repetition_filter,
)
from largekd.curation.language import language_filter, prose
from largekd.curation.rules import build_filters
from largekd.curation.words import ngrams, words
from largekd.errors import ConfigError


def test_words_ignore_case_punctuation_and_width_and_may_keep_signs() -> None:
    assert words("The CAT\u2019s \uff21\uff22\uff23, _snake_case_!") == ["the", "cat", "s", "abc", "snake", "case"]
    assert words("3 - 2 = 1") == ["3", "2", "1"]
    assert words("3-2=1", signs=True) == ["3", "-", "2", "=", "1"]
    assert words("\u6771\u4eac is big") == ["\u6771", "\u4eac", "is", "big"]
    assert list(ngrams(["a", "b"], size=3)) == [("a", "b")]
    assert list(ngrams(["a", "b", "c"], size=2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams([], size=2)) == []


@pytest.mark.parametrize(
    ("text", "refused"), [("", "min_words"), ("one two", None), ("a b c d", None), ("a b c d e", "max_words")]
)
def test_length(text: str, refused: str | None) -> None:
    judging = length_filter(LengthFilterConfig(kind="length", min_words=2, max_words=4))
    (judgement,) = judging.judge([curated(text)])
    assert judgement.refused == refused
    assert judgement.scores == {"words": len(text.split()), "characters": len(text)}


def test_repetition_is_counted_and_each_limit_is_named() -> None:
    judging = repetition_filter(
        RepetitionFilterConfig(
            kind="repetition", ngram=2, max_ngram_share=0.5, max_line_share=0.35, min_unique_words=0.3
        )
    )

    def judge(text: str) -> tuple[dict, str | None]:
        (judgement,) = judging.judge([curated(text)])
        return dict(judgement.scores), judgement.refused

    # a b a b a b: two-word runs ab ba ab ba ab, two of five distinct.
    scores, refused = judge("a b a b a b")
    assert scores == pytest.approx({"ngram_share": 0.6, "line_share": 0.0, "unique_words": 1 / 3})
    assert refused == "max_ngram_share"
    assert judge("so it is\nso it is\nand now for something quite different that ends")[1] is None
    assert judge("first we add\nthen we wait\nfirst we add\nthen we go\nfirst we add\n")[1] == "max_line_share"
    assert judge("") == ({"ngram_share": 0.0, "line_share": 0.0, "unique_words": 1.0}, None)


@pytest.mark.parametrize("text", ["!" * 500, "a" * 500, "abc" * 300, "\u2026 " * 300])
def test_texts_of_hardly_any_words_are_counted_by_characters(text: str) -> None:
    judging = repetition_filter(RepetitionFilterConfig(kind="repetition"))
    assert judging.judge([curated(text)])[0].refused == "max_ngram_share"
    assert judging.judge([curated(f"See {'x' * 60} for the proof of it all.")])[0].refused is None


def test_language_is_that_of_the_prose() -> None:
    judging = language_filter(LanguageFilterConfig(kind="language", languages=("en",), min_probability=0.5))
    english = "First we add the apples and the pears, then we divide them among the children."
    german = "Zuerst addieren wir die \u00c4pfel und die Birnen, dann teilen wir sie unter den Kindern auf."
    code = "```python\nfor kind in kinder:\n    summe = summe + anzahl(kind)\nprint(summe)\n```"
    kept, refused, mixed, short = judging.judge([curated(text) for text in (english, german, english + code, "42")])
    assert kept.refused is None and kept.scores["probability"] > 0.9
    assert refused.refused == "min_probability" and refused.scores["probability"] < 0.1
    assert "de" in refused.note
    assert mixed.scores == kept.scores
    assert (short.refused, short.scores) == (None, {})
    both = language_filter(LanguageFilterConfig(kind="language", languages=("en", "de")))
    assert [one.refused for one in both.judge([curated(english), curated(german)])] == [None, None]
    with pytest.raises(ConfigError, match=r"languages klingon: not known .* codes are .*\bde\b"):
        language_filter(LanguageFilterConfig(kind="language", languages=("klingon",)))


def test_prose_leaves_out_code_formulas_and_numbers() -> None:
    text = "We <think>add</think> $a_1 + b$ and \\[ x^2 \\] so `sum(x)` gives 1,234.5\n```python\nx = 1\n"
    assert prose(text).split() == ["We", "add", "and", "so", "gives"]


def test_confidence_refuses_what_is_too_uncertain_or_not_known() -> None:
    judging = confidence_filter(ConfidenceFilterConfig(kind="confidence", min_mean_logp=-1.0))
    rows = [curated("text", mean_logp=value) for value in (-0.9, -1.1, None)]
    assert [one.refused for one in judging.judge(rows)] == [None, "min_mean_logp", "unknown"]


def test_the_first_rule_drops_and_later_ones_still_score() -> None:
    filters = [
        ("length", length_filter(LengthFilterConfig(kind="length", max_words=3))),
        ("confidence", confidence_filter(ConfidenceFilterConfig(kind="confidence", min_mean_logp=-1.0))),
        ("length_2", length_filter(LengthFilterConfig(kind="length", max_words=2))),
    ]
    group = [
        curated("one two", row="r"),
        curated("one two three four", row="r", sample=1, mean_logp=-3.0),
        curated("one two three", row="r", sample=2),
        curated("", row="r", sample=3, finish="failed", dropped_by="failed"),
    ]
    kept, long, later, failed = apply_filters(group, filters=filters)
    assert [row.dropped_by for row in (kept, long, later, failed)] == [
        None,
        "length.max_words",
        "length_2.max_words",
        "failed",
    ]
    assert long.scores["confidence.mean_logp"] == -3.0
    assert set(kept.scores) == {
        *("length.words", "length.characters", "confidence.mean_logp", "length_2.words", "length_2.characters")
    }
    assert failed.scores == {}


def rows(name: str, outcomes: str) -> list:
    """A row's answers: r right, w wrong, u unknown; capital letters: dropped before."""
    named = {"r": "right", "w": "wrong", "u": "unknown"}
    return [
        curated("text", row=name, sample=place, outcome=named[one.lower()], dropped_by="x" if one.isupper() else None)
        for place, one in enumerate(outcomes)
    ]


def test_difficulty_counts_all_samples_and_limits_what_is_kept() -> None:
    judging = DifficultyFilter(
        DifficultyFilterConfig(kind="difficulty", min_pass_rate=0.3, max_pass_rate=0.8, per_row=1)
    )
    judged = judging.judge(rows("a", "WrRru"))
    assert [one.scores["pass_rate"] for one in judged] == [0.75] * 5
    assert [one.refused for one in judged] == [None, None, None, "per_row", "per_row"]
    assert {one.refused for one in judging.judge(rows("b", "rrr"))} == {"max_pass_rate"}
    assert {one.refused for one in judging.judge(rows("c", "rWWW"))} == {"min_pass_rate"}
    unverified = judging.judge(rows("d", "uu"))
    assert [(one.refused, dict(one.scores)) for one in unverified] == [(None, {}), ("per_row", {})]


def test_difficulty_fills_intervals_evenly_and_only_with_rows_that_stay() -> None:
    judging = DifficultyFilter(DifficultyFilterConfig(kind="difficulty", buckets=2, per_bucket=2))
    easy = [judging.judge(rows(f"easy{place}", "rr"))[0].refused for place in range(4)]
    assert easy == [None, None, "per_bucket", "per_bucket"]
    assert judging.judge(rows("gone", "RWW"))[0].refused is None, "all its answers are dropped: it takes no place"
    hard = [judging.judge(rows(f"hard{place}", "rWW"))[0].refused for place in range(3)]
    assert hard == [None, None, "per_bucket"]
    assert judging.summary() == {"rows_of_buckets": [2, 2]}


def test_difficulty_needs_verdicts() -> None:
    config = CurationConfig(filters=(DifficultyFilterConfig(kind="difficulty"),))
    with pytest.raises(ConfigError, match=r"verify\.kind = 'none'; set it"):
        build_filters(config)
    assert build_filters(config.model_copy(update={"verify": VerifyConfig(kind="exact")}))[0][0] == "difficulty"


def hook(tmp_path: Path, body: str, **limits: float) -> HookFilterConfig:
    module = tmp_path / "own_filter.py"
    module.write_text(body)
    return HookFilterConfig(kind="hook", module=str(module), name="rude", **limits)


def test_a_hook_gets_the_row_and_its_named_score_decides(tmp_path: Path) -> None:
    body = "def score(row):\n    return {'rude': row.written.text.count('!'), 'length': len(row.ask.item.question)}\n"
    judging = hook_filter(hook(tmp_path, body, max_score=1))
    calm, rude = judging.judge([curated("fine!"), curated("go away!!")])
    assert (calm.refused, dict(calm.scores)) == (None, {"rude": 1.0, "length": 9.0})
    assert (rude.refused, dict(rude.scores)) == ("max_score", {"rude": 2.0, "length": 9.0})
    assert hook_filter(hook(tmp_path, body, min_score=1)).judge([curated("fine")])[0].refused == "min_score"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(row):\n    return {'kind': 1.0}\n", "one of them called 'rude'"),
        ("def score(row):\n    return {'rude': float('nan')}\n", "a dict of finite numbers"),
        ("def score(row):\n    return 3\n", "returned 3"),
        ("def scores(row):\n    return {}\n", "has no function score"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError"),
    ],
)
def test_a_broken_hook_is_named(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hook_filter(hook(tmp_path, body, max_score=1)).judge([curated("text")])


def test_a_hook_without_a_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither min_score nor max_score"):
        hook_filter(hook(tmp_path, "def score(row):\n    return {'rude': 1}\n"))


def test_filters_of_one_kind_are_numbered() -> None:
    length = LengthFilterConfig(kind="length")
    assert [name for name, _ in build_filters(CurationConfig(filters=(length, length)))] == ["length", "length_2"]
