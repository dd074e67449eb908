"""Texts that are not much like an earlier one: duplicate control of instructions while they are invented."""

import math
import re
from collections import defaultdict

_WORD = re.compile(r"\w+")


class Distinct:
    """Accepts a text unless its words have a Jaccard similarity above the limit with those of an accepted one.

    Prefix filtering (Chaudhuri, Ganti, Kaushik, "A primitive operator for similarity joins", ICDE 2006): sets that
    are more alike than the limit share a word among the first `n − ceil(limit · n) + 1` of each in any fixed order, so
    only texts that share such a word are compared.
    """

    def __init__(self, *, max_similarity: float) -> None:
        self._limit = max_similarity
        self._accepted: list[frozenset[str]] = []
        self._by_word: defaultdict[str, list[int]] = defaultdict(list)

    def accept(self, text: str) -> bool:
        """Whether it is new; it then counts for later ones. A text without a word is not."""
        words = frozenset(_WORD.findall(text.lower()))
        if not words:
            return False
        prefix = self._prefix(words)
        near = {place for word in prefix for place in self._by_word.get(word, ())}
        if any(_similarity(words, self._accepted[place]) > self._limit for place in near):
            return False
        for word in prefix:
            self._by_word[word].append(len(self._accepted))
        self._accepted.append(words)
        return True

    def _prefix(self, words: frozenset[str]) -> list[str]:
        # Long words are rarer than short ones: fewer texts are compared.
        ordered = sorted(words, key=lambda word: (-len(word), word))
        # The tolerance keeps rounding from making a prefix too short.
        return ordered[: len(ordered) - math.ceil(self._limit * len(ordered) - 1e-9) + 1]


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)
