"""How hard a row is for the model that wrote its answers, and an even choice of rows."""

from collections import Counter
from collections.abc import Mapping, Sequence

from largekd.config.curation import DifficultyFilterConfig
from largekd.curation.filters import Judgement
from largekd.curation.records import Curated


class DifficultyFilter:
    """Score `pass_rate`: right / (right + wrong) over all of a row's answers, also those that other rules drop.

    A row without any verified answer has no pass rate and only `per_row` applies to it. Of each interval of the pass
    rate the first `per_bucket` rows stay; rows come in a random order, so these are a fair choice.
    """

    def __init__(self, config: DifficultyFilterConfig) -> None:
        self._config = config
        self._rows: Counter[int] = Counter()

    def judge(self, group: Sequence[Curated]) -> list[Judgement]:
        """The answers of one row."""
        outcomes = Counter(row.verdict.outcome for row in group)
        verified = outcomes["right"] + outcomes["wrong"]
        rate = outcomes["right"] / verified if verified else None
        scores = {} if rate is None else {"pass_rate": rate}
        refused = None if rate is None else self._limit(rate)
        staying = [place for place, row in enumerate(group) if row.dropped_by is None]
        if refused is None and rate is not None and staying:
            refused = self._fill(rate)
        surplus = [] if self._config.per_row is None else staying[self._config.per_row :]
        return [Judgement(scores, refused or ("per_row" if place in surplus else None)) for place in range(len(group))]

    def summary(self) -> Mapping[str, object]:
        """Rows that were kept in each interval of the pass rate."""
        return {"rows_of_buckets": [self._rows[bucket] for bucket in range(self._config.buckets)]}

    def _limit(self, rate: float) -> str | None:
        if rate < self._config.min_pass_rate:
            return "min_pass_rate"
        return "max_pass_rate" if rate > self._config.max_pass_rate else None

    def _fill(self, rate: float) -> str | None:
        bucket = min(int(rate * self._config.buckets), self._config.buckets - 1)
        if self._config.per_bucket is not None and self._rows[bucket] >= self._config.per_bucket:
            return "per_bucket"
        self._rows[bucket] += 1
        return None
