"""A conversation as the text that a model goes on with."""

from transformers import PreTrainedTokenizerBase

from largekd.curation.records import Ask


def chat_text(ask: Ask, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages by the tokenizer's chat template; without one, their texts with blank lines between.

    Errors: jinja2.TemplateError for a conversation that the template refuses.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in ask.messages)
    text = tokenizer.apply_chat_template(
        [dict(message) for message in ask.messages], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text
