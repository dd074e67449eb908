"""Where every tensor of a student came from."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from largekd.runtime.files import write_json

REPORT_FILE = "initialisation.json"
EXPERT_MAP_FILE = "expert_map.json"


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
    """Every tensor of the student once, and what the plan as a whole was (`plan`: layers, rule, sizes).

    expert_map: which experts correspond, where teacher and student have different numbers; see `corresponding_experts`.
    """

    entries: tuple[Entry, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)
    expert_map: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def copied_frac(self) -> float:
        """The share of all the student's entries that are the teacher's unchanged; 0 where nothing is known of them."""
        sizes = [math.prod(entry.shape) for entry in self.entries]
        copied = sum(size * entry.copied_frac for size, entry in zip(sizes, self.entries, strict=True))
        return copied / max(sum(sizes), 1)

    def as_mapping(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "plan": dict(self.plan),
            "expert_map": dict(self.expert_map),
            "copied_frac": self.copied_frac,
            "tensors": [asdict(entry) for entry in self.entries],
        }

    def write(self, folder: Path) -> None:
        """Write the report, and beside it expert_map.json if there is one, the file that
        objective.router.distil.expert_map takes."""
        write_json(folder / REPORT_FILE, value=self.as_mapping())
        if self.expert_map:
            write_json(folder / EXPERT_MAP_FILE, value=dict(self.expert_map))

    def in_words(self) -> str:
        """One line for the log: how many tensors were made in which way."""
        counts = Counter(entry.how for entry in self.entries)
        ways = "; ".join(f"{count} {how}" for how, count in counts.most_common())
        return f"{len(self.entries)} tensors, {self.copied_frac:.1%} of their entries the teacher's unchanged: {ways}"


def shape_of(config: PretrainedConfig) -> list[str | int]:
    """What tells the layers of one model from another's, as initialisation.json says it: type, layers, width."""
    return [str(config.model_type), int(config.num_hidden_layers), int(config.hidden_size)]
