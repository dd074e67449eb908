"""Records that cannot be used: counted, named, and fatal above a share that the user sets."""

from collections.abc import Sequence
from dataclasses import dataclass

from largekd.errors import DataError

NAMED_RECORDS = 5


class UnusableRecordError(DataError):
    """One record cannot become a sample; the message is the reason. Caught where records are counted."""


@dataclass(frozen=True)
class BadRecord:
    """A record that was set aside: its index in the source, where it stands (file:line), and why."""

    record: int
    origin: str
    reason: str


@dataclass(frozen=True)
class Quarantine:
    """The records of one source that were set aside, out of `total` records that were read."""

    source: str
    total: int
    bad: tuple[BadRecord, ...] = ()

    @property
    def bad_frac(self) -> float:
        """Share of unusable records, in [0, 1]."""
        return len(self.bad) / self.total if self.total else 0.0

    def as_rows(self) -> list[dict[str, str | int]]:
        """One JSON-able object per unusable record, for `quarantine.json`."""
        return [
            {"source": self.source, "record": bad.record, "origin": bad.origin, "reason": bad.reason}
            for bad in self.bad
        ]

    def enforce(self, *, max_bad_frac: float, key: str) -> None:
        """Raises DataError naming the first unusable records where their share exceeds `max_bad_frac`.

        A source without a single usable record is refused whatever the share.
        """
        if self.total == 0:
            raise DataError(
                f"{key}: {self.source} is empty: no record was read. Point {key}.path to data with records."
            )
        if len(self.bad) == self.total:
            raise DataError(f"{key}: {self.source} has no usable record among {self.total}:{_named(self.bad)}")
        if self.bad_frac > max_bad_frac:
            raise DataError(
                f"{key}: {len(self.bad)} of {self.total} records of {self.source} are unusable "
                f"({self.bad_frac:.2%}), above {key}.max_bad_frac = {max_bad_frac}:{_named(self.bad)}\n"
                f"Mend the records, or raise {key}.max_bad_frac to set them aside."
            )


def _named(bad: Sequence[BadRecord]) -> str:
    lines = [f"\n  {record.origin}: {record.reason}" for record in bad[:NAMED_RECORDS]]
    if len(bad) > NAMED_RECORDS:
        lines.append(f"\n  and {len(bad) - NAMED_RECORDS} more")
    return "".join(lines)
