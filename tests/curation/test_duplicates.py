"""Planted duplicates: exact, near at several similarities, and texts that only look alike."""

import numpy as np
import pytest
from factory_answers import curated

from largekd.config.curation import DuplicateFilterConfig
from largekd.curation.duplicates import DuplicateFilter
from largekd.curation.words import ngrams

PAIRS = 150
WORDS = 120


def config(**settings: object) -> DuplicateFilterConfig:
    return DuplicateFilterConfig(kind="duplicates", **settings)


def jaccard(left: list[str], right: list[str], *, size: int) -> float:
    one, other = set(ngrams(left, size=size)), set(ngrams(right, size=size))
    return len(one & other) / len(one | other)


def planted(generator: np.random.Generator, *, changed: int) -> tuple[list[str], list[str]]:
    """A text of random words, and the same with `changed` of them replaced."""
    text = [f"w{number}" for number in generator.integers(0, 5000, WORDS)]
    copy = list(text)
    for place in generator.choice(WORDS, changed, replace=False):
        copy[place] = f"x{generator.integers(0, 5000)}"
    return text, copy


def found(changed: int, *, threshold: float, ngram: int = 3) -> list[tuple[float, bool, float]]:
    """(true similarity, whether it was dropped, estimated similarity) of planted pairs."""
    generator = np.random.default_rng(changed)
    judging = DuplicateFilter(config(field="answer", threshold=threshold, ngram=ngram))
    pairs = [planted(generator, changed=changed) for _ in range(PAIRS)]
    for place, (text, _) in enumerate(pairs):
        assert judging.judge([curated(" ".join(text), row=f"a{place}")])[0].refused is None
    results = []
    for place, (text, copy) in enumerate(pairs):
        row = curated(" ".join(copy), row=f"b{place}", dropped_by="kept out of the index")
        (judgement,) = judging.judge([row])
        dropped = judgement.refused is not None
        results.append((jaccard(text, copy, size=ngram), dropped, judgement.scores["similarity"]))
    return results


def test_recall_and_precision_of_planted_near_duplicates() -> None:
    results = [one for changed in (1, 2, 3, 5, 8, 12, 20, 40) for one in found(changed, threshold=0.8)]
    clear = [one for one in results if abs(one[0] - 0.8) > 0.07]
    duplicates = [dropped for true, dropped, _ in clear if true >= 0.8]
    others = [dropped for true, dropped, _ in clear if true < 0.8]
    assert len(duplicates) > 200 and len(others) > 200
    recall = sum(duplicates) / len(duplicates)
    precision = sum(duplicates) / (sum(duplicates) + sum(others))
    assert recall >= 0.97, recall
    assert precision >= 0.97, precision


def test_the_score_estimates_the_similarity() -> None:
    errors = [abs(true - score) for true, dropped, score in found(3, threshold=0.5) if dropped]
    assert len(errors) > 0.95 * PAIRS
    # A signature of 128 hashes has a standard error of at most 0.045.
    assert np.mean(errors) < 0.05


def test_unrelated_texts_are_kept() -> None:
    generator = np.random.default_rng(0)
    judging = DuplicateFilter(config(field="answer", threshold=0.5))
    texts = [" ".join(planted(generator, changed=1)[0]) for _ in range(300)]
    assert all(judging.judge([curated(text, row=str(place))])[0].refused is None for place, text in enumerate(texts))
    assert judging.summary() == {"distinct": 300}


def test_texts_without_words_resemble_nothing() -> None:
    judging = DuplicateFilter(config(field="answer"))
    judged = [judging.judge([curated(text, row=text)])[0].refused for text in ("!!!", "→", "→", "a word")]
    assert judged == [None, None, "exact", None]


def test_exact_duplicates_whatever_case_and_space() -> None:
    judging = DuplicateFilter(config(threshold=1, field="answer"))
    group = [curated("The  Answer\nis 4.", row="a"), curated("the answer is 4.", row="a", sample=1)]
    first, second = judging.judge(group)
    assert first.refused is None
    assert (second.refused, dict(second.scores)) == ("exact", {"similarity": 1.0})
    assert group[0].written.key in second.note
    assert judging.judge([curated("The answer is 5.", row="b")])[0].refused is None


def test_problems_that_differ_in_a_number_or_a_sign_stay() -> None:
    judging = DuplicateFilter(config(field="question", threshold=0.8, ngram=3))
    questions = ["What is 17 + 25?", "What is 17 - 25?", "What is 17 + 26?", "What is 17 + 25 ?"]
    judged = [judging.judge([curated("x", row=one, question=one)])[0].refused for one in questions]
    assert judged == [None, None, None, "near"]


def test_answers_of_a_row_share_their_question() -> None:
    judging = DuplicateFilter(config(field="question"))
    group = [curated(f"text {place}", row="a", sample=place) for place in range(3)]
    assert [one.refused for one in judging.judge(group)] == [None] * 3
    again = [curated(f"text {place}", row="b", sample=place) for place in range(2)]
    assert [one.refused for one in judging.judge(again)] == ["exact"] * 2


@pytest.mark.parametrize("field", ["answer", "question", "both"])
def test_what_was_dropped_before_drops_nothing(field: str) -> None:
    judging = DuplicateFilter(config(field=field))
    text = "first we add seven and five and then we halve it"
    judging.judge([curated(text, row="a", dropped_by="wrong")])
    assert judging.judge([curated(text, row="b")])[0].refused is None
    assert judging.judge([curated(text, row="c")])[0].refused == "exact"
