"""A smaller vocabulary of the same tokenizer: which tokens stay, and the tokenizer that has only them.

A byte-pair tokenizer reaches a token by merging two shorter ones, and these by merging others. The tokens that stay are
therefore closed under the merges that make each of them. The merges that stay are those among kept tokens, in their old
order; a text whose tokens all stay is then split as before: each of its merges is still there, and no merge is new.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from largekd.data.token_bytes import BYTE_TOKEN, METASPACE
from largekd.errors import DataError
from largekd.runtime.files import read_json, write_json

_TEMPLATE_PAIRS = ("sep", "cls")
_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Older files with the whole vocabulary, which some classes would read.
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


@dataclass(frozen=True)
class Trim:
    """kept_V: the old id of each new id, ascending. coverage: the share of the corpus's tokens that are kept."""

    kept_V: NDArray[np.int64]
    coverage: float

    def new_ids(self, *, old_size: int) -> NDArray[np.int64]:
        """(old_size,) the new id of each old one, −1: it is gone."""
        mapping = np.full(old_size, -1, np.int64)
        mapping[self.kept_V] = np.arange(len(self.kept_V))
        return mapping


class MergeTable:
    """A byte-pair tokenizer's description (`tokenizer.json`), asked for what a token is made of."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """Raises: DataError for a model that is not BPE, or that marks the ends of words in its tokens."""
        model = described["model"]
        if model.get("type") != "BPE":
            raise DataError(
                f"the tokenizer's model is {model.get('type')!r}; only BPE vocabularies are trimmed, whose tokens are "
                "joined by merges."
            )
        marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if marks:
            raise DataError(f"the tokenizer sets {marks[0]} = {model[marks[0]]!r}, which is not supported by trimming.")
        self.vocabulary: dict[str, int] = model["vocab"]
        self.ranks = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}
        self._byte_fallback = bool(model.get("byte_fallback"))
        self._parts: dict[str, frozenset[int]] = {}

    def parts(self, token: str) -> frozenset[int]:
        """Ids of every token on the way from single characters to `token`, itself among them."""
        if token not in self._parts:
            self._parts[token] = self._merged(token)
        return self._parts[token]

    def base(self) -> frozenset[int]:
        """Ids of the tokens that every text may need: every single character, which in byte-level tokenizers is every
        byte; where unknown characters fall back to bytes (<0xNN>), these and the characters of ASCII and ▁ alone."""
        if not self._byte_fallback:
            return frozenset(place for token, place in self.vocabulary.items() if len(token) == 1)
        return frozenset(
            place
            for token, place in self.vocabulary.items()
            if BYTE_TOKEN.fullmatch(token) or token == METASPACE or (len(token) == 1 and token.isascii())
        )

    def _merged(self, token: str) -> frozenset[int]:
        pieces, seen = list(token), {*token, token}
        while len(pieces) > 1:
            pairs = [(self.ranks.get(pair), place) for place, pair in enumerate(pairwise(pieces))]
            found = [(rank, place) for rank, place in pairs if rank is not None]
            if not found:
                break
            _, place = min(found)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            seen.add(pieces[place])
        return frozenset(self.vocabulary[piece] for piece in seen if piece in self.vocabulary)


def choose_tokens(
    described: Mapping[str, Any],
    *,
    counts: Mapping[int, int],
    always: Iterable[int] = (),
    keep: int | None = None,
    coverage: float | None = None,
    multiple: int = 1,
) -> Trim:
    """The most frequent tokens with all that they are made of; added tokens, `always` and the base tokens stay anyway.

    counts: of each id in a corpus. keep: at most so many tokens. coverage: as few of the most frequent as reach this
    share of the corpus; further tokens then fill the vocabulary up to a multiple of `multiple`. Exactly one of the two
    is given. Equal counts: the lower id first.

    Raises: DataError when `keep` has no room for the tokens that must stay, or a value is out of range.
    """
    if (keep is None) == (coverage is None):
        raise DataError("give either the number of tokens to keep or the share of the corpus to cover.")
    if coverage is not None and not 0 < coverage <= 1:
        raise DataError(f"coverage = {coverage}: must be greater than 0 and at most 1.")
    table = MergeTable(described)
    # Added tokens are found before a text is split: no merge makes them.
    added = {token["id"] for token in described["added_tokens"]}
    others = set(always) - added
    kept = added | others | table.base()
    for token, place in table.vocabulary.items():
        if place in others:
            kept |= table.parts(token)
    if keep is not None and keep < len(kept):
        raise DataError(f"keep = {keep}: bytes, added and special tokens alone are {len(kept)}; keep at least those.")
    total = max(sum(counts.values()), 1)
    order = sorted(table.vocabulary.values(), key=lambda place: (-counts.get(place, 0), place))
    if coverage is not None:
        order = _covering(table, kept=kept, order=order, counts=counts, wanted=coverage * total)
        keep = -(-len(kept) // multiple) * multiple
    assert keep is not None
    _fill(table, kept=kept, order=order, size=keep)
    return Trim(kept_V=np.array(sorted(kept), np.int64), coverage=sum(counts.get(place, 0) for place in kept) / total)


def trim_description(described: Mapping[str, Any], *, trim: Trim) -> dict[str, Any]:
    """The contents of `tokenizer.json` with the kept tokens alone, under their new ids."""
    table = MergeTable(described)
    size = 1 + max([*table.vocabulary.values(), *(token["id"] for token in described["added_tokens"])])
    new_id: dict[int, int] = {old: new for old, new in enumerate(trim.new_ids(old_size=size).tolist()) if new >= 0}
    trimmed = copy.deepcopy(dict(described))
    vocabulary = {token: new_id[old] for token, old in table.vocabulary.items() if old in new_id}
    trimmed["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    trimmed["model"]["merges"] = [
        merge
        for merge in described["model"]["merges"]
        if all(piece in vocabulary for piece in (*_pair(merge), "".join(_pair(merge))))
    ]
    for token in trimmed["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _rename_template(trimmed.get("post_processor"), new_id=new_id)
    return trimmed


def rename_ids(value: Any, *, new_id: Mapping[int, int]) -> Any:
    """A model's or generation's configuration under new ids: whatever is called …token_id, …token_ids or
    …suppress_tokens, at any depth. Ids that are gone are left out of lists, and become None where they stand alone."""
    if isinstance(value, list):
        return [rename_ids(item, new_id=new_id) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        name: _renamed(item, new_id=new_id) if _names_ids(name) else rename_ids(item, new_id=new_id)
        for name, item in value.items()
    }


def count_tokens(encoded: Iterable[Sequence[int]]) -> dict[int, int]:
    """How often each id occurs."""
    counts: dict[int, int] = {}
    for ids in encoded:
        places, numbers = np.unique(np.asarray(ids, np.int64), return_counts=True)
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            counts[place] = counts.get(place, 0) + number
    return counts


def save_trimmed(tokenizer: PreTrainedTokenizerBase, *, folder: Path, trim: Trim) -> PreTrainedTokenizerBase:
    """Write the tokenizer with the kept tokens alone into `folder`, with its chat template, and read it back.

    Raises: DataError for a tokenizer that cannot be trimmed, or whose class gives tokens other ids than its file says.
    """
    trimmed = trim_description(description_of(tokenizer), trim=trim)
    tokenizer.save_pretrained(folder)
    for name in _OTHER_FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / _TOKENIZER).write_text(json.dumps(trimmed, ensure_ascii=False, indent=1), encoding="utf-8")
    config = read_json(folder / _SETTINGS)
    if "added_tokens_decoder" in config:
        new_id = {str(old): str(new) for new, old in enumerate(trim.kept_V.tolist())}
        config["added_tokens_decoder"] = {new_id[old]: token for old, token in config["added_tokens_decoder"].items()}
        write_json(folder / _SETTINGS, value=config)
    read_back: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    mapping = {old: new for new, old in enumerate(trim.kept_V.tolist())}
    expected = {token: mapping[place] for token, place in tokenizer.get_vocab().items() if place in mapping}
    if read_back.get_vocab() != expected:
        raise DataError(
            f"{type(tokenizer).__name__} does not take its tokens' ids from {_TOKENIZER}; it cannot be trimmed."
        )
    return read_back


def check_trimmed(
    original: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, *, trim: Trim, texts: Iterable[str]
) -> int:
    """How many of `texts` are split by both alike; those with a token that is gone are only read back.

    Raises: DataError for a text that the trimmed tokenizer splits otherwise though it has all of its tokens, or that
    it does not spell.
    """
    size = 1 + max(original.get_vocab().values())
    mapping, same = trim.new_ids(old_size=max(size, int(trim.kept_V.max()) + 1)), 0
    for text in texts:
        old, new = (side(text, add_special_tokens=False, verbose=False)["input_ids"] for side in (original, trimmed))
        expected = mapping[old].tolist()
        if min(expected, default=0) >= 0:
            same += 1
            if expected != new:
                raise DataError(f"the trimmed tokenizer splits {text[:60]!r} otherwise; report this tokenizer.")
        if trimmed.decode(new) != original.decode(old):
            raise DataError(f"the trimmed tokenizer does not spell {text[:60]!r} any more; report this tokenizer.")
    return same


def description_of(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer's `tokenizer.json`. Raises: DataError for a slow tokenizer."""
    if not tokenizer.is_fast:
        raise DataError(f"its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json and cannot be trimmed.")
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _covering(
    table: MergeTable, *, kept: set[int], order: Sequence[int], counts: Mapping[int, int], wanted: float
) -> list[int]:
    """Add tokens to `kept` in `order` until they cover `wanted` tokens of the corpus; what is left of the order."""
    token_of = {place: token for token, place in table.vocabulary.items()}
    covered = sum(counts.get(place, 0) for place in kept)
    for taken, place in enumerate(order):
        if covered >= wanted:
            return list(order[taken:])
        new = table.parts(token_of[place]) - kept
        kept |= new
        covered += sum(counts.get(other, 0) for other in new)
    return []


