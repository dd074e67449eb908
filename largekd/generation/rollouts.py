"""A run's rollouts: which rows of a step are generated ones, and where these come from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from largekd.config.rollouts import RolloutConfig
from largekd.contracts import Batch
from largekd.data.store import SampleStore
from largekd.generation.batches import with_rollouts
from largekd.generation.buffer import Rollout, RolloutBuffer, RolloutRow
from largekd.generation.prompts import Prompt, PromptSource
from largekd.generation.scoring import teacher_logp
from largekd.generation.writer import Question, Writer
from largekd.objectives.policy import advantages
from largekd.runtime.ranks import Ranks, gather_objects
from largekd.teachers.protocol import Teacher

_ROWS_STREAM, _DRAWS_STREAM = 0x726F7773, 0x64726177  # keep these draws apart from others of the same seed


@dataclass(frozen=True)
class RowShape:
    """How a step's rows are made; `seed` is the run's."""

    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    packing: bool
    chunk_tokens: int
    seed: int


class Rollouts:
    """Replaces rows of each step by rollouts.

    Which rows, which prompts and which draws follow from seed, step and global batch alone. The answers of a step are
    shared out among the ranks to be written, and then all ranks hold all of them. A packed row holds as many rollouts
    as fit at their greatest length. The data that a replaced row held are passed over.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        shape: RowShape,
        samples: SampleStore,
        writer: Writer,
        teacher: Teacher,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._config, self._shape, self._samples = config, shape, samples
        self._writer, self._teacher, self._ranks, self._device = writer, teacher, ranks, device
        self._prompts = PromptSource(samples, prompt_tokens=config.prompt_tokens, seed=shape.seed)
        self._buffer = RolloutBuffer(reuse=config.reuse, max_staleness=config.max_staleness)
        longest = config.prompt_tokens + config.max_new_tokens - 1
        self._per_row = shape.sequence_length // longest if shape.packing else 1
        self._former = self._buffer.rows
        self._latest: list[RolloutRow] = []
        self._metrics: dict[str, float] = {}

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures of the latest step."""
        return self._metrics

    @property
    def latest(self) -> Sequence[Rollout]:
        """The rollouts of the latest step, the same on every rank."""
        return [rollout for row in self._latest for rollout in row.rollouts]

    def state(self) -> Any:
        """JSON-able; what the next step's rows depend on besides seed and step."""
        return self._buffer.state()

    def restore(self, state: Any) -> None:
        """Become what `state` returned. Errors: CheckpointError."""
        self._buffer.restore(state)

    def take_back(self) -> None:
        """The step that was made last counts neither as written nor as used; iterators are not moved."""
        self._buffer.put_back(self._former)

    def steps(
        self, steps: Iterator[Sequence[Batch]], *, first: int, beat: Callable[[], None]
    ) -> Iterator[Sequence[Batch]]:
        """The loader's steps, of which the next is step `first` (0 is a run's first), with rows replaced.

        `beat` is called before everything that takes long. A collective call for every item.
        """
        for step, micro_batches in enumerate(steps, start=first):
            yield self._replaced(micro_batches, step=step, beat=beat)

    def _replaced(self, batches: Sequence[Batch], *, step: int, beat: Callable[[], None]) -> list[Batch]:
        shape = self._shape
        self._former = self._buffer.rows
        generator = np.random.default_rng((shape.seed, _ROWS_STREAM, step))
        chosen = np.flatnonzero(generator.random(shape.global_batch_size) < self._config.share).tolist()
        started = time.perf_counter()
        missing = len(chosen) - self._buffer.usable(step=step)
        written = self._write(missing, step=step, beat=beat) if missing > 0 else []
        self._buffer.add(written)
        self._latest = self._buffer.take(len(chosen), step=step)
        self._measure(step=step, written=written, seconds=time.perf_counter() - started)
        rows = dict(zip(chosen, self._latest, strict=True))
        first = self._ranks.rank * (shape.global_batch_size // self._ranks.world_size)
        replaced = []
        for batch in batches:
            size = len(batch.segments)
            places = {place: rows[first + place] for place in range(size) if first + place in rows}
            replaced.append(
                with_rollouts(
                    batch,
                    data=self._samples,
                    places=places,
                    source=self._config.source,
                    sequence_length=shape.sequence_length,
                )
            )
            first += size
        return replaced

    def _write(self, rows: int, *, step: int, beat: Callable[[], None]) -> list[RolloutRow]:
        """New rows; their answers are written by all ranks, contiguous shares of one list."""
        kept, each, policy = rows * self._per_row, self._config.samples_per_prompt, self._config.policy_gradient
        prompts = self._prompts.choose(step=step, count=-(-kept // each))
        # An answer whose fellows were left out would have no baseline.
        count = len(prompts) * each if policy is not None and policy.baseline == "leave_one_out" else kept
        share = -(-count // self._ranks.world_size)
        start = min(self._ranks.rank * share, count)
        own = range(start, min(start + share, count))
        questions = [
            Question(prompts[index // each].ids, seed=(self._shape.seed, _DRAWS_STREAM, step, index)) for index in own
        ]
        answers = self._writer.write(questions, calls=-(-share // self._config.batch_size), beat=beat)
        made = [
            Rollout(
                sample_id=prompts[index // each].sample_id,
                ids=(*prompts[index // each].ids.tolist(), *answer.ids),
                prompt=len(prompts[index // each].ids),
                ended=answer.ended,
                logq=answer.logq,
            )
            for index, answer in zip(own, answers, strict=True)
        ]
        if policy is not None:
            beat()
            made = self._scored(made, share=share)
        rollouts = self._gathered(made, prompts=prompts)
        if policy is not None:
            given = advantages(
                [np.array(rollout.rewards) for rollout in rollouts],
                groups=[index // each for index in range(count)],
                config=policy,
            )
            rollouts = [
                replace(rollout, advantage=tuple(one.tolist())) for rollout, one in zip(rollouts, given, strict=True)
            ]
        size = self._per_row
        return [RolloutRow(tuple(rollouts[place * size : (place + 1) * size]), born=step) for place in range(rows)]

    def _scored(self, rollouts: Sequence[Rollout], *, share: int) -> list[Rollout]:
        """With the reward log p − log q of each token of an answer."""
        logp = teacher_logp(
            rollouts,
            teacher=self._teacher,
            calls=-(-share // self._shape.micro_batch_size),
            micro_batch_size=self._shape.micro_batch_size,
            sequence_length=self._shape.sequence_length,
            chunk_tokens=self._shape.chunk_tokens,
            device=self._device,
        )
        return [
            replace(rollout, rewards=tuple(p - q for p, q in zip(given, rollout.logq, strict=True)))
            for rollout, given in zip(rollouts, logp, strict=True)
        ]

    def _gathered(self, own: Sequence[Rollout], *, prompts: Sequence[Prompt]) -> list[Rollout]:
        """All ranks' rollouts, in the order of the list that was shared out."""
        records = [(rollout.answer, rollout.ended, rollout.logq, rollout.rewards) for rollout in own]
        each, rollouts = self._config.samples_per_prompt, list[Rollout]()
        for answer, ended, logq, rewards in (one for rank in gather_objects(records) for one in rank):
            prompt = prompts[len(rollouts) // each]
            rollouts.append(
                Rollout(
                    sample_id=prompt.sample_id,
                    ids=(*prompt.ids.tolist(), *answer),
                    prompt=len(prompt.ids),
                    ended=ended,
                    logq=tuple(logq),
                    rewards=tuple(rewards),
                )
            )
        return rollouts

    def _measure(self, *, step: int, written: Sequence[RolloutRow], seconds: float) -> None:
        used = self.latest
        figures: dict[str, float] = {"rollout/rows": float(len(self._latest))}
        if used:
            figures["rollout/length"] = float(np.mean([len(rollout.answer) for rollout in used]))
            figures["rollout/ended_frac"] = float(np.mean([rollout.ended for rollout in used]))
            figures["rollout/staleness"] = float(np.mean([step - row.born for row in self._latest]))
        rewards = [reward for rollout in used for reward in rollout.rewards]
        if rewards:
            figures["rollout/reward"] = float(np.mean(rewards))
        figures["rollout/generate_s"] = seconds if written else 0.0
        if written:
            tokens = sum(len(rollout.answer) for row in written for rollout in row.rollouts)
            figures["rollout/tokens_per_s"] = tokens / seconds
        self._metrics = figures
