"""Which tokens of a conversation carry the loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from largekd.data.quarantine import UnusableRecordError
from largekd.data.templates import ChatEncoder, _longest_overlap, load_template
from largekd.errors import DataError

# The session tokenizer's own template (test_template_file_replaces_the_tokenizers compares them).
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "Be kind.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "naïve café 1 2 3"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "the lazy dog"},
]
MARKED = CHATML.replace(
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n",
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n",
)
# Like the templates of reasoning models: earlier turns lose their thoughts, the prompt opens one.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def learnt(encoder: ChatEncoder, messages: list[dict[str, str]]) -> list[str]:
    """Maximal runs of tokens that carry the loss, as text."""
    ids, mask = encoder.encode(messages)
    runs: list[list[int]] = []
    for place, (token, counted) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if counted and (place == 0 or not mask[place - 1]):
            runs.append([])
        if counted:
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run) for run in runs]


def encoder_of(tokenizer: PreTrainedTokenizerFast, template: str = CHATML) -> ChatEncoder:
    return ChatEncoder(tokenizer=tokenizer, template=template)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_with_their_end_of_turn_and_nothing_else(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    encoder = encoder_of(tokenizer, template)
    assert learnt(encoder, TALK) == ["naïve café 1 2 3<|im_end|>", "the lazy dog<|im_end|>"]
    assert learnt(encoder, [{"role": "system", "content": "be kind"}, *TALK[:2]]) == ["naïve café 1 2 3<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_of_weight_0_is_read_and_not_learnt(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    encoder = encoder_of(tokenizer, template)
    talk: list[dict] = [{**message} for message in TALK]
    talk[1]["weight"], talk[3]["weight"] = 0, 1
    assert learnt(encoder, talk) == ["the lazy dog<|im_end|>"]
    assert encoder.encode(talk)[0].tolist() == encoder.encode(TALK)[0].tolist()
    for wrong in (0.5, True, "0"):
        talk[1]["weight"] = wrong
        with pytest.raises(UnusableRecordError, match="expected 0 or 1"):
            encoder.encode(talk)


def test_ids_are_the_rendered_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = encoder_of(tokenizer).encode(TALK)
    assert ids.tolist() == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False))["input_ids"]


def test_loss_on_all_counts_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = ChatEncoder(tokenizer=tokenizer, template=CHATML, loss_on="all").encode(TALK[:1])
    assert mask.tolist() == [1] * len(ids)


def test_special_text_inside_an_answer_does_not_end_it(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "one<|im_end|>\ntwo"}]
    assert learnt(encoder_of(tokenizer), talk) == ["one<|im_end|>\ntwo<|im_end|>"]


def test_trimmed_offsets_do_not_take_the_prompts_last_space(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    encoder = encoder_of(make_tokenizer(trim_offsets=True))
    assert learnt(encoder, TALK) == ["naïve café 1 2 3<|im_end|>", "the lazy dog<|im_end|>"]
    spaced = [TALK[0], {"role": "assistant", "content": "a  b "}]
    assert learnt(encoder, spaced) == ["a  b <|im_end|>"]
    # The space at the end of the prompt is a token of its own here, reported as empty at the answer's start.
    broken = [TALK[0], {"role": "assistant", "content": "\nfox "}]
    assert learnt(encoder_of(encoder.tokenizer, PLAIN), broken) == ["\nfox \n"]


def test_spaces_across_the_border_carry_no_loss(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer(extra=("\n\n",))
    talk = [TALK[0], {"role": "assistant", "content": "\nfox"}]
    ids, _ = encoder_of(tokenizer).encode(talk)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)].tolist() != prompt, "the case needs a prompt whose ids are no prefix"
    assert learnt(encoder_of(tokenizer), talk) == ["fox<|im_end|>"]


def test_a_token_that_mixes_prompt_and_answer_carries_no_loss(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer(extra=(">ye",))
    template = PLAIN.replace("assistant: ", "assistant>").replace("{{ m.role }}: ", "{{ m.role }}>")
    assert learnt(encoder_of(tokenizer, template), [TALK[0], {"role": "assistant", "content": "yes"}]) == ["s\n"]


def test_templates_that_rewrite_earlier_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [
        TALK[0],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfirst"},
        TALK[2],
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nsecond"},
    ]
    # The second prompt opens the thought itself, so only what follows is the model's to write.
    assert learnt(encoder_of(tokenizer, REASONING), talk) == [
        "first<|im_end|>",
        "so\n</think>\n\nsecond<|im_end|>",
    ]
    assert learnt(encoder_of(tokenizer, REASONING), [TALK[0], {"role": "assistant", "content": "<b>"}]) == [
        "<b><|im_end|>"
    ]


def test_a_template_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    # The prompt's last space and the answer's first word are one token.
    assert learnt(encoder_of(tokenizer, PLAIN), TALK) == [" naïve café 1 2 3\n", " the lazy dog\n"]


def test_a_template_that_closes_only_whole_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    closing = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert learnt(encoder_of(tokenizer, closing), TALK[:2]) == ["naïve café 1 2 3<|im_end|>\n<|endoftext|>"]


def test_a_template_that_moves_messages_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    prompt_first = "{% if add_generation_prompt %}answer:{% endif %}" + CHATML
    altered = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper if loop.last else '…' }}")
    # A prompt that is no continuation of the conversation before it.
    replaced = (
        "{% if add_generation_prompt %}" + "{{ messages[0].content }}" * 2 + "{% else %}" + altered + "{% endif %}"
    )
    for template in (backwards, prompt_first, altered, replaced):
        with pytest.raises(UnusableRecordError, match=r"before assistant message 1 .*\{% generation %\}"):
            encoder_of(tokenizer, template).encode(TALK)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ([5], "message 0 is a int"),
        ([{"from": "human", "value": "x"}], "message 0 has no 'role' .*'from', 'value'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"message 0 \(user\) has no text"),
        ([{"role": "user", "content": "\ud83d"}], "surrogate"),
        (TALK[:1], "no assistant message, so no token to learn"),
        (TALK[1:2], "begins with an assistant message"),
    ],
)
def test_malformed_conversations_say_why(tokenizer: PreTrainedTokenizerFast, messages: object, problem: str) -> None:
    with pytest.raises(UnusableRecordError, match=problem):
        encoder_of(tokenizer).encode(messages)


def test_a_template_that_raises_gives_a_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnusableRecordError, match="refuses the messages: roles must alternate"):
        encoder_of(tokenizer, "{{ raise_exception('roles must alternate') }}").encode(TALK)


def test_a_system_message_that_a_template_refuses_stands_before_the_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    system = {"role": "system", "content": "the fox"}
    found, expected = (
        encoder_of(tokenizer, refuses).read(talk)
        for talk in ([system, *TALK], [{**TALK[0], "content": "the fox\n\n" + TALK[0]["content"]}, *TALK[1:]])
    )
    assert found.text == expected.text and found.mask.tolist() == expected.mask.tolist()
    assert "<|im_start|>system" in encoder_of(tokenizer).read([system, *TALK]).text
    with pytest.raises(UnusableRecordError, match="no system role"):
        encoder_of(tokenizer, refuses).read([system, *TALK[1:]])


def test_null_keys_are_absent_keys(tokenizer: PreTrainedTokenizerFast) -> None:
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{% if 'name' in message %}!{% endif %}"
    )
    filled = [{**message, "name": None} for message in TALK]
    assert learnt(encoder_of(tokenizer, template), filled)[1] == "the lazy dog<|im_end|>"


def test_template_file_replaces_the_tokenizers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(PLAIN)
    assert load_template(tokenizer, path=str(tmp_path / "chat.jinja")) == PLAIN
    assert load_template(tokenizer, path=None) == CHATML
    with pytest.raises(DataError, match=r"data\.eval\.chat_template = .*none\.jinja"):
        load_template(tokenizer, path=str(tmp_path / "none.jinja"), key="data.eval")


def test_longest_overlap_matches_brute_force() -> None:
    words = ["", "a", "ab", "aab", "abab", "babab", "aaaa", "abcab", "xabcab"]
    for left in words:
        for right in words:
            sizes = [n for n in range(min(len(left), len(right)) + 1) if left[len(left) - n :] == right[:n]]
            assert _longest_overlap(left, right) == max(sizes), (left, right)


class PairTokenizer(PreTrainedTokenizer):
    """No offsets: characters are tokens, and so is the pair that `pair` names."""

    def __init__(self, pair: str = "", **kwargs: object) -> None:
        self._pair = pair
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return 300

    def get_vocab(self) -> dict[str, int]:
        return {
            **{chr(i): i for i in range(299)},
            **({self._pair: 299} if self._pair else {}),
            **self.added_tokens_encoder,
        }

    def _tokenize(self, text: str, **_: object) -> list[str]:
        pieces = text.split(self._pair) if self._pair else [text]
        tokens: list[str] = []
        for place, piece in enumerate(pieces):
            tokens += [self._pair] * (place > 0) + list(piece)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return 299 if token == self._pair else ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pair if index == 299 else chr(index)

    def save_vocabulary(self, *_: object, **__: object) -> tuple[str, ...]:
        return ()


def test_tokenizer_without_offsets() -> None:
    # This template tells prompt and answer apart by one character, so that a pair can span their border.
    template = "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}a>{% endif %}"
    ids, mask = ChatEncoder(tokenizer=PairTokenizer(), template=template).encode(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    )
    assert "".join(chr(i) for i, m in zip(ids, mask, strict=True) if m) == "yes\n"
    with pytest.raises(UnusableRecordError, match="use a fast tokenizer"):
        ChatEncoder(tokenizer=PairTokenizer(pair=">y"), template=template).encode(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        )


def test_messages_survive_json(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer)
    assert encoder.encode(json.loads(json.dumps(TALK)))[0].tolist() == encoder.encode(TALK)[0].tolist()
