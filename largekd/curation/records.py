"""The records of the data factory: a row in, what a model wrote, what was found in it, and the verdict."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Item:
    """A row in: `id` is stable over runs, `question` what is asked, `answer` the right answer where there is one,
    `tests` unit tests of a program; `fields` everything else that templates may use."""

    id: str
    question: str
    answer: str | None = None
    tests: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """How one answer is drawn."""

    temperature: float
    top_p: float
    top_k: int | None
    min_p: float
    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: the row, the template, which sample of it, and the whole conversation so far.

    `key` names it for good: a function of row id, template (name and text), draw, seed, sample and conversation, and of
    nothing else, such as the number of ranks. `attempt`: how often it has failed in earlier starts.
    """

    item: Item
    template: str
    sample: int
    draw: Draw
    seed: int
    messages: tuple[Message, ...]
    attempt: int = 0

    @property
    def key(self) -> str:
        """SHA-256 in hexadecimal, 32 digits."""
        parts = [self.item.id, self.template, self.sample, asdict(self.draw), self.seed, self.messages]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def attempt_key(self) -> str:
        """The key, and which attempt it is from the second on."""
        return f"{self.key}-{self.attempt}" if self.attempt else self.key


@dataclass(frozen=True)
class Written:
    """What a model wrote for an Ask: `finish` tells why it ended; a failed one has no text and says why.

    `mean_logp` is the mean log-probability of the written tokens, where the backend gives it; `cost` in the currency
    of the configured prices.
    """

    key: str
    text: str
    finish: Literal["stop", "length", "failed"]
    prompt_tokens: int
    written_tokens: int
    mean_logp: float | None = None
    least_margin: float | None = None
    cost: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class Parsed:
    """What was found in a text. `problem` says why it could not be parsed; nothing is ever invented."""

    reasoning: str | None = None
    steps: tuple[str, ...] = ()
    answer: str | None = None
    program: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; `how` names the rule, `detail` what was compared."""

    outcome: Literal["right", "wrong", "unknown"]
    how: str
    detail: str = ""


@dataclass(frozen=True)
class Curated:
    """A row of the factory with everything that is known of it; `dropped_by` is the first rule that refused it, such
    as "length.max_words", and `note` what it found."""

    ask: Ask
    written: Written
    parsed: Parsed
    verdict: Verdict
    scores: Mapping[str, float] = field(default_factory=dict)
    dropped_by: str | None = None
    note: str = ""
