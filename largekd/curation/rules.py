"""From the configuration to the rules that an answer passes, in order."""

from collections import Counter
from collections.abc import Sequence

from largekd.config.curation import (
    ConfidenceFilterConfig,
    ContaminationFilterConfig,
    CurationConfig,
    DifficultyFilterConfig,
    DuplicateFilterConfig,
    FilterConfig,
    HookFilterConfig,
    LanguageFilterConfig,
    LengthFilterConfig,
    RepetitionFilterConfig,
)
from largekd.curation.contamination import ContaminationFilter
from largekd.curation.difficulty import DifficultyFilter
from largekd.curation.duplicates import DuplicateFilter
from largekd.curation.filters import Filter, confidence_filter, hook_filter, length_filter, repetition_filter
from largekd.curation.language import language_filter
from largekd.curation.records import Parsed, Verdict, Written
from largekd.errors import ConfigError


def build_filters(config: CurationConfig) -> list[tuple[str, Filter]]:
    """The filters with their names: the kind, numbered from the second of a kind on.

    Errors: ConfigError, DataError for settings, packages or files that cannot be used.
    """
    if config.verify.kind == "none" and any(isinstance(one, DifficultyFilterConfig) for one in config.filters):
        raise ConfigError(
            "curation.filters: kind 'difficulty' counts verified answers, but curation.verify.kind = 'none'; set it."
        )
    seen: Counter[str] = Counter()
    filters = []
    for one in config.filters:
        seen[one.kind] += 1
        name = one.kind if seen[one.kind] == 1 else f"{one.kind}_{seen[one.kind]}"
        filters.append((name, _build(one)))
    return filters


def _build(config: FilterConfig) -> Filter:
    match config:
        case LengthFilterConfig():
            return length_filter(config)
        case RepetitionFilterConfig():
            return repetition_filter(config)
        case LanguageFilterConfig():
            return language_filter(config)
        case DuplicateFilterConfig():
            return DuplicateFilter(config)
        case ContaminationFilterConfig():
            return ContaminationFilter(config)
        case ConfidenceFilterConfig():
            return confidence_filter(config)
        case DifficultyFilterConfig():
            return DifficultyFilter(config)
        case HookFilterConfig():
            return hook_filter(config)


def gate(written: Written, *, parsed: Parsed, verdict: Verdict, config: CurationConfig) -> tuple[str | None, str]:
    """The rule before all filters that refuses an answer, None if none does, and what it found."""
    if written.finish == "failed":
        return "failed", written.failure or ""
    if not config.keep_unparsed and written.finish == "length":
        return "unfinished", f"cut off after {written.written_tokens} tokens"
    if not config.keep_unparsed and parsed.problem is not None:
        return "unparsed", parsed.problem
    if verdict.outcome == "wrong":
        return "wrong", verdict.detail
    if verdict.outcome == "unknown" and config.verify.kind != "none" and not config.keep_unknown:
        return "unverified", verdict.detail
    return None, ""


def rule_names(filters: Sequence[tuple[str, Filter]]) -> list[str]:
    """The rules in the order in which they are asked."""
    gates = ("failed", "unfinished", "unparsed", "wrong", "unverified", "no_answer")
    return [*gates, *(name for name, _ in filters)]
