"""Prompts out of training samples: what stands before an answer, or the beginning of a text."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from largekd.data.store import SampleStore
from largekd.errors import DataError

_STREAM = 0x70726F6D  # keeps these draws apart from others of the same seed
_LEAST_TRIES = 10_000


class Prompt(NamedTuple):
    """The id of the sample that it is taken from, and its tokens."""

    sample_id: int
    ids: NDArray[np.int32]


class PromptSource:
    """Prompts of a step, a function of samples, seed, step and number alone."""

    def __init__(self, samples: SampleStore, *, prompt_tokens: int, seed: int) -> None:
        self._samples, self._prompt_tokens, self._seed = samples, prompt_tokens, seed

    def of(self, sample_id: int) -> NDArray[np.int32] | None:
        """The sample's tokens before its last run of labelled ones; of a text whose tokens are all labelled the first
        `prompt_tokens` (fewer where it is shorter). None: it has none, or more than `prompt_tokens`."""
        ids, mask = self._samples.ids(sample_id), self._samples.label_mask(sample_id)
        if mask is None:
            return ids[: min(self._prompt_tokens, len(ids) - 1)]
        labelled = np.flatnonzero(mask)
        if not labelled.size:
            return None
        breaks = np.flatnonzero(np.diff(labelled) > 1)
        start = int(labelled[breaks[-1] + 1] if breaks.size else labelled[0])
        return ids[:start] if 0 < start <= self._prompt_tokens else None

    def choose(self, *, step: int, count: int) -> list[Prompt]:
        """`count` prompts; none twice before the samples are used up.

        Errors: DataError when no prompt is short enough.
        """
        chosen: list[Prompt] = []
        generator = np.random.default_rng((self._seed, _STREAM, step))
        tries, seen = 0, set[int]()
        while len(chosen) < count:
            sample_id = int(generator.integers(len(self._samples)))
            tries += 1
            if sample_id in seen:
                continue
            seen.add(sample_id)
            ids = self.of(sample_id)
            if ids is not None:
                chosen.append(Prompt(sample_id, ids))
            if len(seen) == len(self._samples) or (not chosen and tries >= _LEAST_TRIES):
                if not chosen:
                    raise DataError(
                        f"data.train: none of {len(seen)} samples has a prompt of at most rollouts.prompt_tokens = "
                        f"{self._prompt_tokens} tokens; raise it."
                    )
                seen = set()
        return chosen