def _fill(table: MergeTable, *, kept: set[int], order: Sequence[int], size: int) -> None:
    """Add tokens to `kept` in `order`, each with what it is made of, as long as they fit into `size`."""
    token_of = {place: token for token, place in table.vocabulary.items()}
    for place in order:
        if len(kept) == size:
            return
        new = table.parts(token_of[place]) - kept
        if len(kept) + len(new) <= size:
            kept |= new


def _rename_template(part: Any, *, new_id: Mapping[int, int]) -> None:
    """Give the ids inside a post-processor, or a sequence of them, their new values."""
    if not isinstance(part, dict):
        return
    for token in part["special_tokens"].values() if isinstance(part.get("special_tokens"), dict) else ():
        token["ids"] = [new_id[old] for old in token["ids"]]
    for name in _TEMPLATE_PAIRS:
        if isinstance(part.get(name), list):
            text, old = part[name]
            part[name] = [text, new_id[old]]
    for inner in part.get("processors", ()):
        _rename_template(inner, new_id=new_id)


def _names_ids(name: str) -> bool:
    return name.endswith(("token_id", "token_ids", "suppress_tokens"))


def _renamed(value: Any, *, new_id: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new_id[old] for old in value if old in new_id]
    return new_id.get(value) if isinstance(value, int) and not isinstance(value, bool) else value
