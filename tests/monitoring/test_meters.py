"""Meters: totals over ranks, one reduce, and ranks that disagree."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from largekd.monitoring.meters import Meters

CPU = torch.device("cpu")


def identity(vector: Tensor) -> Tensor:
    return vector


def add(meters: Meters, **values: float) -> None:
    meters.add_sums(tuple(values), sums_M=torch.tensor(list(values.values())))


def flush_two(fill: Callable[[Meters, int], None]) -> list[dict[str, float]]:
    """Flushes two ranks' meters, filled by `fill(meters, rank)`, through a reduction worked out here."""
    seen: list[Tensor] = []

    def capture(vector: Tensor) -> Tensor:
        seen.append(vector.clone())
        return vector

    for rank in range(2):
        meters = Meters(device=CPU)
        fill(meters, rank)
        try:
            meters.flush(reduce=capture)
        except AssertionError as error:
            raise RuntimeError("a rank disagreed with itself") from error
    figures = []
    for rank in range(2):
        meters = Meters(device=CPU)
        fill(meters, rank)
        figures.append(meters.flush(reduce=lambda vector: seen[0] + seen[1]))
    return figures


def test_totals_are_over_calls_and_ranks():
    def fill(meters: Meters, rank: int) -> None:
        add(meters, loss=3.0 + rank)
        add(meters, kl=1.5 * (rank + 1), weight=2.0)
        add(meters, loss=2.0)

    first, second = flush_two(fill)
    assert first == second == {"loss": 11.0, "kl": 4.5, "weight": 4.0}


def test_one_reduce_whatever_the_number_of_meters():
    calls = []

    def reduce(vector: Tensor) -> Tensor:
        calls.append(vector.numel())
        return vector

    meters = Meters(device=CPU)
    for index in range(300):
        add(meters, **{f"area/{index}": float(index)})
    figures = meters.flush(reduce=reduce)
    assert len(calls) == 1
    assert [figures[f"area/{index}"] for index in range(300)] == [float(index) for index in range(300)]
    assert len(figures) == 300


def test_flush_starts_a_new_window_and_an_empty_one_reduces_nothing():
    meters = Meters(device=CPU)
    for value in (5.0, 1.0):
        add(meters, loss=value)
        assert meters.flush(reduce=identity) == {"loss": value}

    def forbidden(vector: Tensor) -> Tensor:
        raise RuntimeError("nothing to reduce")

    assert meters.flush(reduce=forbidden) == {}


def test_nan_stays_in_its_meter():
    meters = Meters(device=CPU)
    add(meters, a=math.nan, b=2.0)
    figures = meters.flush(reduce=identity)
    assert math.isnan(figures["a"]) and figures["b"] == 2.0


def test_accumulates_in_float64():
    meters = Meters(device=CPU)
    for value in (2.0**25 + 4, 1.0):
        meters.add_sums(("tokens",), sums_M=torch.tensor([value], dtype=torch.float32))
    assert meters.flush(reduce=identity)["tokens"] == 2.0**25 + 5


def test_later_changes_of_a_tensor_do_not_reach_the_meter():
    sums = torch.zeros(1, dtype=torch.float64)
    meters = Meters(device=CPU)
    meters.add_sums(("b",), sums_M=sums)
    meters.add_sums(("b",), sums_M=torch.ones(1))
    sums += 9
    assert meters.flush(reduce=identity) == {"b": 1.0}


@pytest.mark.parametrize("other", [("a", "c"), ("b", "a"), ("a",), ("a", "b", "c")])
def test_ranks_with_other_names_are_told_so(other: tuple[str, ...]):
    def fill(meters: Meters, rank: int) -> None:
        for name in ("a", "b") if rank == 0 else other:
            add(meters, **{name: 1.0})

    with pytest.raises(AssertionError, match=r"ranks disagree.*'a'.*same names in the same order"):
        flush_two(fill)


def test_fingerprint_survives_float32_sums_over_many_ranks():
    meters = Meters(device=CPU)
    meters._dtype = torch.float32
    add(meters, a=1.0)
    assert meters.flush(reduce=lambda vector: vector * 4096) == {"a": 4096.0}


def test_misuse_is_refused():
    meters = Meters(device=CPU)
    add(meters, a=1.0)
    with pytest.raises(AssertionError, match=r"\['a'\] are already added under other names"):
        add(meters, a=1.0, b=1.0)
    with pytest.raises(AssertionError, match="occurs twice"):
        meters.add_sums(("x", "x"), sums_M=torch.zeros(2))
    with pytest.raises(AssertionError, match="as many sums"):
        meters.add_sums(("x",), sums_M=torch.zeros(2))
