"""Conversations as a model's chat template takes them, also one that knows no system role."""

import pytest
from factory.chat_fakes import make_ask
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from largekd.config.generate import GenerateConfig
from largekd.curation.records import Written
from largekd.factory.chat import chat_text, prompt_ids

EVERY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + EVERY
LEAVES_OUT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    return tokenizer


def ask_of(*roles: str):
    from dataclasses import replace

    return replace(make_ask("?"), messages=tuple({"role": role, "content": f"{role}'s."} for role in roles))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (EVERY, "<system>system's.<user>user's.<assistant>assistant's.<user>user's."),
        (REFUSES, "<user>system's.\n\nuser's.<assistant>assistant's.<user>user's."),
        (LEAVES_OUT, "<user>system's.\n\nuser's.<assistant>assistant's.<user>user's."),
        (ALTERNATES, "<user>system's.\n\nuser's.<assistant>assistant's.<user>user's."),
        (None, "system's.\n\nuser's.\n\nassistant's.\n\nuser's."),
    ],
)
def test_a_system_message_reaches_every_model(template, text):
    ask = ask_of("system", "user", "assistant", "user")
    assert chat_text(ask, tokenizer=tokenizer_with(template)) == text


def test_what_a_template_refuses_in_any_form_is_a_failed_row():
    ask, tokenizer = ask_of("user", "user"), tokenizer_with(ALTERNATES)
    with pytest.raises(TemplateError, match="must alternate"):
        chat_text(ask, tokenizer=tokenizer)
    written = prompt_ids(ask, tokenizer=tokenizer, longest=100)
    assert isinstance(written, Written) and "roles must alternate" in (written.failure or "")


def test_the_preview_tells_what_the_template_refuses(tmp_path, monkeypatch):
    from factory_jobs import job_settings

    from largekd.config.load import parse_record
    from largekd.factory import preview

    refusing = tokenizer_with("{{ raise_exception('not today') }}")
    monkeypatch.setattr(preview, "load_tokenizer", lambda *given, **named: refusing)
    config = parse_record(GenerateConfig, mapping=job_settings(tmp_path))
    assert "refuses this conversation: not today" in preview.preview(config)
