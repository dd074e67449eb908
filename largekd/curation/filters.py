"""What a filter is, and the filters that look at one answer alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from largekd.config.curation import (
    ConfidenceFilterConfig,
    HookFilterConfig,
    LengthFilterConfig,
    RepetitionFilterConfig,
)
from largekd.curation.records import Curated
from largekd.curation.words import ngrams, repeated_share, words
from largekd.errors import ConfigError
from largekd.runtime.user_modules import import_user_module

# Characters for each word on average, from which on characters are looked at in place of words.
_MOST_OF_A_WORD = 40


@dataclass(frozen=True)
class Judgement:
    """What a filter found in an answer: scores, and the limit that it broke, None if none; `note` tells more."""

    scores: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None
    note: str = ""


class Filter(Protocol):
    """Judges answers, row by row of the source. It may remember rows: they come in the same order in every run."""

    def judge(self, group: Sequence[Curated]) -> list[Judgement]:
        """A judgement of each answer of one row. Also of those that an earlier rule refused (`dropped_by`), for the
        sake of their scores; these must not count against others."""
        ...

    def summary(self) -> Mapping[str, object]:
        """JSON: what is worth telling of the whole, once all rows were judged."""
        ...


class EachAlone:
    """A filter of single answers."""

    def __init__(self, one: Callable[[Curated], Judgement]) -> None:
        self._one = one

    def judge(self, group: Sequence[Curated]) -> list[Judgement]:
        """A judgement of each."""
        return [self._one(row) for row in group]

    def summary(self) -> Mapping[str, object]:
        """Nothing."""
        return {}


def apply_filters(group: Sequence[Curated], *, filters: Iterable[tuple[str, Filter]]) -> list[Curated]:
    """The answers of one row with all scores, `<filter>.<score>`, and the first rule that refused each.

    Failed answers have no text: they pass by.
    """
    rows = list(group)
    for name, judging in filters:
        places = [place for place, row in enumerate(rows) if row.written.finish != "failed"]
        judged = judging.judge([rows[place] for place in places])
        for place, judgement in zip(places, judged, strict=True):
            rows[place] = _with(rows[place], judgement=judgement, name=name)
    return rows


def _with(row: Curated, *, judgement: Judgement, name: str) -> Curated:
    scores = {**row.scores, **{f"{name}.{score}": value for score, value in judgement.scores.items()}}
    if row.dropped_by is None and judgement.refused is not None:
        return replace(row, scores=scores, dropped_by=f"{name}.{judgement.refused}", note=judgement.note)
    return replace(row, scores=scores)


def length_filter(config: LengthFilterConfig) -> Filter:
    """Scores `words` and `characters`."""

    def one(row: Curated) -> Judgement:
        count = len(words(row.written.text))
        refused = "min_words" if count < config.min_words else None
        if config.max_words is not None and count > config.max_words:
            refused = "max_words"
        return Judgement({"words": count, "characters": len(row.written.text)}, refused)

    return EachAlone(one)


def repetition_filter(config: RepetitionFilterConfig) -> Filter:
    """Scores `ngram_share`, `line_share` (1 - distinct / all) and `unique_words` (distinct / all)."""

    def one(row: Curated) -> Judgement:
        sequence = _words_or_characters(row.written.text)
        lines = [line.strip() for line in row.written.text.splitlines() if line.strip()]
        scores = {
            "ngram_share": repeated_share(list(ngrams(sequence, size=config.ngram))),
            "line_share": repeated_share(lines),
            "unique_words": 1.0 - repeated_share(sequence),
        }
        broken = {
            "max_ngram_share": scores["ngram_share"] > config.max_ngram_share,
            "max_line_share": scores["line_share"] > config.max_line_share,
            "min_unique_words": scores["unique_words"] < config.min_unique_words,
        }
        return Judgement(scores, next((rule for rule, is_broken in broken.items() if is_broken), None))

    return EachAlone(one)


def _words_or_characters(text: str) -> list[str]:
    """Words; characters of a text that has hardly any, such as "!!!!" or one endless word."""
    found, characters = words(text), "".join(text.split())
    return found if len(characters) <= _MOST_OF_A_WORD * max(1, len(found)) else list(characters)


def confidence_filter(config: ConfidenceFilterConfig) -> Filter:
    """Score `mean_logp`; an answer without one is refused as `unknown`."""

    def one(row: Curated) -> Judgement:
        if row.written.mean_logp is None:
            return Judgement(refused="unknown", note="the backend gives no log-probabilities")
        refused = "min_mean_logp" if row.written.mean_logp < config.min_mean_logp else None
        return Judgement({"mean_logp": row.written.mean_logp}, refused)

    return EachAlone(one)


def hook_filter(config: HookFilterConfig) -> Filter:
    """All scores that the user's function gives; the one called `name` decides. Errors: ConfigError."""
    function = getattr(import_user_module(config.module, key="curation.filters"), "score", None)
    if not callable(function):
        raise ConfigError(f"curation.filters: {config.module!r} has no function score(row) -> dict; add it.")
    if config.min_score is None and config.max_score is None:
        raise ConfigError(
            f"curation.filters: the hook {config.module!r} has neither min_score nor max_score, so that it drops "
            "nothing; set one."
        )

    def one(row: Curated) -> Judgement:
        scores = function(row)
        if not _are_scores(scores, name=config.name):
            raise ConfigError(
                f"curation.filters: score(row) of {config.module!r} returned {scores!r}; a dict of finite numbers is "
                f"expected, one of them called {config.name!r}."
            )
        value = scores[config.name]
        refused = "min_score" if config.min_score is not None and value < config.min_score else None
        if config.max_score is not None and value > config.max_score:
            refused = "max_score"
        return Judgement({name: float(found) for name, found in scores.items()}, refused)

    return EachAlone(one)


def _are_scores(scores: object, *, name: str) -> bool:
    if not isinstance(scores, Mapping) or name not in scores:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in scores.values())
