"""The teacher that a server serves: its ranks take turns at a request's micro-batches, in lock step.

Rank 0 holds the queue of requests and sends each, as the bytes that arrived, to all ranks. Rank r computes the
micro-batches r, r + ranks, ...; a rank that has run out repeats its last, because under ZeRO-3 every rank must run
every forward.
Without a request the ranks meet once a second, so that no collective waits long.
"""

import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from largekd.contracts import Batch, SampledRequest, TopKRequest
from largekd.engine.frozen import FrozenEngine
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks, all_sum
from largekd.sharding.shards import gathered
from largekd.teachers.readout import Readout
from largekd.teachers.remote_wire import (
    Limits,
    Wanted,
    WireError,
    WireRequest,
    decode_request,
    encode_answer,
)

TICK_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A checked request's body, and where its answer goes; cancelled when nobody waits for it any more."""

    body: bytes
    answer: "Future[bytes]"


class ServedTeacher:
    """A sharded teacher that answers wire requests. Its methods are collective calls."""

    def __init__(
        self,
        *,
        engine: FrozenEngine,
        decoder: Decoder,
        limits: Limits,
        model: str,
        ranks: Ranks,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._engine, self._decoder, self._limits, self._model = engine, decoder, limits, model
        self._ranks, self._device, self._group = ranks, device, group

    def head(self) -> dict[str, Tensor]:
        """The whole head on rank 0, empty on the others: `weight`, and `bias` where the family has one."""
        with gathered(self._decoder.head_parameters):
            if not self._ranks.is_main:
                return {}
            named = {"weight": self._decoder.head_weight, "bias": self._decoder.head_bias}
            return {name: one.detach().cpu().clone() for name, one in named.items() if one is not None}

    def serve(self, works: "queue.Queue[Work]", *, stopping: Callable[[], bool]) -> None:
        """Answer what comes through rank 0's queue until a rank is told to stop; what is then left is cancelled."""
        while True:
            work = self._next(works)
            stop, size = self._meet(stop=stopping(), size=0 if work is None else len(work.body))
            if size and not stop:
                parts = self._answer(self._broadcast(None if work is None else work.body, size=size))
                # Nobody may be waiting any more; from here on nobody can leave.
                if work is not None and work.answer.set_running_or_notify_cancel():
                    work.answer.set_result(encode_answer(parts, model=self._model))
            elif work is not None:
                work.answer.cancel()
            if stop:
                break
        while not works.empty():
            works.get_nowait().answer.cancel()

    def _next(self, works: "queue.Queue[Work]") -> Work | None:
        if not self._ranks.is_main:
            return None
        try:
            work = works.get(timeout=TICK_S)
            while work.answer.cancelled():
                work = works.get_nowait()
        except queue.Empty:
            return None
        return work

    def _meet(self, *, stop: bool, size: int) -> tuple[bool, int]:
        """Whether any rank wants to stop, and the length of rank 0's request (0: none)."""
        votes, size = all_sum(torch.tensor([int(stop), size], dtype=torch.int64), group=self._group).tolist()
        return votes > 0, size

    def _broadcast(self, body: bytes | None, *, size: int) -> bytes:
        if not dist.is_initialized():
            assert body is not None
            return body
        buffer = torch.empty(size, dtype=torch.uint8)
        if body is not None:
            buffer = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self._group)
        return buffer.numpy().tobytes()

    def _answer(self, body: bytes) -> dict[str, Tensor]:
        """The answer's tensors on rank 0; nothing on the others."""
        request = decode_request(body, limits=self._limits, vocab_size=self._decoder.head_spec.vocab_size)
        rank, world = self._ranks.rank, self._ranks.world_size
        turns = -(-len(request.batches) // world)
        places = [min(turn * world + rank, len(request.batches) - 1) for turn in range(turns)]
        batches = [request.batches[place].to(device=self._device) for place in places]
        # As online: all forwards come before the head is gathered, which may be the embedding.
        hidden = [self._engine(batch=batch)["last"] for batch in batches]
        with gathered([] if request.wanted == "full" else self._decoder.head_parameters):
            found = [
                self._read(states, batch=batch, request=request, place=place)
                for states, batch, place in zip(hidden, batches, places, strict=True)
            ]
        parts: dict[str, Tensor] = {}
        for turn, mine in enumerate(found):
            for other, theirs in enumerate(self._collect(mine)):
                place = turn * world + other
                if place < len(request.batches):
                    parts |= {f"{place}.{name}": tensor for name, tensor in theirs.items()}
        return parts

    def _read(self, hidden_BSE: Tensor, *, batch: Batch, request: WireRequest, place: int) -> dict[str, Tensor]:
        hidden_PE = hidden_BSE.reshape(-1, hidden_BSE.shape[-1])
        wanted: Wanted = request.wanted
        if wanted == "full":
            return {"hidden": hidden_PE[batch.counted_T]}
        bias = self._decoder.head_bias
        head = self._decoder.head_spec.with_weights(
            weight_VD=self._decoder.head_weight.detach(), bias_V=None if bias is None else bias.detach()
        )
        readout = Readout(hidden_PE, head, request.vocab_size)
        match wanted:
            case TopKRequest():
                kept = readout.top_k(batch.counted_T, request=wanted)
                found = {"ids": kept.ids_TK.int(), "logp": kept.logp_TK}
                return found | {"tail": kept.tail_T, "tempered_tail": kept.tempered_tail_T}
            case SampledRequest(draws=draws, proposal_power=power, temperature=temperature):
                own = SampledRequest(draws, power, temperature, seed=request.seeds[place])
                drawn = readout.sampled(batch.counted_T, request=own)
                return {"ids": drawn.ids_TK.int(), "logp": drawn.logp_TK, "weight": drawn.weight_TK}

    def _collect(self, mine: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Every rank's tensors on rank 0, in order of ranks; the others send theirs."""
        host = {name: tensor.cpu().contiguous() for name, tensor in sorted(mine.items())}
        tokens = self._tokens(next(iter(host.values())).shape[0])
        if not self._ranks.is_main:
            for tensor in host.values():
                if tensor.numel():
                    dist.send(tensor.view(torch.uint8), dst=0, group=self._group)
            return
        yield host
        for other in range(1, self._ranks.world_size):
            theirs = {name: tensor.new_empty((tokens[other], *tensor.shape[1:])) for name, tensor in host.items()}
            for tensor in theirs.values():
                if tensor.numel():
                    dist.recv(tensor.view(torch.uint8), src=other, group=self._group)
            yield theirs

    def _tokens(self, mine: int) -> Sequence[int]:
        """Rows of every rank's tensors."""
        counts = torch.zeros(self._ranks.world_size, dtype=torch.int64)
        counts[self._ranks.rank] = mine
        return [int(count) for count in all_sum(counts, group=self._group)]

    def close(self) -> None:
        """Remove the engine's hooks."""
        self._engine.close()


def checked(body: bytes, *, limits: Limits, vocab_size: int) -> None:
    """Errors: WireError when `body` is no request; what passes is safe to hand to all ranks."""
    if len(body) > limits.body_bytes:
        raise WireError(f"a request has at most {limits.body_bytes} bytes")
    decode_request(body, limits=limits, vocab_size=vocab_size)
