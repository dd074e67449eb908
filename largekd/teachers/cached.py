"""The cached teacher: signals from what launch/cache_teacher.py stored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from largekd.contracts import (
    IGNORE_LABEL,
    Batch,
    HiddenSignal,
    SampledRequest,
    SampledSignal,
    SignalRequest,
    Taps,
    TapSignal,
    TeacherSignal,
    TopKRequest,
    TopKSignal,
    VocabularyHead,
)
from largekd.errors import TeacherError
from largekd.teachers.cache_codec import AnyCodec, HiddenCodec, Rows, SampledCodec, TopKCodec
from largekd.teachers.cache_format import CacheReader
from largekd.teachers.cache_taps import StoredLayers, check_taps, names_of, positions_of
from largekd.teachers.protocol import LearnsNothing
from largekd.teachers.readout import Readout

# Where an id that the student lacks was the likeliest; the first entry of a row is never empty.
_UNLIKELY = -1.0e4


class CachedTeacher(LearnsNothing):
    """Reads the records of a step's counted tokens and decodes them on the device.

    A request for the whole distribution (evaluation makes one) is answered with all that is stored: for likeliest ids
    these are all k, with the label among them, so that the teacher's perplexity is its own and not a bound; entropies
    and divergences are those of the kept ids and all others as one outcome. Drawn ids give no figures of the teacher.
    """

    def __init__(
        self,
        *,
        reader: CacheReader,
        codec: AnyCodec,
        head: VocabularyHead | None,
        shared_ids: int,
        reads_tail: bool = True,
        rank: int = 0,
        layers: StoredLayers | None = None,
    ) -> None:
        """Args: head: the teacher's, for hidden states. shared_ids: ids that both models have. reads_tail: whether the
        objective looks at the mass of ids that are not kept. layers: those with captured activations in the cache."""
        assert (head is not None) == isinstance(codec, HiddenCodec)
        self._reader = reader
        self._codec = codec
        self._head = head
        self._shared_ids = shared_ids
        self._reads_tail = reads_tail
        self._rank = rank
        self._layers = layers

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for layers, ids or draws beyond those that are stored, and another temperature."""
        if request.taps:
            check_taps(request.taps, layers=self._layers)
        wanted, codec = request.distribution, self._codec
        if wanted is None or wanted == "full" or isinstance(codec, HiddenCodec):
            return
        if isinstance(wanted, TopKRequest) and isinstance(codec, TopKCodec):
            self._check_top_k(wanted, codec=codec)
        elif isinstance(wanted, SampledRequest) and isinstance(codec, SampledCodec):
            _check_sampled(wanted, codec=codec)
        else:
            kinds = {TopKRequest: "top_k", SampledRequest: "sampled"}
            stored = "top_k" if isinstance(codec, TopKCodec) else "sampled"
            raise TeacherError(
                f"objective.signal.kind = {kinds[type(wanted)]!r}: the cache holds {stored!r}; set "
                f"objective.signal.kind to {stored!r}, or make the cache with that cache.codec."
            )

    def _check_top_k(self, wanted: TopKRequest, *, codec: TopKCodec) -> None:
        if wanted.k > codec.k:
            raise TeacherError(
                f"objective.signal.k = {wanted.k}: the cache holds {codec.k} ids per token; lower it, or make the "
                "cache with a larger cache.codec.k."
            )
        stored = (1.0, *codec.temperatures)
        if self._reads_tail and wanted.temperature not in stored:
            raise TeacherError(
                f"objective.temperature = {wanted.temperature:g}: the cache knows the mass of the other ids at "
                f"{', '.join(f'{t:g}' for t in stored)}; choose one of these, objective.signal.tail=renormalise, or "
                "make the cache with that temperature in cache.codec.temperatures."
            )

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """See Teacher.signals."""
        if request.distribution is None and not request.taps:
            yield iter([None] * len(micro_batches))
            return
        yield (self._signal(batch, request=request, place=place) for place, batch in enumerate(micro_batches))

    @torch.no_grad()
    def _signal(self, batch: Batch, *, request: SignalRequest, place: int) -> TeacherSignal:
        stored, codec = self._stored(batch, request=request), self._codec
        taps = Taps()
        if request.taps:
            assert self._layers is not None
            taps = self._layers.taps(stored, request=request.taps, batch=batch, places_P=positions_of(batch))
        if request.distribution is None:
            return TapSignal(taps)
        rows = _counted({name: stored[name] for name in codec.shapes}, batch=batch)
        match codec:
            case TopKCodec():
                return replace(self._top_k(rows, codec=codec, request=request), taps=taps)
            case SampledCodec():
                return replace(self._sampled(rows, codec=codec, request=request), taps=taps)
        return replace(self._hidden(rows["hidden"], batch=batch, request=request, place=place), taps=taps)

    def _stored(self, batch: Batch, *, request: SignalRequest) -> Rows:
        """The stored rows of the batch's samples, on its device, without waiting for it."""
        segments = [segment for row in batch.segments for segment in row]
        stored = self._reader.rows(
            segments,
            origin=batch.origin,
            records=request.distribution is not None,
            taps=names_of(request.taps),
        )
        device = batch.labels_BS.device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in stored.items()}

    def _top_k(self, rows: Rows, *, codec: TopKCodec, request: SignalRequest) -> TopKSignal:
        found = codec.decode(rows)
        wanted = request.distribution
        temperature = wanted.temperature if isinstance(wanted, TopKRequest) else 1.0
        k = min(wanted.k, codec.k) if isinstance(wanted, TopKRequest) else codec.k
        tail_T = found.tail_T
        # A temperature that is not stored is one whose tail nobody reads.
        tempered_T = found.tempered.get(temperature, tail_T)
        ids_TK, logp_TK = found.ids_TK, found.logp_TK
        if k < codec.k:
            rest_TK = logp_TK[:, k:]
            tail_T = torch.logaddexp(tail_T, torch.logsumexp(rest_TK, dim=-1))
            tempered_T = torch.logaddexp(tempered_T, torch.logsumexp(rest_TK / temperature, dim=-1))
            ids_TK, logp_TK = ids_TK[:, :k], logp_TK[:, :k]
        if self._shared_ids < codec.ids.vocab_size:
            ids_TK, logp_TK = self._shared(ids_TK, logp_TK)
        return TopKSignal(ids_TK, logp_TK, tail_T, tempered_T, vocab_size=self._shared_ids)

    def _shared(self, ids_TK: Tensor, logp_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Without the ids that only the teacher has; their mass, that of unused rows of its head, is left out."""
        known_TK = ids_TK < self._shared_ids
        logp_TK = torch.where(known_TK, logp_TK, float("-inf"))
        logp_TK[:, 0].clamp_(min=_UNLIKELY)
        return torch.where(known_TK, ids_TK, 0), logp_TK

    def _sampled(self, rows: Rows, *, codec: SampledCodec, request: SignalRequest) -> SampledSignal:
        found, wanted, stored = codec.decode(rows), request.distribution, codec.config.draws
        draws = wanted.draws if isinstance(wanted, SampledRequest) else stored
        ids_TK, weight_TK, logp_TK = (tensor[:, :draws] for tensor in found)
        weight_TK = weight_TK * (stored / draws)
        if self._shared_ids < codec.ids.vocab_size:
            known_TK = ids_TK < self._shared_ids
            ids_TK, weight_TK = torch.where(known_TK, ids_TK, 0), torch.where(known_TK, weight_TK, 0.0)
        return SampledSignal(ids_TK, weight_TK, logp_TK, vocab_size=self._shared_ids)

    def _hidden(
        self, hidden_TE: Tensor, *, batch: Batch, request: SignalRequest, place: int
    ) -> HiddenSignal | TopKSignal | SampledSignal:
        assert self._head is not None
        rows, positions = batch.labels_BS.shape
        hidden_PE = hidden_TE.new_zeros((rows * positions, hidden_TE.shape[1]))
        hidden_PE.index_copy_(0, batch.counted_T, hidden_TE)
        readout = Readout(hidden_PE, self._head, min(self._shared_ids, self._head.vocab_size))
        match request.distribution:
            case TopKRequest() as wanted:
                return readout.top_k(batch.counted_T, request=wanted)
            case SampledRequest() as wanted:
                own = wanted.of_micro_batch(place, rank=self._rank)
                return readout.sampled(batch.counted_T, request=own)
        return HiddenSignal(hidden_PE.view(rows, positions, -1), self._head)

    def close(self) -> None:
        """Nothing to release: the maps go with the object."""


def _counted(rows: Rows, *, batch: Batch) -> Rows:
    """Of the rows of all labels those of the counted tokens."""
    (total,) = {len(tensor) for tensor in rows.values()}
    assert batch.counted_T.numel() <= total, "the cache's samples are not these"
    if batch.counted_T.numel() == total:
        return rows
    # Labels without weight are stored and not counted.
    place_P = (batch.labels_BS != IGNORE_LABEL).flatten().cumsum(0) - 1
    chosen_T = place_P[batch.counted_T]
    return {name: tensor.index_select(0, chosen_T) for name, tensor in rows.items()}


def _check_sampled(wanted: SampledRequest, *, codec: SampledCodec) -> None:
    stored = codec.config
    if wanted.draws > stored.draws:
        raise TeacherError(
            f"objective.signal.draws = {wanted.draws}: the cache holds {stored.draws} draws per token; lower it, or "
            "make the cache with more cache.codec.draws."
        )
    for name, key in (("proposal_power", "objective.signal.proposal_power"), ("temperature", "objective.temperature")):
        if getattr(wanted, name) != getattr(stored, name):
            raise TeacherError(
                f"{key} = {getattr(wanted, name):g}: the cache was drawn with {getattr(stored, name):g}; set it so, or "
                f"make the cache with that cache.codec.{name}."
            )
