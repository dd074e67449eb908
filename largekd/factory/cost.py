"""What a server's answers cost, and the limit that is never exceeded."""

import threading
from dataclasses import dataclass

from largekd.config.generate import EndpointBackendConfig
from largekd.curation.records import Ask

_BYTES_PER_TOKEN = 4
"""Of English text in today's vocabularies, about."""
_MESSAGE_TOKENS = 16
"""No chat template spends more on a message's frame."""
_MILLION = 1e6


@dataclass(frozen=True)
class Usage:
    """Tokens of one exchange; `estimated` where the server did not tell."""

    prompt_tokens: int
    written_tokens: int
    estimated: bool = False


def estimated_usage(ask: Ask, *, written: str) -> Usage:
    """From the lengths of the texts, four bytes a token."""
    prompt = sum(_MESSAGE_TOKENS // 4 + -(-_size(message["content"]) // _BYTES_PER_TOKEN) for message in ask.messages)
    return Usage(prompt, -(-_size(written) // _BYTES_PER_TOKEN), estimated=True)


def largest_usage(ask: Ask) -> Usage:
    """No answer can use more: a token of a byte-level vocabulary has at least one byte."""
    prompt = sum(_MESSAGE_TOKENS + _size(message["content"]) for message in ask.messages)
    return Usage(prompt, ask.draw.max_new_tokens, estimated=True)


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


class CostMeter:
    """Adds up costs and refuses what might exceed the limit. Calls come from several threads.

    A request is reserved at the most that it can cost and settled at what it did cost. `uncertain` is the part of
    `spent` that stands for requests which broke off after they were sent: the server may have charged them.
    """

    def __init__(self, config: EndpointBackendConfig, *, spent: float = 0.0) -> None:
        self._input_price, self._output_price, self._max_cost = config.input_price, config.output_price, config.max_cost
        self._lock = threading.Lock()
        self._reserved = 0.0
        self.spent, self.uncertain = spent, 0.0
        self.prompt_tokens = self.written_tokens = self.estimated_answers = 0

    def cost(self, usage: Usage) -> float:
        """prompt tokens · input price + written tokens · output price, prices for a million."""
        prompt, written = usage.prompt_tokens * self._input_price, usage.written_tokens * self._output_price
        return (prompt + written) / _MILLION

    def reserve(self, ask: Ask) -> bool:
        """Whether the ask fits under the limit beside all that are under way; then it is one of them."""
        most = self.cost(largest_usage(ask))
        with self._lock:
            if self._max_cost is not None and self.spent + self._reserved + most > self._max_cost:
                return False
            self._reserved += most
            return True

    def release(self, ask: Ask) -> None:
        """The ask is not under way any more and cost nothing."""
        with self._lock:
            self._reserved -= self.cost(largest_usage(ask))

    def settle(self, ask: Ask, *, usage: Usage | None) -> float:
        """The ask is not under way any more; returns what it cost. No usage: it may have cost the most that it can."""
        most = self.cost(largest_usage(ask))
        cost = most if usage is None else self.cost(usage)
        with self._lock:
            self._reserved -= most
            self.spent += cost
            if usage is None:
                self.uncertain += cost
            else:
                self.prompt_tokens += usage.prompt_tokens
                self.written_tokens += usage.written_tokens
                self.estimated_answers += usage.estimated
        return cost

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.prompt_tokens} prompt tokens", f"{self.written_tokens} written tokens"]
        if self._input_price or self._output_price:
            parts.append(f"cost {self.spent:.4f} with earlier starts")
        if self.uncertain:
            parts.append(f"of which {self.uncertain:.4f} stand for requests that broke off and may have been charged")
        if self.estimated_answers:
            parts.append(f"tokens of {self.estimated_answers} answers are estimates: the server did not tell them")
        return ", ".join(parts)
