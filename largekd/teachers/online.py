"""The online teacher: a frozen, sharded model that runs beside the student."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from torch import Tensor

from largekd.contracts import Batch, HiddenSignal, SignalRequest, TeacherSignal
from largekd.engine.frozen import FrozenEngine
from largekd.models.decoder import Decoder
from largekd.sharding.shards import gathered


class OnlineTeacher:
    """Serves last hidden states and the vocabulary head: a full distribution without logits.

    The step's hidden states are computed first, for all micro-batches, and kept (E values a token). With
    `gather_head_once` the head is then gathered once for the step, otherwise around each micro-batch.
    """

    def __init__(self, *, engine: FrozenEngine, decoder: Decoder, gather_head_once: bool) -> None:
        self._engine = engine
        self._decoder = decoder
        self._gather_head_once = gather_head_once

    def check(self, request: SignalRequest) -> None:
        """An online teacher can serve every request."""

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """See Teacher.signals."""
        if not request.distribution:
            yield iter([None] * len(micro_batches))
            return
        # All forwards come before the head is gathered: where it is tied to the embedding, a forward would release it.
        hidden = [self._engine(batch=batch) for batch in micro_batches]
        if self._gather_head_once:
            with gathered(self._decoder.head_parameters):
                yield (self._signal(states) for states in hidden)
        else:
            with closing(self._gathering(hidden)) as signals:
                yield signals

    def _gathering(self, hidden: Sequence[Tensor]) -> Generator[TeacherSignal]:
        for states in hidden:
            with gathered(self._decoder.head_parameters):
                yield self._signal(states)

    def _signal(self, hidden_BSE: Tensor) -> HiddenSignal:
        bias = self._decoder.head_bias
        return HiddenSignal(
            hidden_BSE=hidden_BSE,
            head=self._decoder.head_spec.with_weights(
                weight_VD=self._decoder.head_weight.detach(), bias_V=None if bias is None else bias.detach()
            ),
        )

    def after_step(self) -> None:
        """A frozen teacher does not learn."""

    def close(self) -> None:
        """Remove the engine's hooks."""
        self._engine.close()
