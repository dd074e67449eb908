"""The table of sparse signals' errors: on random heads, and end to end on a tiny model."""

from pathlib import Path

import make_tiny_model
import pytest
import signal_bias
import torch


@pytest.fixture(scope="module")
def lines() -> dict[str, signal_bias.Line]:
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 40, 24, generator=g) for _ in range(2)]
    weights = [torch.randn(300, 24, generator=g) * 0.6 for _ in range(2)]
    pair = signal_bias.Pair(hidden[0], weights[0], hidden[1], weights[1])
    found = signal_bias.lines_of(pair, top_k=(4, 32, 300), draws=(6, 600), repeats=16)
    return {line.signal: line for line in found}


def test_all_ids_have_no_error(lines) -> None:
    whole = lines["whole distribution"]
    assert whole.value > 0 and whole.hidden_error == whole.head_error == 0
    for kind in signal_bias.KINDS:
        line = lines[f"top 300, {kind}"]
        assert line.value == pytest.approx(whole.value, rel=1e-5)
        assert max(line.hidden_error, line.head_error) < 1e-5


def test_the_tail_is_the_closest_and_never_above(lines) -> None:
    for k in (4, 32):
        tail, renormalised, dropped = (lines[f"top {k}, {kind}"] for kind in signal_bias.KINDS)
        assert 0 < tail.hidden_error < min(renormalised.hidden_error, dropped.hidden_error)
        assert tail.value < lines["whole distribution"].value
    assert lines["top 32, tail"].hidden_error < lines["top 4, tail"].hidden_error


def test_draws_are_noise_and_no_bias(lines) -> None:
    for count in (6, 600):
        line = lines[f"{count} draws"]
        assert line.mean_hidden_error == pytest.approx(line.hidden_error / 4, rel=0.4)
        assert line.mean_head_error == pytest.approx(line.head_error / 4, rel=0.4)
    assert lines["600 draws"].hidden_error < 0.2 * lines["6 draws"].hidden_error


def test_the_table_is_markdown(lines) -> None:
    rows = signal_bias.table(list(lines.values()), repeats=16).splitlines()
    assert len(rows) == 2 + len(lines) and len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| whole distribution | ") and "0.00 %" in rows[2]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "teacher"
    assert make_tiny_model.main([str(folder), "--layers", "2"]) == 0
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog", "n": 1}\n' * 9, encoding="utf-8")
    arguments = ["--teacher", str(folder), "--text", str(text), "--layers", "1", "--tokens", "24", "--top-k", "4"]
    assert signal_bias.main([*arguments, "--draws", "3", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| top 4, renormalise |" in printed and "| 3 draws |" in printed and "24 tokens" in printed
    with pytest.raises(SystemExit, match="--layers 2: the teacher has 2 layers"):
        signal_bias.main([*arguments[:5], "2", *arguments[6:]])
    with pytest.raises(SystemExit, match="--tokens 100000: the text has"):
        signal_bias.main([*arguments[:7], "100000", *arguments[8:]])
