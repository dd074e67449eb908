"""Words and n-grams of texts, as filters compare them."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Scripts without spaces between words: each character counts as a word.
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
# Characters without width: soft hyphens, joiners, marks of direction. A word with one of them looks the same.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
# 3 - 2 and 3 + 2 are different problems.
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[-+*/=<>^%\u2212\u00d7\u00f7\u2264\u2265\u221a]")


def words(text: str, *, signs: bool = False) -> list[str]:
    """Words in small letters, compatible forms of characters made equal, without punctuation; `signs`: with those of
    arithmetic."""
    plain = _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).casefold()
    return (_WORD_OR_SIGN if signs else _WORD).findall(plain)


def ngrams(sequence: Sequence[str], *, size: int) -> Iterator[tuple[str, ...]]:
    """All runs of `size` words; the whole text, if it has words, where it is shorter."""
    if 0 < len(sequence) < size:
        yield tuple(sequence)
    for start in range(len(sequence) - size + 1):
        yield tuple(sequence[start : start + size])


def gram_digest(gram: Sequence[str]) -> int:
    """64 bits of BLAKE2b: equal in every process, unlike Python's own hash."""
    digest = hashlib.blake2b(" ".join(gram).encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def gram_digests(grams: Iterator[tuple[str, ...]]) -> NDArray[np.uint64]:
    """`gram_digest` of each."""
    return np.fromiter(map(gram_digest, grams), dtype=np.uint64)


def repeated_share(sequence: Sequence[object]) -> float:
    """1 - distinct / all, in [0, 1); 0 for an empty sequence."""
    return 1.0 - len(set(sequence)) / len(sequence) if sequence else 0.0
