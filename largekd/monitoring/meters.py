"""Sums and counts of a logging window, kept on the device and brought to the host once per flush.

Shape letters: M added numbers, F elements of the reduced vector.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

# Ranks that disagree on their names also disagree on the length of the reduced vector, which a collective answers with
# a hang or garbage. Padding to a common length lets the fingerprint inside the vector report the disagreement instead.
_PAD_ELEMENTS = 128
_NIBBLES = 8


class Meters:
    """Accumulates named numbers between two log steps; `flush` returns their global figures and starts again.

    Three kinds of numbers, told apart by the method that adds them, each over all calls and ranks:
    `add`: mean = sum of values / sum of counts; `add_sums`: the plain total; `add_max`: the largest.

    Nothing is read from the device before `flush`. Every rank adds the same names in the same order between two
    flushes; a difference is an AssertionError on every rank. Sums are float64 on CPU and CUDA, float32 elsewhere.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self._means: dict[str, tuple[_Sum, _Sum]] = {}
        self._totals: dict[tuple[str, ...], Tensor] = {}
        self._maxima: dict[str, Tensor | float] = {}

    def add(self, name: str, *, value: Tensor | float, count: Tensor | float = 1) -> None:
        """Adds `value`, a sum over `count` items (scalars), to the mean called `name`."""
        if name not in self._means:
            self._claim(name)
            self._means[name] = (_Sum(), _Sum())
        for running, number in zip(self._means[name], (value, count), strict=True):
            running.add(self._scalar(number) if isinstance(number, Tensor) else number)

    def add_sums(self, names: Sequence[str], *, sums_M: Tensor) -> None:
        """Adds a vector of sums to the totals called `names`, one operation for all of them.

        sums_M: (len(names),) on any device.
        """
        key = tuple(names)
        assert sums_M.shape == (len(key),), f"{len(key)} names {key} need as many sums, got shape {tuple(sums_M.shape)}"
        values = sums_M.detach().to(device=self._device, dtype=self._dtype, copy=True)
        if key in self._totals:
            self._totals[key] += values
            return
        assert len(set(key)) == len(key), f"a name occurs twice in {key}"
        for name in key:
            self._claim(name)
        self._totals[key] = values

    def add_max(self, name: str, *, value: Tensor | float) -> None:
        """Keeps the largest `value` (scalar) seen under `name`."""
        number = self._scalar(value) if isinstance(value, Tensor) else float(value)
        if name not in self._maxima:
            self._claim(name)
            self._maxima[name] = number
            return
        before = self._maxima[name]
        if isinstance(before, Tensor) or isinstance(number, Tensor):
            self._maxima[name] = torch.maximum(self._tensor(before), self._tensor(number))
        else:
            self._maxima[name] = max(before, number)

    def flush(self, *, reduce: Reduce, reduce_max: Reduce | None = None) -> dict[str, float]:
        """Global figures by name, in the order of means, totals, maxima; then starts a new window.

        `reduce` sums a vector over the ranks and returns it (identity for one rank); it is called exactly once.
        `reduce_max` takes the element-wise largest, and is called once if any `add_max` was. The result reaches the
        host in one copy. A mean whose count is zero is NaN: it has no value.
        """
        names = self._names()
        if not names:
            return {}
        means, totals, maxima = list(self._means), [n for key in self._totals for n in key], list(self._maxima)
        reduced_F = reduce(self._sums_vector(fingerprint=_fingerprint(names)))
        parts = [reduced_F]
        if maxima:
            assert reduce_max is not None, f"{maxima} are maxima: flush needs reduce_max"
            parts.append(reduce_max(torch.stack([self._tensor(value) for value in self._maxima.values()])))
        numbers = iter(torch.cat(parts).tolist())

        checks = [next(numbers) for _ in range(1 + 2 * _NIBBLES)]
        assert _all_equal(checks), (
            f"ranks disagree on their meters; this rank has {names}. "
            "Every rank must add the same names in the same order between two flushes"
        )
        pairs = [(next(numbers), next(numbers)) for _ in means]
        figures = {
            name: value / count if count else math.nan for name, (value, count) in zip(means, pairs, strict=True)
        }
        figures |= {name: next(numbers) for name in totals}
        for _ in range(reduced_F.numel() - len(checks) - 2 * len(means) - len(totals)):
            next(numbers)
        figures |= dict(zip(maxima, numbers, strict=True))
        self._means, self._totals, self._maxima = {}, {}, {}
        return figures

    def _names(self) -> list[str]:
        totals = [name for key in self._totals for name in key]
        kinds = (("mean", self._means), ("total", totals), ("max", self._maxima))
        return [f"{kind}:{name}" for kind, group in kinds for name in group]

    def _claim(self, name: str) -> None:
        taken = name in self._means or name in self._maxima or any(name in key for key in self._totals)
        assert not taken, f"meter {name!r} is already added in another way in this window"

    def _scalar(self, value: Tensor) -> Tensor:
        assert value.numel() == 1, f"a meter takes scalars, got shape {tuple(value.shape)}"
        return value.detach().reshape(()).to(device=self._device, dtype=self._dtype, copy=True)

    def _tensor(self, value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(value, device=self._device, dtype=self._dtype)

    def _sums_vector(self, *, fingerprint: list[float]) -> Tensor:
        """Fingerprint, (sum, count) of every mean, totals, zeros up to a multiple of the padding."""
        running = [part for pair in self._means.values() for part in pair]
        host = torch.tensor(fingerprint + [part.host for part in running], dtype=self._dtype).to(self._device)
        zero = host.new_zeros(())
        on_device = [zero] * len(fingerprint) + [zero if part.device is None else part.device for part in running]
        vector = torch.cat([host + torch.stack(on_device), *self._totals.values()])
        return torch.nn.functional.pad(vector, (0, -vector.numel() % _PAD_ELEMENTS))


class _Sum:
    """A running sum whose Python part stays on the host, so that adding a float copies nothing to the device."""

    def __init__(self) -> None:
        self.host = 0.0
        self.device: Tensor | None = None

    def add(self, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            self.device = value if self.device is None else self.device + value
        else:
            self.host += value


def _fingerprint(names: Sequence[str]) -> list[float]:
    """1, the nibbles of a checksum of `names` shifted to [-8, 7], and their squares.

    Small integers, so that their sums over ranks are exact in float32 up to 262,144 ranks.
    """
    checksum = zlib.crc32("\n".join(names).encode())
    nibbles = [float((checksum >> (4 * index) & 15) - 8) for index in range(_NIBBLES)]
    return [1.0, *nibbles, *(nibble * nibble for nibble in nibbles)]


def _all_equal(summed: Sequence[float]) -> bool:
    """Whether all ranks had the same fingerprint: n Σx² = (Σx)² holds exactly when all x are equal (Cauchy-Schwarz)."""
    ranks, firsts, squares = summed[0], summed[1 : 1 + _NIBBLES], summed[1 + _NIBBLES :]
    return all(ranks * square == first * first for first, square in zip(firsts, squares, strict=True))
