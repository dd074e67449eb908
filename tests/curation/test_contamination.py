"""Evaluation sets planted into answers and questions, also in other case and punctuation."""

import json
from pathlib import Path

import pytest
from factory_answers import curated

from largekd.config.curation import ContaminationFilterConfig
from largekd.curation.contamination import ContaminationFilter
from largekd.errors import ConfigError, DataError

TEST_QUESTION = (
    "A train leaves the station at noon with forty two passengers and at each of its next three stops "
    "half of them get off while five new ones board."
)
SHORT = "Which prime is the smallest of all?"


def build(tmp_path: Path, **settings: object) -> ContaminationFilter:
    bench = tmp_path / "bench.jsonl"
    rows = [{"question": TEST_QUESTION, "meta": {"answer": "yes"}}, {"question": SHORT, "source": "made up"}]
    bench.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=(str(bench),), **settings))


def test_planted_questions_are_found_and_told(tmp_path: Path) -> None:
    judging = build(tmp_path)
    changed = TEST_QUESTION.upper().replace(" ", " ,- ") + "!!"
    quoted = " ".join(TEST_QUESTION.split()[3:18])
    rows = [
        curated("The answer is 42 because we count and count again until nothing is left of the trains we saw."),
        curated("fine", question=changed),
        curated(f"It reminds me of this: {quoted.title()}; so I know it."),
        curated("Hm. which PRIME is the smallest, of all"),
        curated("yes"),
    ]
    judged = judging.judge(rows)
    assert [one.refused for one in judged] == [None, "bench", "bench", "bench", None]
    assert judged[0].scores == {"bench": 0.0} and judged[1].scores["bench"] > 0.9
    assert "forty two passengers" in judged[2].note
    assert judging.summary() == {"bench": {"texts": 2, "too_short": 2, "overlapping": 3}}


def test_twelve_words_in_common_are_no_contamination(tmp_path: Path) -> None:
    judging = build(tmp_path)
    common = TEST_QUESTION.split()
    assert judging.judge([curated(" ".join([*common[:12], "and", "then"]))])[0].refused is None
    assert judging.judge([curated(" ".join([*common[:13], "and", "then"]))])[0].refused == "bench"


def test_a_share_may_be_allowed_and_columns_chosen(tmp_path: Path) -> None:
    quoted = " ".join([*(f"own{place}" for place in range(40)), *TEST_QUESTION.split()[:14]])
    assert build(tmp_path).judge([curated(quoted)])[0].refused == "bench"
    assert build(tmp_path, max_share=0.1).judge([curated(quoted)])[0].refused is None
    with pytest.raises(DataError, match="no text of at least 6 words in the columns source"):
        build(tmp_path, columns=("source",))


def test_short_questions_count_as_a_whole_with_their_signs(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(json.dumps({"question": "What is 12 + 30?", "answer": "42"}))
    sets = (str(tmp_path / "sums.jsonl"),)
    judging = ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=sets, max_share=0.5))
    asked = ["what is 12 + 30", "What is 12 - 30?", "What is 12 + 31?", "42"]
    judged = [judging.judge([curated("It is a number.", question=question)])[0] for question in asked]
    assert [one.refused for one in judged] == ["sums", None, None, None]
    assert judging.summary() == {"sums": {"texts": 0, "too_short": 2, "overlapping": 1}}


def test_characters_that_nobody_sees_hide_nothing(tmp_path: Path) -> None:
    hidden = TEST_QUESTION.replace("a", "a\u200b").replace("s", "s\u00ad")
    assert build(tmp_path).judge([curated(hidden)])[0].refused == "bench"


def test_text_files_and_arrays_are_read(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(f"{SHORT}\n\n{TEST_QUESTION}\n")
    (tmp_path / "array.json").write_text(json.dumps([{"any": TEST_QUESTION}]))
    paths = (str(tmp_path / "plain.txt"), str(tmp_path / "array.json"))
    judging = ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=paths))
    (judgement,) = judging.judge([curated(TEST_QUESTION)])
    assert judgement.refused == "plain" and set(judgement.scores) == {"plain", "array"}


def test_sets_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=(str(tmp_path / "gone.jsonl"),)))
    (tmp_path / "broken.jsonl").write_text('{"question": "unfinished\n')
    with pytest.raises(DataError, match=r"broken\.jsonl: broken JSON"):
        ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=(str(tmp_path / "broken.jsonl"),)))
    twice = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(TEST_QUESTION)
        twice.append(str(tmp_path / folder / "same.txt"))
    with pytest.raises(ConfigError, match="two files have the same name"):
        ContaminationFilter(ContaminationFilterConfig(kind="contamination", sets=tuple(twice)))
