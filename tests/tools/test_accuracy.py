"""Accuracies are shares of problems with Wilson's intervals, and models are compared problem by problem."""

import json
from collections.abc import Sequence
from pathlib import Path

import accuracy as tool
import pytest

from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record
from largekd.curation.answer_shards import RAW_FOLDER, Answer, write_shard
from largekd.curation.records import Ask, Draw, Item, Written
from largekd.errors import ConfigError, DataError

pytest.importorskip("scipy")
DRAW = Draw(temperature=0.0, top_p=1.0, top_k=None, min_p=0.0, max_new_tokens=8, stop=())


def job(folder: Path, texts: Sequence[str | None], *, verify: str = "numeric", samples: int = 1) -> Path:
    """A finished job over problems whose answers are 0, 1, 2 …; None: it failed; with … at the end: it was cut off."""
    answers = []
    for number, text in enumerate(texts):
        for sample in range(samples):
            ask = Ask(Item(f"p{number}", "How many?", str(number)), "direct", sample, DRAW, sample, ())
            finish = "failed" if text is None else "length" if text.endswith("…") else "stop"
            answers.append(Answer(ask, Written(ask.key, text or "", finish, 3, 3)))
    (folder / RAW_FOLDER).mkdir(parents=True)
    write_shard(folder / RAW_FOLDER, number=0, answers=answers)
    source = {"path": "problems.jsonl"}
    curation = {"answer_format": "last_number", "verify": {"kind": verify}}
    mapping = {"output": {"dir": str(folder)}, "source": source, "curation": curation}
    config = parse_record(GenerateConfig, mapping=mapping | {"backend": {"model": "m", "deepspeed": "d.json"}})
    (folder / "job.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    return folder


def test_shares_intervals_and_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = job(tmp_path / "before", ["0", "no idea", None, "3 …", "4"])
    after = job(tmp_path / "after", ["0", "1", "1 + 1 = 2", "3", "It is 5"])
    out = tmp_path / "figures.json"
    assert tool.main([str(before), str(after), "--json", str(out)]) == 0
    first, second = json.loads(out.read_text())
    assert (first["right"], second["right"], second["problems"]) == (2, 4, 5)
    assert (second["gained"], second["lost"]) == (3, 1)
    # Of 4 discordant problems 3 or more on one side: 2 (1 + 4) / 16.
    assert second["p"] == pytest.approx(0.625)
    # Wilson's for 4 of 5: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    z, n, p = 1.959964, 5, 0.8
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert second["low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert second["high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)
    assert "4 of 5 | 80.0% |" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows no right answers"):
        tool.solved_problems(job(tmp_path / "unverified", ["0"], verify="none"))
    with pytest.raises(DataError, match=r"sampling.samples=1"):
        tool.solved_problems(job(tmp_path / "several", ["0"], samples=2))
    with pytest.raises(DataError, match="no answers"):
        tool.solved_problems(job(tmp_path / "empty", []))
    short, long = (tool.solved_problems(job(tmp_path / f"of{n}", ["0"] * n)) for n in (1, 2))
    with pytest.raises(DataError, match="same problems"):
        tool.compare({"short": short, "long": long})
