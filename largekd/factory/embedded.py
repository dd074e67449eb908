"""A model of this job as the writer: loaded in shards, written with by continuous batching."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

from largekd.config.generate import EmbeddedBackendConfig, SamplingConfig
from largekd.config.placement import read_placement, with_swap_folder
from largekd.config.train import TrainConfig
from largekd.curation.records import Ask, Written
from largekd.data.vocabulary import load_tokenizer, tokenizer_fingerprint
from largekd.engine.ds_config import frozen_ds_config
from largekd.engine.frozen import FrozenEngine
from largekd.errors import ConfigError
from largekd.factory.chat import chat_ids, chat_text, prompt_ids
from largekd.generation.continuous import ContinuousWriter, Finished, Prompt
from largekd.generation.gathering import fitting, possible
from largekd.generation.growing_cache import keeps_keys_and_values_alone
from largekd.generation.row_draws import RowRule
from largekd.generation.writer import stop_tokens
from largekd.models.build import build_model, load_pretrained
from largekd.models.digest import sampled_weights_digest
from largekd.models.replica import whole_copy
from largekd.models.source import find_model
from largekd.runtime.ranks import Ranks, Together
from largekd.sharding.accelerator import device

_KEY = "backend"


class EmbeddedBackend:
    """See Backend. The weights are loaded by the first `write`; every rank makes the same calls.

    folder: the job's, whose name tells its swap files from those of other jobs.
    Errors: ConfigError, DataError for a model or a tokenizer that cannot be used.
    """

    only_main = False

    def __init__(
        self,
        config: EmbeddedBackendConfig,
        *,
        sampling: SamplingConfig,
        folder: Path,
        ranks: Ranks,
        first: Callable[[], AbstractContextManager[None]],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._config, self._sampling, self._folder, self._ranks = config, sampling, folder, ranks
        self._source = find_model(
            config.model,
            key=f"{_KEY}.model",
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            first=first,
        )
        path = self._source.path
        with Together(group=group):
            self._tokenizer = load_tokenizer(str(path), trust_remote_code=config.trust_remote_code, key=f"{_KEY}.model")
            self._placement = read_placement(config.deepspeed, key=f"{_KEY}.deepspeed")
            self._stops = stop_tokens(self._tokenizer, folder=path)
            self._check()
            self._weights = sampled_weights_digest(path)
        self._stack = ExitStack()
        self._writer: ContinuousWriter | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the texts."""
        return {
            "kind": "embedded",
            "weights": self._weights,
            "precision": self._config.precision,
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "chat_template": self._tokenizer.get_chat_template() if self._tokenizer.chat_template else None,
        }

    def show(self, ask: Ask) -> str:
        """See chat_text."""
        return chat_text(ask, tokenizer=self._tokenizer)

    def count(self, ask: Ask) -> int:
        """Tokens of the prompt."""
        return len(chat_ids(ask, tokenizer=self._tokenizer))

    def write(self, asks: Iterator[Ask], *, stopping: Callable[[], bool]) -> Iterator[Written]:
        """See Backend. An ask that cannot be answered comes back before the asks after it are taken."""
        if self._writer is None:
            self._writer = self._load()
        lengths: dict[str, int] = {}
        refused: list[Written] = []

        def prompts() -> Iterator[Prompt]:
            for ask in asks:
                prompt = self._prompt(ask)
                if isinstance(prompt, Written):
                    refused.append(prompt)
                else:
                    lengths[ask.key] = len(prompt.ids)
                    yield prompt

        for finished in self._writer.write(prompts(), stopping=stopping):
            yield from _emptied(refused)
            yield self._written(finished, prompt_tokens=lengths.pop(finished.key))
        yield from _emptied(refused)

    def close(self) -> None:
        """Give the weights back."""
        self._writer = None
        self._stack.close()

    def _check(self) -> None:
        name = self._config.model
        if not self._stops.ends:
            raise ConfigError(
                f"{_KEY}.model = {name!r}: neither its tokenizer nor generation_config.json has an end token."
            )
        if not keeps_keys_and_values_alone(self._source.config.get_text_config()):
            raise ConfigError(
                f"{_KEY}.model = {name!r}: a {self._source.config.model_type} model keeps other states than keys and "
                "values between tokens; serve it, and use backend.kind=endpoint or vllm."
            )
        if self._positions <= self._sampling.max_new_tokens:
            raise ConfigError(
                f"sampling.max_new_tokens = {self._sampling.max_new_tokens}: the model has {self._positions} positions "
                "(max_position_embeddings), which leaves no room for a prompt."
            )

    @property
    def _positions(self) -> int:
        limit = getattr(self._source.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit is not None else 1 << 30

    def _prompt(self, ask: Ask) -> Prompt | Written:
        longest = min(self._sampling.max_prompt_tokens, self._positions - ask.draw.max_new_tokens)
        ids = prompt_ids(ask, tokenizer=self._tokenizer, longest=longest)
        if isinstance(ids, Written):
            return ids
        draw = ask.draw
        rule = RowRule(temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k, min_p=draw.min_p)
        return Prompt(ask.key, np.array(ids, np.int32), rule, uniforms(ask), draw.stop)

    def _written(self, finished: Finished, *, prompt_tokens: int) -> Written:
        text = self._decode(finished.ids)
        places = [place for stop in self._sampling.stop if (place := text.find(stop)) >= 0]
        return Written(
            key=finished.key,
            text=text[: min(places)] if places else text,
            finish=finished.finish,
            prompt_tokens=prompt_tokens,
            written_tokens=finished.tokens,
            mean_logp=finished.mean_logp,
            least_margin=finished.least_margin,
        )

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _load(self) -> ContinuousWriter:
        """The model on this rank. A collective call."""
        config, ranks = self._config, self._ranks
        train = TrainConfig(
            max_steps=1, global_batch_size=1, micro_batch_size=1, sequence_length=2, precision=config.precision
        )
        own = f"{self._folder.name}-{hashlib.sha256(str(self._folder).encode()).hexdigest()[:8]}"
        placement = with_swap_folder(self._placement, f"{own}/writer")
        ds_config = frozen_ds_config(placement, train=train, world_size=ranks.world_size)
        # DeepSpeed's own linear saves memory in a backward pass, of which there is none, and takes longer to call.
        ds_config["zero_optimization"].setdefault("memory_efficient_linear", False)
        model = build_model(
            self._source.config,
            ds_config=ds_config,
            precision=config.precision,
            attention=config.attention,
            trust_remote_code=config.trust_remote_code,
            key=_KEY,
        )
        load_pretrained(model, folder=self._source.path, rank=ranks.rank)
        gather = possible(model, gather=config.gather, key=f"{_KEY}.gather", ranks=ranks)
        if gather == "auto":
            gather = fitting(model, key=f"{_KEY}.gather", device=device(), ranks=ranks)
        if gather == "whole":
            shards, model = model, self._stack.enter_context(whole_copy(model, device=device()))
            del shards
            gc.collect()
        else:
            self._stack.callback(FrozenEngine(module=model, ds_config=ds_config).close)
        return self._writer_with(model, together=gather == "streamed" and ranks.world_size > 1)

    def _writer_with(self, model: PreTrainedModel, *, together: bool) -> ContinuousWriter:
        return ContinuousWriter(
            model.eval(),
            stops=self._stops,
            batch_size=self._config.batch_size,
            ids=min(len(self._tokenizer), self._source.config.get_text_config().vocab_size),
            decode=partial(self._decode),
            device=device(),
            together=together,
        )


def uniforms(ask: Ask) -> NDArray[np.float64]:
    """The answer's uniform numbers, one a token: of its seed and its key alone."""
    generator = np.random.default_rng((ask.seed, int(ask.key[:16], 16)))
    return generator.random(ask.draw.max_new_tokens)


def _emptied(waiting: list[Written]) -> Iterator[Written]:
    while waiting:
        yield waiting.pop(0)
