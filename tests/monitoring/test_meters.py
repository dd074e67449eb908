"""Meters: global means, one reduce, and ranks that disagree."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from largekd.monitoring.meters import Meters, Reduce

CPU = torch.device("cpu")


def identity(vector: Tensor) -> Tensor:
    return vector


def flush_two(fill: Callable[[Meters, int], None]) -> list[dict[str, float]]:
    """Flushes two ranks' meters, filled by `fill(meters, rank)`, through reductions worked out here."""
    seen: dict[tuple[int, str], Tensor] = {}

    def capture(rank: int, kind: str) -> Reduce:
        def reduce(vector: Tensor) -> Tensor:
            seen[rank, kind] = vector.clone()
            return vector

        return reduce

    for rank in range(2):
        meters = Meters(device=CPU)
        fill(meters, rank)
        try:
            meters.flush(reduce=capture(rank, "sum"), reduce_max=capture(rank, "max"))
        except AssertionError as error:
            raise RuntimeError("a rank disagreed with itself") from error
    figures = []
    for rank in range(2):
        meters = Meters(device=CPU)
        fill(meters, rank)
        figures.append(
            meters.flush(
                reduce=lambda vector: seen[0, "sum"] + seen[1, "sum"],
                reduce_max=lambda vector: torch.maximum(seen[0, "max"], seen[1, "max"]),
            )
        )
    return figures


def test_mean_is_global_sum_over_global_count():
    def fill(meters: Meters, rank: int) -> None:
        # Uneven counts: the mean of the ranks' means would be (1 + 4) / 2.
        meters.add("loss", value=torch.tensor(3.0 if rank == 0 else 4.0), count=3 if rank == 0 else 1)
        meters.add("loss", value=2.0, count=torch.tensor(2.0))
        meters.add_sums(("kl", "weight"), sums_M=torch.tensor([1.5, 2.0]) * (rank + 1))
        meters.add_max("peak", value=10.0 + rank)
        meters.add_max("peak", value=torch.tensor(7.0))

    first, second = flush_two(fill)
    assert first == second
    assert first == {"loss": pytest.approx(11 / 8), "kl": 4.5, "weight": 6.0, "peak": 11.0}


def test_one_reduce_whatever_the_number_of_meters():
    calls = []

    def reduce(vector: Tensor) -> Tensor:
        calls.append(vector.numel())
        return vector

    meters = Meters(device=CPU)
    for index in range(300):
        meters.add(f"area/{index}", value=torch.tensor(float(index)))
    figures = meters.flush(reduce=reduce)
    assert len(calls) == 1
    assert [figures[f"area/{index}"] for index in range(300)] == [float(index) for index in range(300)]


def test_flush_starts_a_new_window_and_an_empty_one_reduces_nothing():
    meters = Meters(device=CPU)
    meters.add("loss", value=5.0)
    assert meters.flush(reduce=identity) == {"loss": 5.0}
    meters.add("loss", value=1.0)
    assert meters.flush(reduce=identity) == {"loss": 1.0}

    def forbidden(vector: Tensor) -> Tensor:
        raise RuntimeError("nothing to reduce")

    assert meters.flush(reduce=forbidden) == {}


def test_zero_count_has_no_value_and_nan_stays_in_its_meter():
    meters = Meters(device=CPU)
    meters.add("a", value=0.0, count=0)
    meters.add("b", value=torch.tensor(math.nan))
    meters.add("c", value=2.0)
    figures = meters.flush(reduce=identity)
    assert math.isnan(figures["a"]) and math.isnan(figures["b"]) and figures["c"] == 2.0


def test_accumulates_in_float64():
    meters = Meters(device=CPU)
    for _ in range(3):
        meters.add("tokens", value=torch.tensor(2.0**25 + 4, dtype=torch.float32))
        meters.add("tokens", value=torch.tensor(1.0), count=0)
    assert meters.flush(reduce=identity)["tokens"] == 2.0**25 + 5


def test_later_changes_of_a_tensor_do_not_reach_the_meter():
    value, sums = torch.zeros((), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    meters = Meters(device=CPU)
    meters.add("a", value=value)
    meters.add_sums(("b",), sums_M=sums)
    meters.add_max("c", value=value)
    meters.add_sums(("b",), sums_M=torch.ones(1))
    value += 9
    assert meters.flush(reduce=identity, reduce_max=identity) == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert sums.item() == 0


@pytest.mark.parametrize("other", [("a", "c"), ("b", "a"), ("a",), ("a", "b", "c")])
def test_ranks_with_other_names_are_told_so(other: tuple[str, ...]):
    def fill(meters: Meters, rank: int) -> None:
        for name in ("a", "b") if rank == 0 else other:
            meters.add(name, value=1.0)

    with pytest.raises(AssertionError, match=r"ranks disagree.*mean:a.*same names in the same order"):
        flush_two(fill)


def test_same_name_as_another_kind_is_told_apart_between_ranks():
    def fill(meters: Meters, rank: int) -> None:
        if rank == 0:
            meters.add("a", value=1.0)
        else:
            meters.add_sums(("a", "b"), sums_M=torch.ones(2))

    with pytest.raises(AssertionError, match="ranks disagree"):
        flush_two(fill)


def test_fingerprint_survives_float32_sums_over_many_ranks():
    meters = Meters(device=CPU)
    meters._dtype = torch.float32
    meters.add("a", value=1.0)
    assert meters.flush(reduce=lambda vector: vector * 4096) == {"a": 1.0}


def test_misuse_is_refused():
    meters = Meters(device=CPU)
    meters.add("a", value=1.0)
    with pytest.raises(AssertionError, match="already added in another way"):
        meters.add_max("a", value=1.0)
    with pytest.raises(AssertionError, match="scalars"):
        meters.add("b", value=torch.zeros(2))
    with pytest.raises(AssertionError, match="occurs twice"):
        meters.add_sums(("x", "x"), sums_M=torch.zeros(2))
    with pytest.raises(AssertionError, match="as many sums"):
        meters.add_sums(("x",), sums_M=torch.zeros(2))
    meters.add_max("m", value=1.0)
    with pytest.raises(AssertionError, match="reduce_max"):
        meters.flush(reduce=identity)
