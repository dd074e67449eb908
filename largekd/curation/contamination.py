"""Overlap with evaluation sets: word n-grams, whatever their case and punctuation.

The measure is that of GPT-3 (Brown et al. 2020, appendix C), 13 words.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largekd.config.curation import ContaminationFilterConfig
from largekd.curation.filters import Judgement
from largekd.curation.records import Curated
from largekd.curation.words import gram_digest, gram_digests, ngrams, words
from largekd.errors import ConfigError, DataError

_LEAST_OF_A_QUESTION = 3


@dataclass(frozen=True)
class _EvaluationSet:
    """Digests of a set's n-grams, sorted, by the number of their words; of texts that are too short for these, of the
    whole."""

    name: str
    grams: Mapping[int, NDArray[np.uint64]]
    wholes: frozenset[int]
    texts: int
    too_short: int


class ContaminationFilter:
    """Score of each set: share of an answer's n-grams, its question's included, that occur in the set.

    A text of the set with fewer words than `ngram`, but at least half as many, counts when it occurs whole; a shorter
    one of at least three words when it is the whole question, signs of arithmetic included, and the score is then 1.
    Errors: ConfigError, DataError for a set that cannot be read.
    """

    def __init__(self, config: ContaminationFilterConfig) -> None:
        self._config = config
        self._sets = [_read_set(Path(path), config=config) for path in config.sets]
        names = [one.name for one in self._sets]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"curation.filters: sets {', '.join(config.sets)}: two files have the same name, by which they are "
                "reported; rename one."
            )
        self._found = dict.fromkeys(names, 0)

    def judge(self, group: Sequence[Curated]) -> list[Judgement]:
        """The answers of one row."""
        return [self._one(row) for row in group]

    def summary(self) -> Mapping[str, object]:
        """For each set its texts, those that count only as whole questions, and the answers that overlap with it."""
        return {
            one.name: {"texts": one.texts, "too_short": one.too_short, "overlapping": self._found[one.name]}
            for one in self._sets
        }

    def _one(self, row: Curated) -> Judgement:
        question = row.ask.item.question
        texts = [words(question), words(row.written.text)]
        whole = gram_digest(words(question, signs=True))
        total = sum(len(list(ngrams(text, size=self._config.ngram))) for text in texts)
        scores, refused, note = {}, None, ""
        for one in self._sets:
            hits, example = self._overlap(one, texts=texts)
            scores[one.name] = min(1.0, hits / max(1, total))
            if whole in one.wholes:
                scores[one.name], example = 1.0, question
            self._found[one.name] += scores[one.name] > 0
            if refused is None and scores[one.name] > self._config.max_share:
                refused, note = one.name, example
        return Judgement(scores, refused, note)

    def _overlap(self, one: _EvaluationSet, *, texts: Sequence[Sequence[str]]) -> tuple[int, str]:
        """Number of n-grams that the set has too, and the first of them."""
        hits, example = 0, ""
        for size, known in one.grams.items():
            for text in texts:
                if len(text) < size:
                    continue
                digests = gram_digests(ngrams(text, size=size))
                # np.isin would sort the whole set for each answer.
                found = known[np.minimum(np.searchsorted(known, digests), len(known) - 1)] == digests
                hits += int(found.sum())
                if found.any() and not example:
                    start = int(found.argmax())
                    example = " ".join(text[start : start + size])
        return hits, example


def _read_set(path: Path, *, config: ContaminationFilterConfig) -> _EvaluationSet:
    least = max(2, config.ngram // 2)
    digests: dict[int, set[int]] = {}
    wholes: set[int] = set()
    texts = too_short = 0
    for text in _texts(path, columns=config.columns):
        sequence = words(text)
        if len(sequence) < least:
            with_signs = words(text, signs=True)
            if len(with_signs) >= _LEAST_OF_A_QUESTION:
                wholes.add(gram_digest(with_signs))
            too_short += 1
            continue
        texts += 1
        size = min(config.ngram, len(sequence))
        digests.setdefault(size, set()).update(map(gram_digest, ngrams(sequence, size=size)))
    if not texts and not wholes:
        columns = f" in the columns {', '.join(config.columns)}" if config.columns else ""
        raise DataError(f"curation.filters: {path} has no text of at least {least} words{columns} to compare with.")
    grams = {size: np.sort(np.fromiter(digests[size], dtype=np.uint64)) for size in sorted(digests)}
    return _EvaluationSet(
        name=path.name.partition(".")[0], grams=grams, wholes=frozenset(wholes), texts=texts, too_short=too_short
    )


def _texts(path: Path, *, columns: Sequence[str]) -> Iterator[str]:
    """The texts of a set: of JSON lines every string that counts, of another file its paragraphs."""
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"curation.filters: the evaluation set {path} cannot be read ({error}).") from error
    if path.suffix not in (".jsonl", ".json"):
        yield from filter(str.strip, content.split("\n\n"))
        return
    for value in _values(content, path=path):
        if columns and isinstance(value, dict):
            value = [value[column] for column in columns if column in value]
        yield from _strings(value)


def _values(content: str, *, path: Path) -> Iterator[Any]:
    """Every row of a JSON array, or of JSON lines."""
    try:
        if content.lstrip()[:1] == "[":
            yield from json.loads(content)
            return
        for line in content.split("\n"):
            if line.strip():
                yield json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"curation.filters: {path}: broken JSON ({error.msg}) in {error.doc[:80]!r}.") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
