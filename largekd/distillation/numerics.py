"""Finding the rank and the samples behind a step whose gradient was not finite.

In a healthy step nothing here waits for the device: the flags are read only after DeepSpeed has skipped the update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largekd.contracts import Batch
from largekd.generation.batches import written_sample
from largekd.runtime.ranks import gather_objects

_SHOWN_IDS = 16


class GradientWatch:
    """Remembers, per micro-batch, whether the gradient at the student's ends was finite on this rank.

    After the reduction a bad gradient is everywhere, so it has to be caught where it arises: on the way through the
    student's last hidden states and captured activations, and on the way out of the embeddings.
    """

    def __init__(self, *, student: nn.Module, embedding: nn.Module) -> None:
        self._flags: list[Tensor] = []
        self._handles = [module.register_forward_hook(self._watch) for module in (student, embedding)]

    def _watch(self, _module: nn.Module, _inputs: Any, output: Tensor | Mapping[str, Tensor]) -> None:
        for tensor in (output,) if isinstance(output, Tensor) else output.values():
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._flags.append(gradient.isfinite().all()))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> bool:
        """Whether every gradient since the last call was finite; waits for the device."""
        flags, self._flags = self._flags, []
        return all(bool(flag) for flag in flags)

    def forget(self) -> None:
        """Drop the flags of a healthy step."""
        self._flags = []


@dataclass(frozen=True)
class Culprit:
    """A rank whose step was not finite, where it showed first, and the samples it was looking at."""

    rank: int
    where: str
    sample_ids: tuple[int, ...]

    def __str__(self) -> str:
        # One sample may have several rollouts.
        names = list(dict.fromkeys(map(_name, self.sample_ids)))
        shown = ", ".join(names[:_SHOWN_IDS])
        rest = f" and {len(names) - _SHOWN_IDS} more" if len(names) > _SHOWN_IDS else ""
        return f"rank {self.rank} ({self.where}; samples {shown or 'none'}{rest})"


def _name(sample_id: int) -> str:
    source = written_sample(sample_id)
    return str(sample_id) if source is None else f"rollout of sample {source}"


def find_culprits(
    batches: Sequence[Batch], *, losses: Sequence[Tensor], gradients_finite: bool, rank: int
) -> tuple[Culprit, ...]:
    """The ranks where a loss or a gradient was not finite, with the ids of their samples. A collective call.

    The samples are those of the micro-batches whose loss was not finite, or all of the rank's when only the gradient
    was. With no such rank the overflow arose in the update itself.
    """
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not bool(torch.isfinite(loss))]
    report: dict[str, Any] | None = None
    if bad or not gradients_finite:
        chosen = bad or list(batches)
        ids = sorted({i for batch in chosen for i in batch.sample_ids})
        report = {"rank": rank, "where": "loss" if bad else "gradient", "ids": ids}
    return tuple(
        Culprit(rank=r["rank"], where=r["where"], sample_ids=tuple(r["ids"])) for r in gather_objects(report) if r
    )
