"""Bodies of the chat completions protocol: the request for an ask, and what is read out of an answer."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from largekd.config.generate import EndpointBackendConfig
from largekd.curation.records import Ask
from largekd.factory.cost import Usage
from largekd.runtime.http import RefusedError

_BASE_BYTES = 1 << 20
_TOKEN_BYTES = 64
_LOGPROB_BYTES = 512
_FINISHED = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
}
# The server gave up in the middle; it may do better next time.
_BROKEN_OFF = frozenset({"error", "abort"})
_LONGEST_REASON = 200
_LEAST_LOGP = -1e6
_MOST_TOKENS = 1 << 40
# What servers say of this one prompt, and not of the request's form.
_ABOUT_THE_PROMPT = re.compile(
    r"context[_ ]length|context[_ ]window|maximum context|prompt is too long|too many tokens|content_filter|"
    r"content[_ ]policy|content management policy",
    re.IGNORECASE,
)
_OUT_OF_CREDIT = re.compile(r"insufficient_quota|billing_hard_limit|insufficient (credit|balance|funds)", re.IGNORECASE)


class MalformedError(Exception):
    """A whole answer that is of no use; `usage` is what it cost nevertheless, where it tells."""

    def __init__(self, message: str, *, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class ChatAnswer:
    """What a server wrote. A failed one has a reason instead of a text. `usage` is None where the server is silent."""

    text: str
    finish: Literal["stop", "length", "failed"]
    usage: Usage | None
    mean_logp: float | None = None
    failure: str | None = None


def request_body(ask: Ask, *, config: EndpointBackendConfig) -> bytes:
    """The JSON of one request for one answer."""
    draw = ask.draw
    body: dict[str, Any] = {
        "model": config.model,
        "messages": list(ask.messages),
        config.length_parameter: draw.max_new_tokens,
        "temperature": draw.temperature,
        "seed": ask.seed % (1 << 63),
    }
    if draw.top_p < 1:
        body["top_p"] = draw.top_p
    if draw.top_k is not None:
        body["top_k"] = draw.top_k
    if draw.min_p:
        body["min_p"] = draw.min_p
    if draw.stop:
        body["stop"] = list(draw.stop)
    if config.logprobs:
        body["logprobs"] = True
    sent = {name: value for name, value in body.items() if name not in config.omit}
    # Lone surrogates have no UTF-8; escaped they are JSON all the same.
    return json.dumps(sent | config.extra, ensure_ascii=True).encode()


def longest_body(ask: Ask, *, config: EndpointBackendConfig) -> int:
    """Bytes beyond which an answer is not read on."""
    return _BASE_BYTES + ask.draw.max_new_tokens * (_TOKEN_BYTES + (_LOGPROB_BYTES if config.logprobs else 0))


def read_answer(body: bytes) -> ChatAnswer:
    """The first choice of an answer. Errors: MalformedError."""
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the answer is no JSON ({type(error).__name__})") from error
    if not isinstance(record, dict):
        raise MalformedError("the answer is no JSON object")
    usage = _usage(record.get("usage"))
    if record.get("error"):
        raise MalformedError(f"the server answered with an error: {_short(record['error'])}", usage=usage)
    choices = record.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise MalformedError("the answer has no choices[0].message", usage=usage)
    finish = choice.get("finish_reason")
    if not isinstance(finish, str):
        finish = "null"
    if finish in _BROKEN_OFF:
        raise MalformedError(f"the server broke off (finish_reason {finish!r})", usage=usage)
    ended = _FINISHED.get(finish)
    refusal = message.get("refusal")
    text = _text(message, whole=ended == "stop")
    if ended is None or text is None:
        why = f"refused: {_short(refusal)}" if refusal else f"no text, finish_reason {_short(finish)}"
        return ChatAnswer("", "failed", usage, failure=why if text is None else f"finish_reason {_short(finish)}")
    return ChatAnswer(text, "stop" if ended == "stop" else "length", usage, mean_logp=_mean_logp(choice))


def is_about_the_prompt(error: RefusedError) -> bool:
    """Whether the server refuses this prompt alone: too long, or against its rules."""
    return error.status in (400, 413, 422) and _ABOUT_THE_PROMPT.search(error.body) is not None


def is_out_of_credit(body: str) -> bool:
    """Whether a 429 will not pass by waiting."""
    return _OUT_OF_CREDIT.search(body) is not None


def _text(message: dict[str, Any], *, whole: bool) -> str | None:
    """The content; what a server cut out of it as reasoning goes back in front, in the tags that models use."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    if not isinstance(content, str):
        content = None
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning:
        closed = whole or content
        content = f"<think>\n{reasoning}" + (f"\n</think>\n\n{content or ''}" if closed else "")
    # No file and no tokenizer takes a lone surrogate.
    return None if content is None else content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(found: Any) -> Usage | None:
    if not isinstance(found, dict):
        return None
    prompt, written = _count(found.get("prompt_tokens")), _count(found.get("completion_tokens"))
    return None if prompt is None or written is None else Usage(prompt, written)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


def _mean_logp(choice: dict[str, Any]) -> float | None:
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values: list[Any] = [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
    # Compared and not converted: JSON has integers that no float holds, and Python reads NaN out of it.
    numbers = [float(value) for value in values if type(value) in (int, float) and _LEAST_LOGP <= value <= 0]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
