"""What each token of a vocabulary spells, in bytes."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from largekd.errors import DataError

# Not UTF-8, so it equals the bytes of no text: what cannot be spelled is never taken for something else.
UNSPELLED = b"\xff\xfe\xff"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
METASPACE = "▁"


class Surface:
    """The bytes of a fast tokenizer's tokens: byte-level alphabets, ▁ for a space, <0xNN>, and added tokens as written.

    Raises:
        DataError: a slow tokenizer, which reports no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, key: str) -> None:
        """Args: key: configuration key of the model whose tokenizer this is, named in messages."""
        if not tokenizer.is_fast:
            raise DataError(
                f"{key}: its tokenizer ({type(tokenizer).__name__}) reports no character offsets, without which "
                "the tokens of two tokenizers cannot be aligned: use a model folder with a tokenizer.json."
            )
        self.tokenizer = tokenizer

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of each id; `UNSPELLED` for ids without a token and tokens outside the tokenizer's alphabet."""
        vocabulary = self.tokenizer.get_vocab()
        pieces = [UNSPELLED] * (1 + max([*vocabulary.values(), *self.added]))
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spelled = _spelling(backend)
        for token, place in vocabulary.items():
            pieces[place] = spelled(token)
        for place, content in self.added.items():
            pieces[place] = content.encode()
        return tuple(pieces)

    @cached_property
    def added(self) -> dict[int, str]:
        """Tokens that are found in a text before it is split, special ones and others."""
        return {place: token.content for place, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text."""
        added = {place for place, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added.union(self.tokenizer.all_special_ids))

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """For each id, whether it is in `special`."""
        flags = np.zeros(len(self.pieces), np.bool_)
        flags[list(self.special)] = True
        return flags

    @cached_property
    def is_byte(self) -> NDArray[np.bool_]:
        """For each id, whether it is a <0xNN> token that some tokenizers hold beside the character itself."""
        flags = np.zeros(len(self.pieces), np.bool_)
        if not _has_type(json.loads(self.tokenizer.backend_tokenizer.to_str()), "ByteFallback"):
            return flags
        flags[[place for token, place in self.tokenizer.get_vocab().items() if BYTE_TOKEN.fullmatch(token)]] = True
        return flags

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each id; 0 where it spells nothing known."""
        return np.array([0 if piece is UNSPELLED else len(piece) for piece in self.pieces], np.int64)

    def spell(self, ids: NDArray[np.int32]) -> bytes:
        """The bytes of a run of tokens."""
        pieces = self.pieces
        return b"".join([pieces[place] for place in ids.tolist()])


def _spelling(backend: dict[str, Any]) -> Callable[[str], bytes]:
    """Token -> bytes for the alphabet that a tokenizer's description names."""
    parts = {name: backend.get(name) for name in ("decoder", "pre_tokenizer", "normalizer")}
    if _has_type(parts, "ByteLevel"):
        return _byte_level
    byte_tokens = _has_type(parts, "ByteFallback")
    metaspace = METASPACE in json.dumps(parts, ensure_ascii=False)

    def spelled(token: str) -> bytes:
        match = BYTE_TOKEN.fullmatch(token) if byte_tokens else None
        if match:
            return bytes([int(match.group(1), 16)])
        return (token.replace(METASPACE, " ") if metaspace else token).encode("utf-8", "replace")

    return spelled


def _byte_level(token: str) -> bytes:
    places = [BYTE_OF.get(character, -1) for character in token]
    return UNSPELLED if -1 in places else bytes(places)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 characters stand for themselves, the others for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _has_type(described: Any, name: str) -> bool:
    return any(part.get("type") == name for part in _objects(described))


def _objects(described: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a tokenizer's description, its vocabulary and added tokens left out."""
    if isinstance(described, dict):
        yield described
        for name, inner in described.items():
            if name not in ("model", "added_tokens"):
                yield from _objects(inner)
    elif isinstance(described, list):
        for inner in described:
            yield from _objects(inner)
