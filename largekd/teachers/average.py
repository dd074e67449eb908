"""The exponential moving average of a sharded model's weights, on each rank's own shards.

avg <- d · avg + (1 - d) · w, with w the optimizer's float32 shard. Nothing is gathered: both models have the same
parameters over the same ranks, so that their shards are cut at the same places.

The average is the target's shard, in the compute dtype, plus a float32 remainder. That takes as much memory as a
float32 average beside the shard, and does not stand still where (1 - d) · (w - avg) is below a unit of float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from largekd.errors import CheckpointError
from largekd.sharding.master import drop_whole_copy, master_shard, own_shard
from largekd.sharding.stream import persistent_buffers

_BUFFER = "buffer:"
_REMAINDER = "remainder:"


class ShardAverage:
    """The average of `source`'s weights, kept in the shards of `target` and their remainders.

    The two modules have parameters of the same names and shapes. The average begins as the source's weights, and lives
    where the target's shards do. Persistent buffers are small and whole on every rank: those of floating point are
    averaged, others copied. `updates` counts what was averaged.
    """

    def __init__(self, *, source: nn.Module, target: nn.Module, decay: float, warmup: bool) -> None:
        self._source, self._target = source, target
        self._decay = decay
        self._warmup = warmup
        self.updates = 0
        self._shards = {name: own_shard(parameter) for name, parameter in target.named_parameters()}
        self._shards |= {f"{_BUFFER}{name}": buffer for name, buffer in persistent_buffers(target)}
        self._remainders = {
            name: torch.zeros_like(shard, dtype=torch.float32)
            for name, shard in self._shards.items()
            if shard.is_floating_point()
        }
        self._move(share=1.0)

    @property
    def decay(self) -> float:
        """Share of the average that the next update keeps: with warm-up at most (1 + n) / (10 + n) after n updates."""
        n = self.updates
        return min(self._decay, (1 + n) / (10 + n)) if self._warmup else self._decay

    def update(self) -> None:
        """Move towards the source's weights of this moment. Every rank must call it; nothing is communicated."""
        self._move(share=1.0 - self.decay)
        self.updates += 1

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the average in float64, by name."""
        for name, shard in self._shards.items():
            yield name, shard.double() + self._remainders[name] if name in self._remainders else shard

    def save(self, *, path: Path) -> None:
        """Write this rank's part."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._kept().items()}
        save_file(tensors, path, metadata={"updates": str(self.updates)})

    def load(self, *, path: Path) -> None:
        """Become what was saved by the same rank of as many. Errors: CheckpointError when it does not fit."""
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
                _require_same_tensors(stored, {name: list(v.shape) for name, v in self._kept().items()}, path=path)
                for name, value in self._kept().items():
                    value.copy_(file.get_tensor(name))
                self.updates = _updates(file.metadata(), path=path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: the teacher's average cannot be read ({error}).") from error
        self._forget_whole()

    def _kept(self) -> dict[str, Tensor]:
        return self._shards | {f"{_REMAINDER}{name}": value for name, value in self._remainders.items()}

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        """The source's float32 shards, and its buffers."""
        for name, parameter in self._source.named_parameters():
            yield name, master_shard(parameter)
        for name, buffer in persistent_buffers(self._source):
            yield f"{_BUFFER}{name}", buffer

    @torch.no_grad()
    def _move(self, *, share: float) -> None:
        for name, value in self._current():
            shard, rest = self._shards[name], self._remainders.get(name)
            if rest is None:
                shard.copy_(value)
                continue
            old = shard.to(torch.float32, copy=True)
            rest.add_((value.to(old) - old).sub_(rest), alpha=share)
            shard.copy_(old + rest)
            # Exact: the two differ by less than a unit of the shard's dtype.
            rest.add_(old.sub_(shard))
        self._forget_whole()

    def _forget_whole(self) -> None:
        for parameter in self._target.parameters():
            drop_whole_copy(parameter)


def _require_same_tensors(
    stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, path: Path
) -> None:
    if stored != expected:
        names = {name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name)}
        raise CheckpointError(
            f"{path}: the average has other tensors than this student, such as {min(names)!r}; resume with the "
            "configuration it was saved with, or set run.fresh=true."
        )


def _updates(found: Mapping[str, str] | None, *, path: Path) -> int:
    if not found or not found.get("updates", "").isdecimal():
        raise CheckpointError(f"{path} does not say after how many updates it was saved.")
    return int(found["updates"])
