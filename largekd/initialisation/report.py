"""Where every tensor of a student came from."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT_FILE = "initialisation.json"


@dataclass(frozen=True)
class Entry:
    """One tensor: the teacher's tensors it is made of, how, and the share of its entries that are theirs unchanged."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    how: str
    copied_frac: float


@dataclass(frozen=True)
class InitialisationReport:
    """Every tensor of the student once, and what the plan as a whole was (`plan`: layers, rule, sizes)."""

    entries: tuple[Entry, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def copied_frac(self) -> float:
        """The share of all the student's entries that are the teacher's unchanged."""
        sizes = [math.prod(entry.shape) for entry in self.entries]
        copied = sum(size * entry.copied_frac for size, entry in zip(sizes, self.entries, strict=True))
        return copied / sum(sizes)

    def as_mapping(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "plan": dict(self.plan),
            "copied_frac": self.copied_frac,
            "tensors": [asdict(entry) for entry in self.entries],
        }

    def in_words(self) -> str:
        """One line for the log: how many tensors were made in which way."""
        counts = Counter(entry.how for entry in self.entries)
        ways = "; ".join(f"{count} {how}" for how, count in counts.most_common())
        return f"{len(self.entries)} tensors, {self.copied_frac:.1%} of their entries the teacher's unchanged: {ways}"
