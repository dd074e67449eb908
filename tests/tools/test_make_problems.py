"""Problems are the same for the same settings, all different, and none is both learnt and asked."""

import json
from pathlib import Path

import make_problems as tool
import pytest

pytest.importorskip("reasoning_gym")

SUMS = "chain_sum:min_terms=2,max_terms=3"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_question_is_in_both_files_and_answers_are_right(tmp_path: Path) -> None:
    arguments = ["--family", SUMS, "--family", "gcd", "--train", "30", "--held-out", "11", "--seed", "3"]
    assert tool.main([str(tmp_path / "made"), *arguments]) == 0
    train, held_out = rows(tmp_path / "made/train.jsonl"), rows(tmp_path / "made/eval.jsonl")
    assert (len(train), len(held_out)) == (30, 11)
    assert len({row["question"] for row in train + held_out}) == len({row["id"] for row in train + held_out}) == 41
    assert {row["family"] for row in train} == {row["family"] for row in held_out} == {"chain_sum", "gcd"}
    for row in train:
        if row["family"] == "chain_sum":
            terms = row["question"].rpartition(": ")[2].removesuffix(" =").split(" ")
            total = int(terms[0])
            for sign, term in zip(terms[1::2], terms[2::2], strict=True):
                total += int(term) if sign == "+" else -int(term)
            assert int(row["answer"]) == total


def test_same_settings_leave_the_files_alone_and_others_replace_them(tmp_path: Path) -> None:
    def make(count: int) -> bool:
        return tool.make(tmp_path / "made", families=[("chain_sum", {})], train=count, held_out=5, seed=1)

    assert make(10)
    (first, inode) = (rows(tmp_path / "made/eval.jsonl"), (tmp_path / "made/eval.jsonl").stat().st_ino)
    assert not make(10) and (tmp_path / "made/eval.jsonl").stat().st_ino == inode
    assert make(12)
    assert rows(tmp_path / "made/eval.jsonl") == first and len(rows(tmp_path / "made/train.jsonl")) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "chain_summ"], "chain_summ"),
        (["--family", "chain_sum:min_terms"], "no KEY=VALUE"),
        (["--family", "chain_sum:terms=3"], "terms"),
        (["--family", "chain_sum:min_terms=0"], "min_terms"),
        (["--family", "chain_sum", "--train", "0"], "--train 0"),
        (["--family", "chain_sum:min_terms=2,max_terms=2,max_digits=1", "--train", "5000"], "different problems"),
    ],
)
def test_what_cannot_be_made_is_told_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tool.main([str(tmp_path / "made"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert tool.main([str(tmp_path), "--family", "chain_sum"]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"
