"""The online teacher: a frozen, sharded model that runs beside the student."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from torch import Tensor

from largekd.contracts import (
    Batch,
    HiddenSignal,
    SampledRequest,
    SignalRequest,
    TapSignal,
    TeacherSignal,
    TopKRequest,
    VocabularyHead,
)
from largekd.engine.frozen import FrozenEngine
from largekd.models.decoder import Decoder
from largekd.models.taps import check_layers
from largekd.sharding.shards import gathered
from largekd.teachers.protocol import LearnsNothing
from largekd.teachers.readout import Readout, scored_rows, translated


class OnlineTeacher(LearnsNothing):
    """Serves last hidden states and the vocabulary head (a full distribution without logits), what is read off them
    in a few ids, and captured activations.

    The step's hidden states are computed first, for all micro-batches, and kept (E values a token, and as many for
    each layer that is captured). With `gather_head_once` the head is then gathered once for the step, otherwise around
    each micro-batch. `shared_ids` is the number of ids that both models have; with another tokenizer `student_of_W`
    gives the student's id for each of the teacher's, −1 where it has none.
    """

    def __init__(
        self,
        *,
        engine: FrozenEngine,
        decoder: Decoder,
        gather_head_once: bool,
        shared_ids: int,
        student_of_W: Tensor | None = None,
        rank: int = 0,
    ) -> None:
        self._engine = engine
        self._decoder = decoder
        self._gather_head_once = gather_head_once
        self._shared_ids = shared_ids
        self._student_of_W = student_of_W
        self._rank = rank

    def check(self, request: SignalRequest) -> None:
        """An online teacher can serve every request whose layers it has. Errors: ConfigError names the layer."""
        check_layers(request.taps, model=self._decoder.model, key="teacher")

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """See Teacher.signals."""
        if request.distribution is None and not request.taps:
            yield iter([None] * len(micro_batches))
            return
        # All forwards come before the head is gathered: where it is tied to the embedding, a forward would release it.
        outputs = [self._engine(batch=_own_view(batch), taps=request.taps) for batch in micro_batches]
        if request.distribution is None:
            yield (TapSignal(self._decoder.taps_of(output)) for output in outputs)
        elif self._gather_head_once:
            with gathered(self._decoder.head_parameters):
                yield (
                    self._signal(batch, outputs=output, request=request, place=place)
                    for place, (batch, output) in enumerate(zip(micro_batches, outputs, strict=True))
                )
        else:
            with closing(self._gathering(micro_batches, outputs=outputs, request=request)) as signals:
                yield signals

    def _gathering(
        self, micro_batches: Sequence[Batch], *, outputs: Sequence[Mapping[str, Tensor]], request: SignalRequest
    ) -> Generator[TeacherSignal]:
        for place, (batch, output) in enumerate(zip(micro_batches, outputs, strict=True)):
            with gathered(self._decoder.head_parameters):
                yield self._signal(batch, outputs=output, request=request, place=place)

    def _signal(
        self, batch: Batch, *, outputs: Mapping[str, Tensor], request: SignalRequest, place: int
    ) -> TeacherSignal:
        hidden_BSE, head = outputs["last"], self._head()
        taps = self._decoder.taps_of(outputs)
        hidden_PE = hidden_BSE.reshape(-1, hidden_BSE.shape[-1])
        translation = batch.translation
        match request.distribution:
            case TopKRequest() as wanted if translation is not None:
                assert self._student_of_W is not None
                signal = translated(
                    Readout(hidden_PE, head, head.vocab_size),
                    request=wanted,
                    translation=translation,
                    student_of_W=self._student_of_W,
                    labels_T=batch.labels_BS.reshape(-1)[batch.counted_T],
                )
            case TopKRequest() as wanted:
                signal = Readout(hidden_PE, head, self._shared_ids).top_k(batch.counted_T, request=wanted)
            case SampledRequest() as wanted:
                own = wanted.of_micro_batch(place, rank=self._rank)
                readout = Readout(hidden_PE, head, self._shared_ids)
                return replace(readout.sampled(batch.counted_T, request=own), taps=taps)
            case _ if translation is not None:
                rows_T, present_T = scored_rows(translation)
                return HiddenSignal(hidden_BSE, head, rows_T, present_T.to(hidden_BSE.dtype), taps)
            case _:
                return HiddenSignal(hidden_BSE, head, taps=taps)
        return replace(signal, taps=taps)

    def _head(self) -> VocabularyHead:
        bias = self._decoder.head_bias
        return self._decoder.head_spec.with_weights(
            weight_VD=self._decoder.head_weight.detach(), bias_V=None if bias is None else bias.detach()
        )

    def close(self) -> None:
        """Remove the engine's hooks."""
        self._engine.close()


def _own_view(batch: Batch) -> Batch:
    """The batch in the teacher's tokens."""
    return batch if batch.translation is None else batch.translation.teacher
