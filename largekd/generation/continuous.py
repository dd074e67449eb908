"""Writing many answers with one batch whose finished rows are replaced at once.

All rows end at the same column of the cache; new rows' keys and values are computed apart, a pass for prompts of
similar lengths, and put in the places of rows that ended. Near the end the batch shrinks. An answer depends on its
prompt, rule and uniform numbers alone, up to rounding: see `margin` in row_draws.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from largekd.generation.growing_cache import GrowingCache
from largekd.generation.row_draws import Drawn, RowRule, draw_rows
from largekd.generation.writer import StopTokens
from largekd.runtime.ranks import all_sum

# A character may take several tokens, a stop text may begin inside one.
_EXTRA_TOKENS = 4

# Columns of a pass over prompts, in times of the shortest one's tokens.
_FILLED = 1.25


@dataclass(frozen=True)
class Prompt:
    """What is wanted: prompt ids, the rule of its draws, one uniform number for each token of the longest answer."""

    key: str
    ids: NDArray[np.int32]
    rule: RowRule
    uniforms: NDArray[np.float64]
    stop: tuple[str, ...] = ()


class Finished(NamedTuple):
    """Ids without the end token; `tokens` counts it. finish "stop": an end token or a stop text."""

    key: str
    ids: tuple[int, ...]
    tokens: int
    finish: Literal["stop", "length"]
    mean_logp: float
    least_margin: float


@dataclass
class _Row:
    """An answer in the making; `length` columns of the cache are its own."""

    prompt: Prompt
    length: int
    ids: list[int] = field(default_factory=list)
    logp: float = 0.0
    margin: float = float("inf")
    finish: Literal["stop", "length"] | None = None

    def take(self, token: int, *, logp: float, margin: float) -> None:
        self.ids.append(token)
        self.logp += logp
        self.margin = min(self.margin, margin)

    def finished(self, *, ends: tuple[int, ...]) -> Finished:
        assert self.finish is not None
        count = len(self.ids)
        kept = self.ids[:-1] if self.ids[-1] in ends else self.ids
        return Finished(self.prompt.key, tuple(kept), count, self.finish, self.logp / count, self.margin)


class ContinuousWriter:
    """A model that writes up to `batch_size` answers at the same time.

    together: the ranks hold one model in shards, and must make the same calls: they agree before every token, and a
    rank without work goes on with a row that nobody reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stops: StopTokens,
        batch_size: int,
        ids: int,
        decode: Callable[[Sequence[int]], str],
        device: torch.device,
        together: bool,
    ) -> None:
        assert stops.ends
        self._model, self._stops, self.batch_size, self._ids = model, stops, batch_size, ids
        self._decode, self._device, self._together = decode, device, together
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: GrowingCache | None = None
        self._rows: list[_Row | None] = []

    def write(self, prompts: Iterator[Prompt], *, stopping: Callable[[], bool]) -> Iterator[Finished]:
        """Answers in the order in which they end; what is in the making when `stopping` turns true is dropped.

        The iterator is asked for a prompt only when there is a place for it.
        """
        self._cache, self._rows, more = None, [], True
        waiting: list[Prompt] = []
        while True:
            if more and not waiting and self._wants_rows():
                waiting = sorted(_up_to(self._free, prompts), key=lambda prompt: -len(prompt.ids))
                more = len(waiting) == self._free
            new_rows, old_rows, stop = self._agree(bool(waiting), any(self._rows), stopping())
            if stop or not (new_rows or old_rows):
                return
            if new_rows:
                # A pass over shards gathers all weights: as few as can be.
                count = len(waiting) if self._together else _similar(waiting)
                new, waiting = waiting[:count], waiting[count:]
                yield from self._begin(new)
            else:
                self._shrink(more=more)
                yield from self._go_on()

    @property
    def _free(self) -> int:
        return self.batch_size - sum(row is not None for row in self._rows)

    def _wants_rows(self) -> bool:
        """A pass for a single new row costs about as much as one for a few."""
        return self._free >= max(1, self.batch_size // 8)

    def _agree(self, *flags: bool) -> list[bool]:
        if not self._together:
            return list(flags)
        return [bool(count) for count in all_sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def _begin(self, prompts: Sequence[Prompt]) -> Iterator[Finished]:
        """The prompts' keys and values, once for equal prompts, and the first token of each answer."""
        distinct = {prompt.ids.tobytes(): prompt.ids for prompt in prompts} or {b"": np.array([self._stops.fill])}
        lengths = [len(ids) for ids in distinct.values()]
        width = max(lengths)
        ids_BS = np.full((len(lengths), width), self._stops.fill, np.int64)
        for row_S, ids in zip(ids_BS, distinct.values(), strict=True):
            row_S[width - len(ids) :] = ids
        cache = GrowingCache(layers=self._model.config.get_text_config().num_hidden_layers)
        logits_BV = self._forward(ids_BS, lengths=lengths, cache=cache)
        if not prompts:
            return
        if len(distinct) < len(prompts):
            order = {key: place for place, key in enumerate(distinct)}
            copied = [order[prompt.ids.tobytes()] for prompt in prompts]
            cache.keep(copied, columns=width)
            logits_BV = logits_BV[torch.tensor(copied, device=logits_BV.device)]
        places = self._put([_Row(prompt, len(prompt.ids)) for prompt in prompts], cache=cache)
        yield from self._draw(logits_BV, places=places)

    def _put(self, rows: list[_Row], *, cache: GrowingCache) -> list[int]:
        """Give new rows the places of ended ones; the first ones, and those beyond the places, make the batch."""
        if self._cache is None or not any(self._rows):
            self._cache, self._rows = cache, list[_Row | None](rows)
            return list(range(len(rows)))
        width = max(row.length for row in rows)
        if width > self._cache.get_seq_length():
            self._cache.widen(columns=width)
        missing = len(rows) - self._rows.count(None)
        if missing > 0:
            # The batch had shrunk, or never was full: copies of a row make places.
            self._cache.keep([*range(len(self._rows)), *[0] * missing], columns=self._cache.get_seq_length())
            self._rows += [None] * missing
        places = [place for place, row in enumerate(self._rows) if row is None][: len(rows)]
        self._cache.replace(places, source=cache, lengths=[row.length for row in rows])
        for place, row in zip(places, rows, strict=True):
            self._rows[place] = row
        return places

    def _shrink(self, *, more: bool) -> None:
        """Give up places that nobody will take, and columns that no row needs, once they are a quarter."""
        if self._cache is None or not any(self._rows):
            return
        alive = [place for place, row in enumerate(self._rows) if row is not None]
        columns = self._cache.get_seq_length()
        needed = max(row.length for row in self._rows if row is not None)
        few = not more and 4 * len(alive) <= 3 * len(self._rows)
        if few or 4 * needed <= 3 * columns:
            kept = alive if few else list(range(len(self._rows)))
            self._cache.keep(kept, columns=needed)
            self._rows = [self._rows[place] for place in kept]

    def _go_on(self) -> Iterator[Finished]:
        """One more token of every row."""
        if not any(self._rows):
            cache = GrowingCache(layers=self._model.config.get_text_config().num_hidden_layers)
            self._forward(np.full((1, 1), self._stops.fill, np.int64), lengths=[1], cache=cache)
            return
        assert self._cache is not None
        ids = np.full((len(self._rows), 1), self._stops.fill, np.int64)
        for place, row in enumerate(self._rows):
            if row is not None:
                ids[place, 0] = row.ids[-1]
                row.length += 1
        lengths = [1 if row is None else row.length for row in self._rows]
        logits_BV = self._forward(ids, lengths=lengths, cache=self._cache)
        places = [place for place, row in enumerate(self._rows) if row is not None]
        yield from self._draw(logits_BV[torch.tensor(places, device=logits_BV.device)], places=places)

    def _forward(self, ids: NDArray[np.int64], *, lengths: Sequence[int], cache: GrowingCache) -> Tensor:
        """Logits of the last column: (B, V). Positions count from each row's own beginning."""
        new = ids.shape[1]
        columns = cache.get_seq_length() + new
        length_B1 = torch.tensor(lengths)[:, None]
        mask_BS = torch.arange(columns)[None] >= columns - length_B1
        position_BS = (torch.arange(columns - new, columns)[None] - (columns - length_B1)).clamp(min=0)
        extra: dict[str, Any] = {"logits_to_keep": 1} if self._last_only else {}
        with torch.no_grad():
            output = self._model(
                input_ids=torch.from_numpy(ids).to(self._device),
                attention_mask=mask_BS.long().to(self._device),
                position_ids=position_BS.to(self._device),
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _draw(self, logits_BV: Tensor, *, places: Sequence[int]) -> Iterator[Finished]:
        rows = [row for place in places if (row := self._rows[place]) is not None]
        uniforms = [row.prompt.uniforms[len(row.ids)] for row in rows]
        drawn = draw_rows(
            logits_BV,
            rules=[row.prompt.rule for row in rows],
            uniform_B=torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device),
            ids=self._ids,
        )
        for place, row in self._taken(drawn, places=places, rows=rows):
            if row.finish is not None:
                self._rows[place] = None
                yield row.finished(ends=self._stops.ends)

    def _taken(self, drawn: Drawn, *, places: Sequence[int], rows: Sequence[_Row]) -> list[tuple[int, _Row]]:
        ids, logps, margins = drawn.ids_B.tolist(), drawn.logp_B.tolist(), drawn.margin_B.tolist()
        for row, token, logp, margin in zip(rows, ids, logps, margins, strict=True):
            row.take(token, logp=logp, margin=margin)
            if token in self._stops.ends or self._stopped(row):
                row.finish = "stop"
            elif len(row.ids) == len(row.prompt.uniforms):
                row.finish = "length"
        return list(zip(places, rows, strict=True))

    def _stopped(self, row: _Row) -> bool:
        if not row.prompt.stop:
            return False
        longest = max(len(stop.encode()) for stop in row.prompt.stop)
        tail = self._decode(row.ids[-(longest + _EXTRA_TOKENS) :])
        return any(stop in tail for stop in row.prompt.stop)


def _similar(prompts: Sequence[Prompt]) -> int:
    """How many of the first, the longest, one pass takes."""
    return sum(len(prompts[0].ids) <= _FILLED * len(prompt.ids) for prompt in prompts)


def _up_to(count: int, prompts: Iterator[Prompt]) -> list[Prompt]:
    found: list[Prompt] = []
    while len(found) < count and (prompt := next(prompts, None)) is not None:
        found.append(prompt)
    return found
