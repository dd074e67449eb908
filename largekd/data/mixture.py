"""Several training sets in one: how many samples of each an epoch has, and which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largekd.errors import ConfigError

# Tells the random numbers of a source's passes from those of an epoch's order.
_PASS_STREAM = 0x6D6978


def tempered_shares(sizes: Sequence[int], *, temperature: float) -> NDArray[np.float64]:
    """p_i = n_i^(1/T) / sum_j n_j^(1/T): T = 1 in proportion to the samples n_i, T towards infinity equal shares.

    Source: Arivazhagan et al. 2019, arXiv 1907.05019, section 3.
    """
    # Relative to the largest, so that small temperatures do not overflow.
    logs = np.log(np.asarray(sizes, np.float64)) / temperature
    powers = np.exp(logs - logs.max())
    return powers / powers.sum()


@dataclass(frozen=True)
class Mixture:
    """`sizes` samples of each source, whose ids follow each other, and `counts` of each in an epoch.

    Source i goes through all its samples in a random order, then again in another: epoch e takes the samples
    e * counts[i] ... (e + 1) * counts[i] - 1 of this endless walk. Nothing is drawn twice before all were drawn once.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    def order(self, *, epoch: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
        """Ids of an epoch's samples in order, a function of the arguments alone; without `shuffle` the sources stand in
        their own order, evenly among each other."""
        starts = np.cumsum([0, *self.sizes])
        parts = [
            starts[source] + self._walk(source, epoch=epoch, seed=seed, shuffle=shuffle)
            for source in range(len(self.sizes))
        ]
        order = np.concatenate(parts).astype(np.int64)
        if shuffle:
            return np.random.default_rng((seed, epoch)).permutation(order)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        return order[np.argsort(places, kind="stable")]

    def identity(self) -> dict[str, Any]:
        """JSON: what a position in the data depends on."""
        return {"sizes": list(self.sizes), "counts": list(self.counts)}

    def _walk(self, source: int, *, epoch: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
        size, count = self.sizes[source], self.counts[source]
        first, stop = epoch * count, (epoch + 1) * count
        passes = []
        for number in range(first // size, -(-stop // size)):
            order = np.arange(size, dtype=np.int64)
            if shuffle:
                order = np.random.default_rng((seed, _PASS_STREAM, source, number)).permutation(order)
            passes.append(order)
        begin = first - first // size * size
        return np.concatenate(passes)[begin : begin + count]


def make_mixture(sizes: Sequence[int], *, shares: Sequence[float] | None, temperature: float) -> Mixture:
    """The mixture with relative `shares`, or with `tempered_shares` where there are none.

    An epoch has sum(sizes) samples; what rounding leaves over goes to the largest remainders. Errors: ConfigError for
    a share that is less than a sample.
    """
    if shares is None:
        parts = tempered_shares(sizes, temperature=temperature)
    else:
        parts = np.asarray(shares, np.float64) / np.sum(shares)
    exact = parts * sum(sizes)
    # A share that means a whole number of samples stays that in floating point.
    exact = np.where(np.abs(exact - np.rint(exact)) < 1e-6, np.rint(exact), exact)
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")[: sum(sizes) - int(counts.sum())]
    counts[largest] += 1
    if not counts.all():
        place = int(np.flatnonzero(counts == 0)[0])
        key = "data.train" if place == 0 else f"data.mixture.others.{place - 1}.source"
        raise ConfigError(
            f"{key}: its share {parts[place]:.2g} of {sum(sizes)} samples is less than one in an epoch; raise it, or "
            "leave this source out."
        )
    return Mixture(sizes=tuple(int(size) for size in sizes), counts=tuple(counts.tolist()))
