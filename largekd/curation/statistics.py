"""Figures of a curation, gathered answer by answer; memory does not grow with their number."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from largekd.curation.records import Curated
from largekd.curation.words import ngrams, words

# Distinct-n depends on the number of texts, so that it is always of the same number where there are as many.
DIVERSITY_ANSWERS = 2000
DIVERSITY_NGRAMS = (1, 2, 3)
EXAMPLES_KEPT = 6
EXAMPLES_OF_A_RULE = 3
RATE_BINS = 10


@dataclass
class Statistics:
    """What was kept and dropped, and what it looks like."""

    answers: int = 0
    kept: int = 0
    rows: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    verified_by: Counter[str] = field(default_factory=Counter)
    """Verdicts other than unknown by what gave them: a rule's name, or judge."""
    finishes: Counter[str] = field(default_factory=Counter)
    templates: Counter[str] = field(default_factory=Counter)
    templates_kept: Counter[str] = field(default_factory=Counter)
    tokens_kept: Counter[int] = field(default_factory=Counter)
    tokens_dropped: Counter[int] = field(default_factory=Counter)
    pass_rates: Counter[int] = field(default_factory=Counter)
    score_names: set[str] = field(default_factory=set)
    prompt_tokens: int = 0
    written_tokens: int = 0
    cost: float = 0.0
    examples_kept: list[Curated] = field(default_factory=list)
    examples_dropped: defaultdict[str, list[Curated]] = field(default_factory=lambda: defaultdict(list))
    _grams: dict[int, set[tuple[str, ...]]] = field(default_factory=lambda: {size: set() for size in DIVERSITY_NGRAMS})
    _grams_total: Counter[int] = field(default_factory=Counter)

    def add_row(self, group: Sequence[Curated]) -> None:
        """The answers of one row."""
        self.rows += 1
        self.rows_kept += any(row.dropped_by is None for row in group)
        outcomes = Counter(row.verdict.outcome for row in group if row.written.finish != "failed")
        verified = outcomes["right"] + outcomes["wrong"]
        if verified:
            self.pass_rates[min(outcomes["right"] * RATE_BINS // verified, RATE_BINS - 1)] += 1
        for row in group:
            self._add(row)

    def _add(self, row: Curated) -> None:
        self.answers += 1
        self.outcomes[row.verdict.outcome] += 1
        if row.verdict.outcome != "unknown":
            self.verified_by[row.verdict.how] += 1
        self.finishes[row.written.finish] += 1
        self.templates[row.ask.template] += 1
        self.score_names.update(row.scores)
        self.prompt_tokens += row.written.prompt_tokens
        self.written_tokens += row.written.written_tokens
        self.cost += row.written.cost
        if row.dropped_by is not None:
            self.dropped[row.dropped_by] += 1
            self.tokens_dropped[row.written.written_tokens] += 1
            examples = self.examples_dropped[row.dropped_by]
            if len(examples) < EXAMPLES_OF_A_RULE:
                examples.append(row)
            return
        if self.kept < DIVERSITY_ANSWERS:
            sequence = words(row.written.text)
            for size in DIVERSITY_NGRAMS:
                grams = list(ngrams(sequence, size=size))
                self._grams[size].update(grams)
                self._grams_total[size] += len(grams)
        self.kept += 1
        self.templates_kept[row.ask.template] += 1
        self.tokens_kept[row.written.written_tokens] += 1
        if len(self.examples_kept) < EXAMPLES_KEPT:
            self.examples_kept.append(row)

    def diversity(self) -> dict[str, float]:
        """distinct-n (Li et al. 2016, arXiv 1510.03055): distinct / all n-grams of the first kept answers."""
        return {
            f"distinct_{size}": round(len(self._grams[size]) / max(1, self._grams_total[size]), 6)
            for size in DIVERSITY_NGRAMS
        }

    def funnel(self, rules: Sequence[str]) -> list[tuple[str, int]]:
        """Answers that are left: at first, and after each rule."""
        by_rule: Counter[str] = Counter()
        for rule, count in self.dropped.items():
            by_rule[rule.partition(".")[0]] += count
        left, steps = self.answers, [("written", self.answers)]
        for rule in rules:
            left -= by_rule.pop(rule, 0)
            steps.append((rule, left))
        assert not by_rule and left == self.kept, f"answers got lost: {by_rule}"
        return steps

    def as_dict(self) -> dict[str, Any]:
        """JSON: the figures, without examples."""
        return {
            "answers": self.answers,
            "kept": self.kept,
            "acceptance": round(self.kept / max(1, self.answers), 6),
            "rows": self.rows,
            "rows_kept": self.rows_kept,
            "dropped": dict(sorted(self.dropped.items())),
            "outcomes": dict(sorted(self.outcomes.items())),
            "verified_by": dict(sorted(self.verified_by.items())),
            "finishes": dict(sorted(self.finishes.items())),
            "templates": {
                name: {"written": count, "kept": self.templates_kept[name]}
                for name, count in sorted(self.templates.items())
            },
            "rows_by_pass_rate": [self.pass_rates[place] for place in range(RATE_BINS)],
            "diversity": self.diversity(),
            "prompt_tokens": self.prompt_tokens,
            "written_tokens": self.written_tokens,
            "cost": round(self.cost, 6),
        }
