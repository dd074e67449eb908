"""Fault specifications."""

import errno
import time

import pytest

from largekd.errors import ConfigError
from largekd.runtime.faults import VARIABLE, fault_point


def test_nothing_fires_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not fault_point("loss:nan", rank=0, step=1)


@pytest.mark.parametrize(
    ("text", "fires_at"),
    [
        ("loss:nan:rank1:step4", {(1, 4)}),
        ("loss:nan:rank*:step4", {(0, 4), (1, 4)}),
        ("loss:nan:rank0:step3-5", {(0, 3), (0, 4), (0, 5)}),
        ("loss:nan:rank1:step*", {(1, step) for step in range(7)}),
        ("grad:nan:rank*:step*", set()),
        ("grad:nan:rank0:step1, loss:nan:rank0:step2", {(0, 2)}),
    ],
)
def test_rank_and_step(text: str, fires_at: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    fired = {(r, s) for r in range(2) for s in range(7) if fault_point("loss:nan", rank=r, step=s)}
    assert fired == fires_at


def test_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "save:after_shard:rank0:step1:enospc")
    with pytest.raises(OSError, match="No space left") as info:
        fault_point("save:after_shard", rank=0, step=1)
    assert info.value.errno == errno.ENOSPC
    monkeypatch.setenv(VARIABLE, "step:begin:rank0:step1:sleep0.2")
    start_s = time.monotonic()
    assert fault_point("step:begin", rank=0, step=1)
    assert time.monotonic() - start_s >= 0.2


@pytest.mark.parametrize("text", ["loss:nan", "loss:nan:rankx:step1", "loss:nan:rank1:step1:explode", "nan"])
def test_a_specification_that_cannot_be_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE}: '{text}' is not"):
        fault_point("loss:nan", rank=0, step=1)
