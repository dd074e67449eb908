"""A conversation as the text, and the ids, that a model goes on with."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from largekd.curation.records import Ask, Message, Written
from largekd.data.templates import system_in_front
from largekd.factory.job import failed


def chat_text(ask: Ask, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages by the tokenizer's chat template; without one, their texts with blank lines between.

    A system message that the template refuses or leaves out stands in front of the first question.
    Errors: jinja2.TemplateError for a conversation that the template refuses.
    """
    messages = ask.messages
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    joined = system_in_front(messages)
    if joined is None:
        return _rendered(messages, tokenizer=tokenizer)
    try:
        text = _rendered(messages, tokenizer=tokenizer)
        if text != _rendered(messages[1:], tokenizer=tokenizer):
            return text
    except TemplateError:
        # What else it may refuse, it refuses again.
        pass
    return _rendered(joined, tokenizer=tokenizer)


def _rendered(messages: Sequence[Message], *, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def chat_ids(ask: Ask, *, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `chat_text`. Errors: as of `chat_text`."""
    # The chat template writes the special tokens itself; a plain text gets those of the tokenizer.
    plain = not tokenizer.chat_template
    text = chat_text(ask, tokenizer=tokenizer)
    encoded = tokenizer(text, add_special_tokens=plain, return_attention_mask=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def prompt_ids(ask: Ask, *, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[int] | Written:
    """The ids of `chat_text`; a failed answer where the template refuses, or they are none or more than `longest`."""
    try:
        ids = chat_ids(ask, tokenizer=tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        return failed(ask, reason=f"the model's chat template refuses the conversation: {error}")
    if not 0 < len(ids) <= longest:
        reason = f"the prompt has {len(ids)} tokens; sampling.max_prompt_tokens and the model allow 1 to {longest}"
        return failed(ask, reason=reason, prompt_tokens=len(ids))
    return ids
