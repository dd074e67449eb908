"""Chat messages as token ids with a mask of the tokens that carry the loss.

Assistant answers are located as character spans of the rendered conversation, which is then tokenized once, whole.
Token prefixes would not do: a byte-pair tokenizer may merge the newline that ends a prompt with the first characters
of the answer, so that the prompt's ids are no prefix of the conversation's ids, while its text is always a prefix.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from largekd.data.quarantine import UnusableRecordError
from largekd.errors import DataError

Message = dict[str, Any]
GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
END_OF_THOUGHT = "</think>"
WEIGHT = "weight"
UNALIGNED = (
    "the chat template renders the conversation before assistant message {index} differently from the whole "
    "conversation, so its answer cannot be located: mark answers with {{% generation %}} in a template file "
    "(chat_template), or split the record so that each ends with its answer"
)


class Span(NamedTuple):
    """Characters [start, end) of a rendered conversation."""

    start: int
    end: int


def load_template(tokenizer: PreTrainedTokenizerBase, *, path: str | None, key: str = "data.train") -> str | None:
    """The Jinja text of the file `path`, else of the tokenizer, else None.

    Raises:
        DataError: the file cannot be read.
    """
    if path is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}.chat_template = {path!r} cannot be read: {error}") from error


class Conversation(NamedTuple):
    """A rendered conversation: its ids, and 1 where a token is to be learnt; character offsets `[tokens, 2]` where the
    tokenizer reports them; the characters of its answers, if they were located."""

    text: str
    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: NDArray[np.int64] | None = None
    answers: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChatEncoder:
    """Turns one conversation into ids and a mask; `loss_on` says which tokens carry the loss.

    With `assistant`, an assistant message with `weight` 0 (a draft that a later one corrects) is read and not learnt.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    loss_on: Literal["assistant", "all"] = "assistant"

    def encode(self, messages: Any) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids of the conversation and, for each, 1 where it is a token to learn.

        An answer's end-of-turn token is learnt, the line break that some templates put after it is not.

        Raises:
            UnusableRecordError: malformed messages, no assistant message, or answers that cannot be located.
        """
        talk = self.read(messages)
        return talk.ids, talk.mask

    def read(self, messages: Any, *, locate: bool = False) -> Conversation:
        """As `encode`, with the text; `locate`: find the answers even where all tokens are learnt."""
        checked = check_messages(messages)
        is_learnt = [_is_learnt(message) for message in checked if message["role"] == "assistant"]
        checked = [{name: value for name, value in message.items() if name != WEIGHT} for message in checked]
        checked, text = self._rendered(checked)
        ids, offsets = self._tokenize(text)
        answered = any(message["role"] == "assistant" for message in checked)
        if self.loss_on == "all":
            answers = self._answers(checked, text=text) if locate and answered else ()
            return Conversation(text, ids, np.ones(len(ids), np.uint8), offsets, tuple(answers))
        if not answered:
            raise UnusableRecordError("has no assistant message, so no token to learn (loss_on: assistant)")
        mask = np.zeros(len(ids), np.uint8)
        answers = self._answers(checked, text=text)
        if not all(is_learnt) and len(answers) != len(is_learnt):
            raise UnusableRecordError(f"the chat template does not mark whole answers, so {WEIGHT!r} has no place")
        for place, span in enumerate(answers):
            if len(answers) == len(is_learnt) and not is_learnt[place]:
                continue
            first, last = (
                _tokens_of(span, text=text, offsets=offsets)
                if offsets is not None
                else self._by_prefix(text, span, ids)
            )
            last = self._end_of_turn(text, span=span, ids=ids, offsets=offsets, tokens=(first, last))
            mask[first:last] = 1
        return Conversation(text, ids, mask, offsets, tuple(answers))

    def _rendered(self, messages: list[Message]) -> tuple[list[Message], str]:
        """The conversation as the template takes it, and its text."""
        try:
            return messages, self._render(messages)
        except UnusableRecordError:
            joined = system_in_front(messages)
            if joined is None:
                raise
            return joined, self._render(joined)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UnusableRecordError(f"the chat template refuses the messages: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _tokenize(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64] | None]:
        """Ids, and character offsets `[tokens, 2]` where the tokenizer can give them."""
        # The template writes the special tokens itself.
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) if self.tokenizer.is_fast else None
        return np.array(encoded["input_ids"], np.int32), offsets

    def _answers(self, messages: Sequence[Message], *, text: str) -> list[Span]:
        if GENERATION_MARKER.search(self.template):
            return self._marked(messages, text=text)
        return [
            self._derived(messages, index=index, text=text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _marked(self, messages: Sequence[Message], *, text: str) -> list[Span]:
        """Spans that the template's author marked with {% generation %}."""
        variables: dict[str, Any] = self.tokenizer.special_tokens_map
        # Annotated as a string, the function returns the pair (texts, spans of each).
        result: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **variables,
        )
        texts, spans = result
        assert texts[0] == text
        return [Span(start, end) for start, end in spans[0]]

    def _derived(self, messages: Sequence[Message], *, index: int, text: str) -> Span:
        """Where message `index` is answered in `text`, found by rendering the conversation up to it."""
        if index == 0:
            raise UnusableRecordError("begins with an assistant message: there is no prompt that it answers")
        # Reasoning templates rewrite earlier turns: content before the end of a thought may not be rendered at all.
        content = (messages[index].get("content") or "").rsplit(END_OF_THOUGHT, 1)[-1].strip()
        prompt = self._render(messages[:index], add_generation_prompt=True)
        start = _common_prefix(prompt, text)
        if start < len(prompt):
            # The prompt opens a thought that this answer lacks; do not let a shared "<" swallow the answer's start.
            before = self._render(messages[:index])
            found = text.find(content, len(before)) if content else -1
            start = min(start, found) if found >= 0 else start
            if start < len(before) or not text.startswith(before):
                raise UnusableRecordError(UNALIGNED.format(index=index))
        after = self._render(messages[: index + 1])
        if text.startswith(after):
            return Span(start, len(after))
        kept = _longest_overlap(after[start:], text[start:])
        if not content or content not in text[start : start + kept]:
            raise UnusableRecordError(UNALIGNED.format(index=index))
        return Span(start, start + kept)

    def _by_prefix(self, text: str, span: Span, ids: NDArray[np.int32]) -> tuple[int, int]:
        """The span's tokens for a tokenizer without offsets, where prefixes of the text tokenize to prefixes."""
        counts = []
        for end in span:
            prefix, _ = self._tokenize(text[:end])
            if not np.array_equal(prefix, ids[: len(prefix)]):
                raise UnusableRecordError(
                    "a token spans the border of an assistant message and this tokenizer reports no character "
                    "offsets: use a fast tokenizer (tokenizer.json)"
                )
            counts.append(len(prefix))
        return counts[0], counts[1]

    def _end_of_turn(
        self,
        text: str,
        *,
        span: Span,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64] | None,
        tokens: tuple[int, int],
    ) -> int:
        """One past the last token to learn: the end-of-turn token where the template writes one."""
        first, last = tokens
        special = [place for place in range(first, last) if int(ids[place]) in self._special_ids]
        if special:
            rest = (
                text[offsets[special[-1], 1] : span.end]
                if offsets is not None
                else self._decode(ids, special[-1], last)
            )
            return special[-1] + 1 if not rest.strip() else last
        follows = last < len(ids) and int(ids[last]) in self._special_ids
        return last + 1 if follows and GENERATION_MARKER.search(self.template) else last

    def _decode(self, ids: NDArray[np.int32], special: int, last: int) -> str:
        return str(self.tokenizer.decode(ids[special + 1 : last].tolist()))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {place for place, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added.union(self.tokenizer.all_special_ids))


