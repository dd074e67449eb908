"""Exact and near duplicates.

Near: the Jaccard similarity of two texts' word n-grams, |A n B| / |A u B|, estimated by MinHash signatures. Candidates
come from locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.3-3.4), tuned to find
rather too many; the signatures then decide. Memory is bound by signatures, not by texts.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from largekd.config.curation import DuplicateFilterConfig
from largekd.curation.filters import Judgement
from largekd.curation.records import Curated
from largekd.curation.words import ngrams, words
from largekd.errors import ConfigError

if TYPE_CHECKING:
    from datasketch import LeanMinHash

# What a missed pair weighs beside a needless comparison, when bands of the index are chosen.
_MISSED_WEIGHT = 0.9


class DuplicateFilter:
    """Scores `similarity` with the most similar earlier answer that was kept: 1 for an exact duplicate, 0 where none
    is near. Errors: ConfigError where the library is not installed."""

    def __init__(self, config: DuplicateFilterConfig) -> None:
        self._config = config
        self._exact: dict[bytes, str] = {}
        self._near = None if config.threshold == 1 else _NearIndex(config)

    def judge(self, group: Sequence[Curated]) -> list[Judgement]:
        """The answers of one row, in order; what is kept is what later ones are compared with."""
        if self._config.field == "question":
            # One question stands behind all answers of a row, which are no duplicates of each other.
            question = _Text(group[0].ask.item.question) if group else None
            judgement = self._find(question) if question else Judgement()
            if question and judgement.refused is None and any(row.dropped_by is None for row in group):
                self._add(question, key=group[0].written.key)
            return [judgement] * len(group)
        judgements = []
        for row in group:
            answer = row.written.text
            text = _Text(answer if self._config.field == "answer" else f"{row.ask.item.question}\n{answer}")
            judgements.append(self._find(text))
            if judgements[-1].refused is None and row.dropped_by is None:
                self._add(text, key=row.written.key)
        return judgements

    def summary(self) -> Mapping[str, object]:
        """Texts that were kept."""
        return {"distinct": len(self._exact)}

    def _find(self, text: "_Text") -> Judgement:
        same = self._exact.get(text.digest)
        if same is not None:
            return Judgement({"similarity": 1.0}, "exact", note=f"equals {same}")
        if self._near is None:
            return Judgement({"similarity": 0.0})
        similarity, key = self._near.find(text)
        refused = similarity >= self._config.threshold
        return Judgement({"similarity": similarity}, "near" if refused else None, note=f"resembles {key}")

    def _add(self, text: "_Text", *, key: str) -> None:
        self._exact[text.digest] = key
        if self._near is not None:
            self._near.add(text, key=key)


class _Text:
    """A text as it is compared; its signature is computed once, when it is first needed."""

    def __init__(self, text: str) -> None:
        self.text = text
        plain = " ".join(text.casefold().split())
        self.digest = hashlib.blake2b(plain.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
        self.signature: LeanMinHash | None = None
        self.has_words = bool(words(text, signs=True))


class _NearIndex:
    """Signatures of kept texts."""

    def __init__(self, config: DuplicateFilterConfig) -> None:
        if find_spec("datasketch") is None:
            raise ConfigError(
                "curation.filters: kind 'duplicates' with threshold < 1 needs the package datasketch; install "
                "largekd[factory], or set threshold: 1."
            )
        from datasketch import MinHash, MinHashLSH

        self._config = config
        self._empty = MinHash(num_perm=config.permutations)
        self._index = MinHashLSH(
            threshold=config.threshold,
            num_perm=config.permutations,
            weights=(1 - _MISSED_WEIGHT, _MISSED_WEIGHT),
        )
        self._signatures: list[LeanMinHash] = []
        self._keys: list[str] = []

    def find(self, text: _Text) -> tuple[float, str]:
        """Estimated similarity and key of the most similar text, the earliest of equals; (0, "") for none."""
        if not text.has_words:
            # All texts without words have the same signature.
            return 0.0, ""
        signature = self._signature(text)
        best, place = 0.0, -1
        for candidate in sorted(self._index.query(signature)):
            similarity = float(self._signatures[candidate].jaccard(signature))
            if similarity > best:
                best, place = similarity, candidate
        return best, self._keys[place] if place >= 0 else ""

    def add(self, text: _Text, *, key: str) -> None:
        """Later texts are compared with this one."""
        if not text.has_words:
            return
        signature = self._signature(text)
        self._index.insert(len(self._keys), signature)
        self._signatures.append(signature)
        self._keys.append(key)

    def _signature(self, text: _Text) -> "LeanMinHash":
        if text.signature is None:
            from datasketch import LeanMinHash

            minhash = self._empty.copy()
            grams = ngrams(words(text.text, signs=True), size=self._config.ngram)
            minhash.update_batch([" ".join(gram).encode("utf-8", errors="surrogatepass") for gram in grams])
            text.signature = LeanMinHash(minhash)
        return text.signature
