"""vLLM as the writer, with a stand-in for vLLM: what it is handed, and what is made of what it gives back."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from factory.chat_fakes import make_ask, make_asks

from largekd.config.generate import SamplingConfig, VllmBackendConfig
from largekd.errors import ConfigError
from largekd.factory.vllm_backend import VllmBackend


@dataclass
class FakeEngine:
    """Ends a request after as many steps as its place in the queue, three at a time."""

    max_model_len: int = 600
    added: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most: int = 0

    @property
    def model_config(self):
        return SimpleNamespace(max_model_len=self.max_model_len)

    def add_request(self, key, prompt, parameters):
        assert key not in self.added
        self.added[key] = (prompt, parameters)
        self.waiting.append(key)
        self.most = max(self.most, len(self.waiting))

    def step(self):
        key = self.waiting.pop()
        parts = [SimpleNamespace(request_id=other, finished=False, outputs=[]) for other in self.waiting]
        reason = {0: "stop", 1: "length", 2: "abort"}[len(self.added) % 3 if self.most > 1 else 0]
        completion = SimpleNamespace(
            text=f"to {key}", token_ids=[1, 2, 3, 4], cumulative_logprob=-2.0, finish_reason=reason
        )
        return [*parts, SimpleNamespace(request_id=key, finished=True, outputs=[completion])]

    def abort_request(self, keys):
        self.aborted += keys


class FakeLLM:
    made: ClassVar[list[dict[str, Any]]] = []
    engine: ClassVar[FakeEngine]

    def __init__(self, **arguments):
        if arguments.get("dtype") == "unknown":
            raise ValueError("no such dtype")
        self.made.append(arguments)
        self.llm_engine = self.engine


@pytest.fixture
def engine(monkeypatch):
    module: Any = ModuleType("vllm")
    FakeLLM.engine, FakeLLM.made = FakeEngine(), []
    module.LLM, module.SamplingParams = FakeLLM, lambda **parameters: parameters
    monkeypatch.setitem(sys.modules, "vllm", module)
    return FakeLLM.engine


def backend(assets, *, sampling=None, **change):
    config = VllmBackendConfig(**({"kind": "vllm", "model": str(assets / "teacher"), "batch_size": 4} | change))
    return VllmBackend(config, sampling=sampling or SamplingConfig(max_new_tokens=50))


def test_every_ask_is_written_once_with_its_own_draw(tiny_assets, engine):
    asks = [make_ask(f"q{number}", temperature=0.3, top_k=5, stop=("x",)) for number in range(11)]
    asks.append(make_ask("free"))
    one = backend(tiny_assets, engine={"gpu_memory_utilization": 0.5})
    assert FakeLLM.made == [], "not before it is needed"
    assert one.count(asks[0]) > 0 and "q0" in one.show(asks[0])
    found = {written.key: written for written in one.write(iter(asks), stopping=lambda: False)}
    assert found.keys() == {ask.key for ask in asks} and engine.most == 4
    assert FakeLLM.made == [{"model": str(tiny_assets / "teacher"), "gpu_memory_utilization": 0.5}]
    prompt, parameters = engine.added[asks[0].key]
    assert len(prompt["prompt_token_ids"]) == one.count(asks[0]) == found[asks[0].key].prompt_tokens
    expected = {"n": 1, "temperature": 0.3, "top_p": 1.0, "min_p": 0.0, "top_k": 5, "max_tokens": 50, "seed": 7}
    assert parameters == expected | {"stop": ["x"], "logprobs": 0}
    assert "top_k" not in engine.added[asks[-1].key][1]
    assert {written.finish for written in found.values()} == {"stop", "length", "failed"}
    for written in found.values():
        whole = written.finish != "failed"
        assert written.text == (f"to {written.key}" if whole else "") and (written.failure is None) == whole
        assert written.mean_logp == (-0.5 if whole else None) and written.written_tokens == 4


def test_a_prompt_without_room_is_a_failed_row_and_not_handed_over(tiny_assets, engine):
    asks = [make_ask("word " * 2000), make_ask("short")]
    found = list(backend(tiny_assets).write(iter(asks), stopping=lambda: False))
    assert [written.finish for written in found] == ["failed", "stop"]
    assert "allow 1 to 550" in (found[0].failure or "") and list(engine.added) == [asks[1].key]


def test_told_to_stop_it_takes_nothing_more_and_drops_what_is_under_way(tiny_assets, engine):
    found, asks = [], iter(make_asks(20))
    for written in backend(tiny_assets).write(asks, stopping=lambda: len(found) >= 3):
        found.append(written)
    assert len(found) == 3 and set(engine.aborted) == set(engine.added) - {written.key for written in found}
    assert len(list(asks)) == 20 - len(engine.added)


def test_what_decides_the_texts_is_its_identity(tiny_assets, engine):
    one, other = backend(tiny_assets), backend(tiny_assets, engine={"dtype": "float32", "gpu_memory_utilization": 0.1})
    assert one.only_main and one.identity["weights"] == other.identity["weights"]
    assert other.identity["engine"] == {"dtype": "float32"} and one.identity != other.identity
    one.close()
    one.close()


def test_what_cannot_be_is_told(tiny_assets, engine, monkeypatch):
    with pytest.raises(ConfigError, match=r"backend\.engine\.tokenizer"):
        backend(tiny_assets, engine={"tokenizer": "x"})
    with pytest.raises(ConfigError, match="vLLM cannot start: no such dtype"):
        list(backend(tiny_assets, engine={"dtype": "unknown"}).write(iter(make_asks(1)), stopping=lambda: False))
    with pytest.raises(ConfigError, match=r"600 positions \(backend\.engine\.max_model_len\)"):
        long = backend(tiny_assets, sampling=SamplingConfig(max_new_tokens=600))
        list(long.write(iter(make_asks(1)), stopping=lambda: False))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vllm cannot be imported"):
        backend(tiny_assets)
