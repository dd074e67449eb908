"""Agreements between ranks, alone and in pairs."""

import errno
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from forked import run_forked

from largekd.errors import ConfigError, DataError
from largekd.runtime import ranks as ranks_module
from largekd.runtime.ranks import (
    MainFirst,
    Ranks,
    Together,
    all_agree,
    all_sum,
    barrier,
    broadcast_object,
    current_ranks,
    gather_objects,
    new_control_group,
)

VALUE = {"text": "grün", "list": [1, 2.5, None], "nested": {"a": True}}


def test_one_rank_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert current_ranks() == Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, node=0)
    assert all_agree(True) and not all_agree(False)
    tensor = torch.arange(3)
    total = all_sum(tensor)
    assert torch.equal(total, tensor) and total.data_ptr() != tensor.data_ptr()
    assert broadcast_object(VALUE) == VALUE
    assert gather_objects((1, 2)) == [[1, 2]]
    assert new_control_group(timeout_s=5) is None
    barrier()
    with MainFirst(ranks=Ranks()), pytest.raises(KeyError), Together():
        raise KeyError("x")


def _collectives() -> dict[str, object]:
    ranks = current_ranks()
    group = new_control_group(timeout_s=20)
    tensor = torch.tensor([[1.5, ranks.rank]], dtype=torch.float64)
    summed = all_sum(tensor)
    return {
        "ranks": [ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.node],
        "agree": [all_agree(True), all_agree(ranks.rank == 0), all_agree(ranks.rank == 1, group=group)],
        "sum": summed.tolist(),
        "untouched": tensor.tolist(),
        "integers": all_sum(torch.tensor([2**40]), group=group).tolist(),
        "broadcast": broadcast_object(VALUE if ranks.rank == 0 else "ignored", group=group),
        "gather": gather_objects("x" * (5 if ranks.rank else 50_000), group=group) == ["x" * 50_000, "x" * 5],
        "empty": gather_objects(None),
    }


def test_two_ranks(tmp_path: Path) -> None:
    for rank, outcome in enumerate(run_forked(_collectives, tmp_path=tmp_path, world_size=2)):
        assert outcome.value == {
            "ranks": [rank, 2, rank, 2, 0],
            "agree": [True, False, False],
            "sum": [[3.0, 1.0]],
            "untouched": [[1.5, float(rank)]],
            "integers": [2**41],
            "broadcast": VALUE,
            "gather": True,
            "empty": [None, None],
        }, outcome


def _places_by_host_name() -> list[int]:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name)
    rank = torch.distributed.get_rank()
    socket.gethostname = lambda: ["b", "a", "b"][rank]
    ranks = current_ranks()
    return [ranks.local_rank, ranks.local_world_size, ranks.node, int(ranks.is_main), int(ranks.is_local_main)]


def test_the_place_on_a_host_follows_from_host_names(tmp_path: Path) -> None:
    outcomes = run_forked(_places_by_host_name, tmp_path=tmp_path, world_size=3)
    assert [outcome.value for outcome in outcomes] == [[0, 2, 0, 1, 1], [0, 1, 1, 0, 1], [1, 2, 0, 0, 0]]


def _failures(kind: str) -> list[str]:
    errors: dict[str, Exception] = {
        "data": DataError("line 3 is broken"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "defect": IndexError("7"),
    }
    try:
        with Together():
            if current_ranks().rank == 1:
                raise errors[kind]
    except (DataError, OSError, RuntimeError, IndexError) as error:
        return [type(error).__name__, str(error), str(getattr(error, "errno", None))]
    return []


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("data", ["DataError", "rank 1: line 3 is broken", "None"]),
        ("disk", ["OSError", "[Errno 28] rank 1: [Errno 28] No space left on device", "28"]),
        ("defect", ["RuntimeError", "rank 1: IndexError: 7", "None"]),
    ],
)
def test_one_ranks_error_is_everybodys(kind: str, other: list[str], tmp_path: Path) -> None:
    outcomes = run_forked(_failures, tmp_path=tmp_path, world_size=2, kind=kind)
    assert outcomes[0].value == other
    assert outcomes[1].value[0] == {"data": "DataError", "disk": "OSError", "defect": "IndexError"}[kind]
    assert not outcomes[1].value[1].startswith("rank 1")


def _fill_cache(folder: str, failing_rank: int | None) -> list[object]:
    ranks = current_ranks()
    cache = Path(folder) / "cache"
    try:
        with MainFirst(ranks=ranks):
            if ranks.rank == failing_rank:
                raise ConfigError("cannot")
            found = cache.exists()
            if not found:
                time.sleep(0.3)
                cache.touch()
    except ConfigError as error:
        return ["failed", str(error)]
    return ["found", found]


@pytest.mark.parametrize(
    ("failing_rank", "expected"),
    [
        (None, [["found", False], ["found", True]]),
        (0, [["failed", "cannot"], ["failed", "rank 0: cannot"]]),
        (1, [["failed", "rank 1: cannot"], ["failed", "cannot"]]),
    ],
)
def test_main_first(failing_rank: int | None, expected: list[list[object]], tmp_path: Path) -> None:
    outcomes = run_forked(_fill_cache, tmp_path=tmp_path, world_size=2, folder=str(tmp_path), failing_rank=failing_rank)
    assert [outcome.value for outcome in outcomes] == expected


@pytest.mark.parametrize(
    ("backend", "available", "expected"),
    [("gloo", True, "cpu"), ("nccl", True, "cuda:1"), ("cpu:gloo,cuda:nccl", True, "cpu"), ("ccl", False, "cpu")],
)
def test_collective_tensors_live_where_the_backend_wants_them(
    backend: str, available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module.dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert str(ranks_module.collective_device()) == expected
