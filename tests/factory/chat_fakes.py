"""A server of chat completions for tests: in a thread, as badly behaved as it is told to be, and it counts."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teachers.remote_fakes import Fake, Reply, as_json, fake_server

from largekd.config.generate import EndpointBackendConfig, SamplingConfig
from largekd.curation.answer_shards import Answer, write_shard
from largekd.curation.records import Ask, Draw, Item, Written
from largekd.factory.endpoint import EndpointBackend

PROMPT_TOKENS, WRITTEN_TOKENS = 10, 5

Misbehave = Callable[[str, Reply], Reply]


def make_ask(question: str, *, max_new_tokens: int = 50, **draw: Any) -> Ask:
    """An ask with one message."""
    known = {"temperature": 0.7, "top_p": 1.0, "top_k": None, "min_p": 0.0, "stop": ()} | draw
    return Ask(
        item=Item(id=question, question=question),
        template="t",
        sample=0,
        draw=Draw(max_new_tokens=max_new_tokens, **known),
        seed=7,
        messages=({"role": "user", "content": question},),
    )


def make_asks(count: int) -> list[Ask]:
    return [make_ask(f"question {number}") for number in range(count)]


def right_text(question: str) -> str:
    return f"answer to {question}"


def completion(text: str, **change: Any) -> dict[str, Any]:
    """The JSON of a good answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": WRITTEN_TOKENS}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage} | change


@dataclass
class ChatServer:
    """`completed` counts, for each question, the good answers that were given: what is charged."""

    fake: Fake
    completed: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(body) for path, body, _ in self.fake.asked if path.endswith("/chat/completions")]

    @property
    def url(self) -> str:
        return f"{self.fake.address}/v1"


@contextmanager
def chat_server(misbehave: Misbehave | None = None) -> Iterator[ChatServer]:
    """Answers every question rightly, unless `misbehave(question, good reply)` gives another reply."""
    lock, made = threading.Lock(), []

    def answer(path: str, body: bytes) -> Reply:
        if not path.endswith("/chat/completions"):
            return as_json({"data": []})
        question = json.loads(body)["messages"][-1]["content"]
        good = as_json(completion(right_text(question)))
        reply = good if misbehave is None else misbehave(question, good)
        if reply is good:
            with lock:
                made[0].completed[question] += 1
        return reply

    with fake_server(answer) as fake:
        made.append(ChatServer(fake))
        yield made[0]


def make_config(url: str, **change: Any) -> EndpointBackendConfig:
    return EndpointBackendConfig(**({"kind": "endpoint", "url": url, "model": "m"} | change))


def open_backend(url: str, folder: Path, **change: Any) -> EndpointBackend:
    return EndpointBackend(make_config(url, **change), sampling=SamplingConfig(), folder=folder)


def commit(folder: Path, asks: list[Ask], found: dict[str, Written], *, number: int = 0) -> None:
    """What a job does with answers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder, number=number, answers=[Answer(ask, found[ask.key]) for ask in asks if ask.key in found])


def write_all(
    url: str, folder: Path, asks: list[Ask], *, stopping: Callable[[], bool] = lambda: False, **change: Any
) -> dict[str, Written]:
    """What a backend that is opened for this writes, by key; each key at most once."""
    backend = open_backend(url, folder, **change)
    try:
        found = list(backend.write(iter(asks), stopping=stopping))
    finally:
        backend.close()
    by_key = {written.key: written for written in found}
    assert len(by_key) == len(found)
    return by_key
