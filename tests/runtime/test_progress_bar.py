"""The progress bar on a terminal and in a file."""

import io
import logging

import pytest

from largekd.runtime.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_rare_and_have_an_estimate(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="largekd")
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(label="distil", total=110, initial=10, stream=stream, seconds_between_lines=10, clock=clock)
    for step in range(11, 111):
        clock.now += 1.0
        bar.advance(to=step, figures={"loss": f"{step / 10:.1f}"})
    bar.close()
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "distil: step 11/110  loss 1.1  ETA 0:01:39"
    assert messages[1] == "distil: step 21/110  loss 2.1  ETA 0:01:29"
    assert messages[-1] == "distil: step 110/110  loss 11.0  ETA 0:00:00"
    assert len(messages) == 11
    assert stream.getvalue() == ""


def test_terminal_shows_one_line_that_is_redrawn(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="largekd")
    terminal = Terminal()
    bar = ProgressBar(label="distil", total=4, initial=1, stream=terminal)
    for step in range(2, 5):
        bar.advance(to=step, figures={"loss": "2.5", "tokens/s": "1,234"})
    bar.close()
    bar.close()
    text = terminal.getvalue()
    assert text.count("\n") == 1 and "4/4" in text and "loss 2.5  tokens/s 1,234" in text
    assert not caplog.records


def test_going_back_is_refused():
    bar = ProgressBar(label="x", total=3, initial=2, stream=io.StringIO())
    with pytest.raises(AssertionError, match="from 2 to 1"):
        bar.advance(to=1, figures={})
