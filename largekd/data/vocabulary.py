"""Tokenizers: loading and naming them, proof that two mean the same tokens by the same ids, and what two share."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from largekd.data.token_bytes import UNSPELLED, Surface
from largekd.errors import DataError, TeacherError

NAMED_DIFFERENCES = 5
# Digits, indentation, accents, other scripts, an emoji: where tokenizers with equal vocabularies split differently.
PROBE = "In 1994, 12345 naïve cafés\n\tdef f(x):\n        return x  # don't\n  Привет, 世界 مرحبا 🙂 e\u0301"


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, key: str = "teacher.model"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name.

    Args:
        key: configuration key that holds `path`, named in messages.

    Raises:
        DataError: nothing there, no tokenizer files, or a tokenizer class that cannot be built here.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"{key} = {path!r}: no tokenizer could be loaded from this folder or hub name "
            f"(a folder needs tokenizer.json and tokenizer_config.json): {error}"
        ) from error
    if not tokenizer.get_vocab():
        raise DataError(f"{key} = {path!r}: its tokenizer has an empty vocabulary; the tokenizer files are missing.")
    return tokenizer


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    *,
    teacher_vocab_size: int,
    student_vocab_size: int,
    key: str = "teacher.model",
) -> int:
    """The number of ids that both models can take, once it is certain that these ids mean the same to both.

    Compared are all ids below the smaller width, special tokens among them, and how a probe text is split. Widths may
    differ (151,936 and 152,064 rows for one tokenizer), and so may the roles of tokens (a base model's and its chat
    variant's end token) and tokens that were added to one side alone.

    `key` is the configuration key of the teacher, named in messages.

    Raises:
        TeacherError: an id means different tokens, or equal vocabularies split text differently.
    """
    shared = min(teacher_vocab_size, student_vocab_size)
    if teacher is student:
        return shared
    differences = _differences(teacher, student, shared=shared)
    if differences:
        more = f", and {len(differences) - NAMED_DIFFERENCES} more" if len(differences) > NAMED_DIFFERENCES else ""
        raise TeacherError(
            f"the tokenizers of {key} and student.model differ: {len(differences)} ids mean different tokens "
            f"({'; '.join(differences[:NAMED_DIFFERENCES])}{more}). Choose a student.model with the teacher's "
            "tokenizer, or leave student.model empty."
        )
    theirs, own = (side(PROBE, add_special_tokens=False, verbose=False)["input_ids"] for side in (teacher, student))
    if theirs != own:
        place = next((i for i, pair in enumerate(zip(theirs, own, strict=False)) if pair[0] != pair[1]), 0)
        raise TeacherError(
            f"the tokenizers of {key} and student.model have the same tokens but split text differently: "
            f"after {place} equal tokens the teacher has {teacher.convert_ids_to_tokens(theirs[place : place + 3])} "
            f"and the student {student.convert_ids_to_tokens(own[place : place + 3])}. "
            "Give both models the same tokenizer files."
        )
    return shared


def document_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids around a plain-text document: the begin token where this tokenizer adds one by itself, and the end token.

    Raises:
        DataError: the tokenizer names no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, which ends a document: set it in tokenizer_config.json.")
    # Many tokenizers name a begin token that their models never saw (SmolLM2: <|im_start|>).
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else [], [tokenizer.eos_token_id]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's ids; padding and truncation settings, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        described.pop("padding", None)
        described.pop("truncation", None)
    else:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    described["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _differences(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, shared: int) -> list[str]:
    theirs, own = _tokens_by_id(teacher), _tokens_by_id(student)
    added = teacher.added_tokens_decoder.keys() | student.added_tokens_decoder.keys()
    return [
        f"id {place} is {_named(theirs, place)} to the teacher and {_named(own, place)} to the student"
        for place in sorted(theirs.keys() | own.keys())
        if place < shared
        and theirs.get(place) != own.get(place)
        # A token that was added to one side stands where the other has an unused row.
        and not (place in added and (place not in theirs or place not in own))
    ]


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {place: token for token, place in tokenizer.get_vocab().items()}


def _named(tokens: Mapping[int, str], place: int) -> str:
    return repr(tokens[place]) if place in tokens else "no token"


def shared_tokens(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    *,
    teacher_vocab_size: int,
    student_vocab_size: int,
) -> NDArray[np.int64]:
    """(W,) the student's id that spells exactly the bytes of each of the teacher's ids; −1: none.

    No student id occurs twice. Special tokens are compared with special tokens (an added token with an added token),
    never with the same characters in a text. The two end tokens belong together where neither has a namesake among
    the other side's special tokens: with one, what a chat template writes decides.

    Raises:
        DataError: a slow tokenizer.
    """
    theirs = Surface(teacher, key="teacher.model")
    own = Surface(student, key="student.model")
    places = _places_by_bytes(own, limit=student_vocab_size)
    mapping = np.full(teacher_vocab_size, -1, np.int64)
    used: set[int] = set()
    for place in _ordered(theirs, limit=teacher_vocab_size):
        special, piece = bool(theirs.is_special[place]), theirs.pieces[place]
        found = places.get((special, piece))
        if found is None and place in theirs.added:
            # One side calls <think> special, the other only adds it.
            other = places.get((not special, piece))
            found = other if other in own.added else None
        if found is not None and found not in used:
            mapping[place] = found
            used.add(found)
    ends = (teacher.eos_token_id, student.eos_token_id)
    if None not in ends and ends[0] < teacher_vocab_size and ends[1] < student_vocab_size:
        mapping[ends[0]] = ends[1] if mapping[ends[0]] < 0 and ends[1] not in used else mapping[ends[0]]
    return mapping


def describe_mapping(mapping: NDArray[np.int64], *, student_vocab_size: int) -> str:
    """A line for the log: how much of both vocabularies a mapping of `shared_tokens` joins."""
    found = int((mapping >= 0).sum())
    return (
        f"{found:,} tokens are in both vocabularies: {found / len(mapping):.1%} of the teacher's {len(mapping):,}, "
        f"{found / student_vocab_size:.1%} of the student's {student_vocab_size:,}"
    )


def end_token_of(teacher: PreTrainedTokenizerBase, *, student: PreTrainedTokenizerBase) -> int | None:
    """The teacher's id that ends a document of this student: the student's end token, if the teacher has it too."""
    for place, token in teacher.added_tokens_decoder.items():
        if token.content == student.eos_token:
            return place
    return teacher.eos_token_id


def _places_by_bytes(surface: Surface, *, limit: int) -> dict[tuple[bool, bytes], int]:
    places: dict[tuple[bool, bytes], int] = {}
    for place in _ordered(surface, limit=limit):
        places.setdefault((bool(surface.is_special[place]), surface.pieces[place]), place)
    return places


def _ordered(surface: Surface, *, limit: int) -> list[int]:
    """Ids that spell something, <0xNN> tokens last: a text has them only where no other token will do."""
    known = [place for place, piece in enumerate(surface.pieces[:limit]) if piece is not UNSPELLED and piece]
    return sorted(known, key=lambda place: bool(surface.is_byte[place]))