def system_in_front(messages: Sequence[Message]) -> list[Message] | None:
    """`messages` with the system message in front of the first question, for a model that knows no such role; None for
    a conversation that does not begin with the two."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    system, question, *more = messages
    return [{**question, "content": f"{system['content']}\n\n{question['content']}"}, *more]


def check_messages(messages: Any) -> list[Message]:
    """`messages` without keys that hold null.

    Raises:
        UnusableRecordError: not a non-empty list of objects with a role and a text content.
    """
    if not isinstance(messages, list) or not messages:
        raise UnusableRecordError("messages must be a non-empty list of objects with 'role' and 'content'")
    return [_check_message(message, index=index) for index, message in enumerate(messages)]


def _check_message(message: Any, *, index: int) -> Message:
    if not isinstance(message, dict):
        raise UnusableRecordError(f"message {index} is a {type(message).__name__}, expected an object")
    # Columnar files fill keys that other records have with nulls; templates ask whether a key is there.
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise UnusableRecordError(f"message {index} has no 'role' (its keys: {', '.join(map(repr, message))})")
    if "content" not in kept and "tool_calls" in kept:
        kept["content"] = ""
    if not isinstance(kept.get("content"), str):
        raise UnusableRecordError(f"message {index} ({kept['role']}) has no text in 'content'")
    try:
        kept["content"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableRecordError(f"message {index} holds half of a surrogate pair, not a character") from error
    return kept


def _is_learnt(message: Message) -> bool:
    weight = message.get(WEIGHT, 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UnusableRecordError(f"an assistant message has {WEIGHT!r} {weight!r}, expected 0 or 1")
    return bool(weight)


def _tokens_of(span: Span, *, text: str, offsets: NDArray[np.int64]) -> tuple[int, int]:
    """[first, last) of the tokens that begin inside `span`, and one that begins with spaces just before its text.

    Some byte-level tokenizers trim spaces off their offsets, so a token of spaces is empty and stands at its end: it
    belongs to the span if it ends inside.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    empty = start == end
    inside = np.where(empty, (start > span.start) & (end <= span.end), (start >= span.start) & (start < span.end))
    # "assistant: " and "yes" make the token " yes", the answer's first word; "\n" and "\n" make one that is neither's.
    crossing = (start < span.start) & (end > span.start)
    for place in np.flatnonzero(crossing):
        before, after = text[start[place] : span.start], text[span.start : min(int(end[place]), span.end)]
        inside[place] = before.isspace() and not after.isspace()
    places = np.flatnonzero(inside)
    return (int(places[0]), int(places[-1]) + 1) if places.size else (0, 0)


def _common_prefix(left: str, right: str) -> int:
    """Number of characters that both begin with."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _longest_overlap(left: str, right: str) -> int:
    """Length of the longest suffix of `left` that is a prefix of `right` (Knuth-Morris-Pratt prefix function)."""
    pattern = right[: len(left)]
    failure = [0] * len(pattern)
    for place in range(1, len(pattern)):
        length = failure[place - 1]
        while length and pattern[place] != pattern[length]:
            length = failure[length - 1]
        failure[place] = length + (pattern[place] == pattern[length])
    matched = 0
    for character in left:
        while matched and (matched == len(pattern) or character != pattern[matched]):
            matched = failure[matched - 1]
        matched += bool(pattern) and character == pattern[matched]
    return matched
