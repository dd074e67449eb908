"""Texts in the teacher's tokens, aligned with the student's."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from largekd.data.quarantine import UnusableRecordError
from largekd.data.spans import Alignment, Tokens, align
from largekd.data.token_bytes import Surface
from largekd.data.vocabulary import document_affixes, end_token_of, tokenizer_fingerprint


class Translator:
    """Tokenizes the student's texts for the teacher: a document's text, or a conversation in the student's template."""

    def __init__(
        self,
        *,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        teacher_vocab_size: int | None = None,
    ) -> None:
        """Args: teacher_vocab_size: ids from here on make a record unusable; None: none does.

        Raises:
            DataError: a slow tokenizer on either side.
        """
        self._student = Surface(student, key="student.model")
        self._teacher = Surface(teacher, key="teacher.model")
        self._teacher_vocab_size = teacher_vocab_size

    @property
    def fingerprint(self) -> str:
        """What decides the teacher's tokens of a text."""
        return f"{tokenizer_fingerprint(self._teacher.tokenizer)} {self._teacher_vocab_size}"

    def align(self, texts: Sequence[str], *, ids: Sequence[Any], offsets: Sequence[Any]) -> list[Alignment]:
        """One alignment per text; `ids` and character `offsets` are the student's."""
        encoded = self._teacher.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        theirs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            align(
                text=text,
                student=_tokens(self._student, ids=own_ids, offsets=own_offsets),
                teacher=_tokens(self._teacher, ids=their_ids, offsets=their_offsets),
            )
            for text, own_ids, own_offsets, (their_ids, their_offsets) in zip(texts, ids, offsets, theirs, strict=True)
        ]

    def document(self, aligned: Alignment, *, student: tuple[int, int]) -> Alignment:
        """A document's alignment with begin and end tokens, of which the student has so many."""
        return aligned.with_affixes(student=student, teacher=self._affixes)

    def check_vocabulary(self, aligned: Alignment) -> None:
        """Raises UnusableRecordError for an id that the teacher's model does not know."""
        highest = int(aligned.teacher_ids.max(initial=0))
        if self._teacher_vocab_size is not None and highest >= self._teacher_vocab_size:
            token = self._teacher.tokenizer.convert_ids_to_tokens(highest)
            raise UnusableRecordError(
                f"holds token id {highest} ({token!r}) of the teacher's tokenizer, beyond the "
                f"{self._teacher_vocab_size} ids that the teacher knows"
            )

    @cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        begin, _ = document_affixes(self._teacher.tokenizer)
        end = end_token_of(self._teacher.tokenizer, student=self._student.tokenizer)
        assert end is not None, "document_affixes refuses a tokenizer without an end token"
        return begin, [end]


def _tokens(surface: Surface, *, ids: Any, offsets: Any) -> Tokens:
    pairs: NDArray[np.int64] = np.asarray(offsets, np.int64).reshape(-1, 2)
    return Tokens(surface=surface, ids=np.asarray(ids, np.int32), offsets=pairs)
