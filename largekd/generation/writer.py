"""Writing answers with a sharded model, through transformers' own generation with its key-value cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from largekd.generation.gathering import Gather, fitting, possible
from largekd.generation.sampling import DrawRule, Seed, SeededDraws
from largekd.models.replica import whole_copy
from largekd.runtime.ranks import Ranks

_KEY = "rollouts.gather"


@dataclass(frozen=True)
class Question:
    """A prompt's ids, and what decides the draws of its answer."""

    ids: NDArray[np.int32]
    seed: Seed


@dataclass(frozen=True)
class Answer:
    """Ids up to the first end token or the longest allowed, and log q of each at temperature 1."""

    ids: tuple[int, ...]
    logq: tuple[float, ...]
    ended: bool


@dataclass(frozen=True)
class StopTokens:
    """Ids that end an answer, and the id that fills a batch behind it."""

    ends: tuple[int, ...]
    fill: int


def stop_tokens(tokenizer: PreTrainedTokenizerBase, *, folder: Path) -> StopTokens:
    """End tokens of a model folder's generation_config.json, where it has one, and the tokenizer's; perhaps none."""
    found: list[int] = []
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        found += [] if listed is None else listed if isinstance(listed, list) else [listed]
    if isinstance(tokenizer.eos_token_id, int):
        found.append(tokenizer.eos_token_id)
    ends = tuple(dict.fromkeys(found))
    fill = tokenizer.pad_token_id
    return StopTokens(ends=ends, fill=fill if isinstance(fill, int) else ends[0] if ends else 0)


class Writer:
    """Writes answers with a model of this job; every rank makes the same calls.

    whole: the weights are copied whole to every rank once per `write`, which then writes without communication.
    streamed: the shards stay where they are; each module gathers its own for every token, and all ranks go on until
    the last one has finished. The model's mode is as before afterwards, and no gradient is recorded.
    auto: whole where it fits, streamed for a model that cannot be copied; with `whole` that is a ConfigError at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rule: DrawRule,
        stops: StopTokens,
        max_new_tokens: int,
        batch_size: int,
        gather: Gather,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        assert stops.ends, "without end tokens transformers would take those of the model's configuration"
        self._model, self._rule, self._stops, self._device, self._ranks = model, rule, stops, device, ranks
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._gather = possible(model, gather=gather, key=_KEY, ranks=ranks)

    def write(self, questions: Sequence[Question], *, calls: int, beat: Callable[[], None]) -> list[Answer]:
        """Answers in the order of the questions, `batch_size` at a time. A collective call.

        calls: batches that every rank writes, at least as many as this rank's questions need. A streamed rank that has
        no question left goes on from a single token, and throws that away.
        """
        assert len(questions) <= calls * self._batch_size
        answers: list[Answer] = []
        if not calls:
            return answers
        beat()
        with torch.no_grad(), self._ready() as (model, together):
            for start in range(0, calls * self._batch_size, self._batch_size):
                beat()
                batch = questions[start : start + self._batch_size]
                if not batch and not together:
                    continue
                idle = [Question(np.full(1, self._stops.fill, np.int32), seed=(0,))]
                written = self._batch(batch or idle, model=model, together=together)
                answers += written if batch else []
        return answers

    @contextmanager
    def _ready(self) -> Iterator[tuple[PreTrainedModel, bool]]:
        """The model that writes, and whether its ranks must take every step together."""
        if self._gather == "auto":
            self._gather = fitting(self._model, key=_KEY, device=self._device, ranks=self._ranks)
        if self._gather == "whole":
            with whole_copy(self._model, device=self._device) as copy:
                yield copy, False
            return
        was_training = self._model.training
        self._model.eval()
        try:
            yield self._model, self._ranks.world_size > 1
        finally:
            self._model.train(was_training)

    def _batch(self, questions: Sequence[Question], *, model: PreTrainedModel, together: bool) -> list[Answer]:
        width = max(len(question.ids) for question in questions)
        ids = np.full((len(questions), width), self._stops.fill, np.int64)
        mask = np.zeros_like(ids)
        for place, question in enumerate(questions):
            ids[place, width - len(question.ids) :] = question.ids
            mask[place, width - len(question.ids) :] = 1
        draws = SeededDraws(
            self._rule,
            seeds=[question.seed for question in questions],
            max_new_tokens=self._max_new_tokens,
            device=self._device,
        )
        generate: Any = model.generate
        written = generate(
            torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            logits_processor=LogitsProcessorList([draws]),
            synced_gpus=together,
            generation_config=GenerationConfig(
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(self._stops.ends),
                pad_token_id=self._stops.fill,
            ),
        )
        tokens, logq = written[:, width:].cpu().numpy(), draws.log_probabilities.cpu().numpy()
        return [self._cut(tokens[place], logq=logq[place]) for place in range(len(questions))]

    def _cut(self, tokens: NDArray[np.int64], *, logq: NDArray[np.float32]) -> Answer:
        ends = np.flatnonzero(np.isin(tokens[: len(logq)], self._stops.ends))
        length = int(ends[0]) + 1 if ends.size else len(logq)
        return Answer(ids=tuple(tokens[:length].tolist()), logq=tuple(logq[:length].tolist()), ended=bool(ends.size))
