"""Sums of a logging window, kept on the device and brought to the host once per flush.

Shape letters: M added numbers, F elements of the reduced vector.
"""

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
    """Accumulates named sums between two log steps; `flush` returns their totals over all ranks and starts again.

    Nothing is read from the device before `flush`. Every rank adds the same names in the same order between two
    flushes; a difference is an AssertionError on every rank. Sums are float64 on CPU and CUDA, float32 elsewhere.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self._totals: dict[tuple[str, ...], Tensor] = {}

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
        taken = [name for name in key if any(name in other for other in self._totals)]
        assert not taken, f"{taken} are already added under other names beside them"
        self._totals[key] = values

    def flush(self, *, reduce: Reduce) -> dict[str, float]:
        """Totals by name, in the order of adding; then starts a new window.

        `reduce` sums a vector over the ranks and returns it (identity for one rank); it is called exactly once, and the
        result reaches the host in one copy.
        """
        names = [name for key in self._totals for name in key]
        if not names:
            return {}
        fingerprint = torch.tensor(_fingerprint(names), dtype=self._dtype).to(self._device)
        vector = torch.cat([fingerprint, *self._totals.values()])
        reduced_F = reduce(torch.nn.functional.pad(vector, (0, -vector.numel() % _PAD_ELEMENTS)))
        numbers = reduced_F.tolist()
        checks = fingerprint.numel()
        assert _all_equal(numbers[:checks]), (
            f"ranks disagree on their meters; this rank has {names}. "
            "Every rank must add the same names in the same order between two flushes"
        )
        self._totals = {}
        return dict(zip(names, numbers[checks:], strict=False))


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
