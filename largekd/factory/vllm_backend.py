"""vLLM in this process as the writer.

Written against its documented interface and tested with a stand-in: it has not been run with vLLM itself.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from largekd.config.generate import SamplingConfig, VllmBackendConfig
from largekd.curation.records import Ask, Written
from largekd.data.vocabulary import load_tokenizer, tokenizer_fingerprint
from largekd.errors import ConfigError
from largekd.factory.chat import chat_ids, chat_text, prompt_ids
from largekd.models.digest import sampled_weights_digest
from largekd.models.source import find_model

logger = logging.getLogger(__name__)

_KEY = "backend"
_OWNED = ("model", "tokenizer")
_FINISHED = {"stop": "stop", "length": "length"}


class VllmBackend:
    """Writes with `vllm.LLM`'s engine; see Backend. Only rank 0 builds one.

    `batch_size` asks are under way at any time and a finished one is replaced at once; vLLM decides how many of them
    it works at together. The engine is started by the first `write`. Every ask has its own seed, but vLLM's rounding
    depends on what else is under way: texts may differ between two runs where two tokens are about equally likely.
    Errors: ConfigError where vLLM is not installed or cannot start; DataError for the tokenizer.
    """

    only_main = True

    def __init__(
        self,
        config: VllmBackendConfig,
        *,
        sampling: SamplingConfig,
    ) -> None:
        for name in _OWNED:
            if name in config.engine:
                raise ConfigError(f"{_KEY}.engine.{name}: the job sets this itself; see {_KEY}.model.")
        self._vllm = _library()
        self._config, self._sampling = config, sampling
        trusted = bool(config.engine.get("trust_remote_code", False))
        self._source = find_model(
            config.model,
            key=f"{_KEY}.model",
            revision=config.engine.get("revision"),
            trust_remote_code=trusted,
            # Alone: no other rank fetches the model.
            first=nullcontext,
        )
        path = str(self._source.path)
        self._tokenizer = load_tokenizer(path, trust_remote_code=trusted, key=f"{_KEY}.model")
        self._engine: Any = None
        self._llm: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the texts."""
        engine = self._config.engine
        return {
            "kind": "vllm",
            "weights": sampled_weights_digest(self._source.path),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "chat_template": self._tokenizer.get_chat_template() if self._tokenizer.chat_template else None,
            "engine": {name: engine[name] for name in ("dtype", "quantization") if name in engine},
        }

    def write(self, asks: Iterator[Ask], *, stopping: Callable[[], bool]) -> Iterator[Written]:
        """Answers in the order in which they end; told to stop, it drops what is under way."""
        if self._engine is None:
            self._start()
        under_way: dict[str, int] = {}
        try:
            while not stopping():
                while len(under_way) < self._config.batch_size and (ask := next(asks, None)) is not None:
                    ids = self._prompt(ask)
                    if isinstance(ids, Written):
                        yield ids
                        continue
                    self._engine.add_request(ask.key, {"prompt_token_ids": ids}, self._parameters(ask))
                    under_way[ask.key] = len(ids)
                if not under_way:
                    break
                for output in self._engine.step():
                    if output.finished:
                        yield _written(output, prompt_tokens=under_way.pop(output.request_id))
        finally:
            if under_way:
                self._engine.abort_request(list(under_way))

    def show(self, ask: Ask) -> str:
        """The conversation by the model's chat template; without one, the messages' texts with blank lines between.

        Errors: jinja2.TemplateError for a conversation that the template refuses.
        """
        return chat_text(ask, tokenizer=self._tokenizer)

    def count(self, ask: Ask) -> int:
        """Tokens of the prompt."""
        return len(chat_ids(ask, tokenizer=self._tokenizer))

    def close(self) -> None:
        """Give the engine back; vLLM frees its memory when nothing refers to it."""
        self._engine = self._llm = None

    def _start(self) -> None:
        try:
            self._llm = self._vllm.LLM(model=str(self._source.path), **self._config.engine)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"{_KEY}.model = {self._config.model!r}, {_KEY}.engine: vLLM cannot start: {error}"
            ) from error
        self._engine = self._llm.llm_engine
        self._positions = int(self._engine.model_config.max_model_len)
        if self._positions <= self._sampling.max_new_tokens:
            raise ConfigError(
                f"sampling.max_new_tokens = {self._sampling.max_new_tokens}: vLLM was started with {self._positions} "
                f"positions ({_KEY}.engine.max_model_len), which leaves no room for a prompt."
            )

    def _prompt(self, ask: Ask) -> list[int] | Written:
        longest = min(self._sampling.max_prompt_tokens, self._positions - ask.draw.max_new_tokens)
        return prompt_ids(ask, tokenizer=self._tokenizer, longest=longest)

    def _parameters(self, ask: Ask) -> Any:
        draw = ask.draw
        more: dict[str, Any] = {} if draw.top_k is None else {"top_k": draw.top_k}
        return self._vllm.SamplingParams(
            n=1,
            temperature=draw.temperature,
            top_p=draw.top_p,
            min_p=draw.min_p,
            max_tokens=draw.max_new_tokens,
            stop=list(draw.stop),
            seed=ask.seed,
            # Only that of each drawn token itself.
            logprobs=0,
            **more,
        )


def _written(output: Any, *, prompt_tokens: int) -> Written:
    (completion,) = output.outputs
    tokens = len(completion.token_ids)
    finish = _FINISHED.get(completion.finish_reason)
    total = completion.cumulative_logprob
    return Written(
        key=output.request_id,
        text=completion.text if finish else "",
        finish="stop" if finish == "stop" else "length" if finish == "length" else "failed",
        prompt_tokens=prompt_tokens,
        written_tokens=tokens,
        mean_logp=float(total) / tokens if total is not None and tokens and finish else None,
        failure=None if finish else f"vLLM ended it with {completion.finish_reason!r}",
    )


def _library() -> Any:
    """vLLM, which is no dependency of this package: it brings a torch of its own."""
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"{_KEY}.kind = vllm: the package vllm cannot be imported ({error}). Install it in an environment of its "
            f"own, for it brings its own torch; or serve the model and use {_KEY}.kind=endpoint, or embedded."
        ) from error
