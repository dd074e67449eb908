"""Asking launch/serve_teacher.py: hidden states with the head beside them, likeliest ids, or drawn ids."""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from largekd.contracts import (
    Batch,
    HiddenSignal,
    SampledRequest,
    SampledSignal,
    SignalRequest,
    TeacherSignal,
    TopKRequest,
    TopKSignal,
    VocabularyHead,
)
from largekd.errors import TeacherError
from largekd.runtime.http import RefusedError, UnavailableError
from largekd.teachers.remote import Answer
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_wire import (
    CONTENT_TYPE,
    MAX_MICRO_BATCHES,
    PROTOCOL,
    WireError,
    WireRequest,
    check_wanted,
    decode_answer,
    encode_request,
)

_INFO_BYTES = 1 << 16
_SLACK_BYTES = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class HeadInfo(_Record):
    """The vocabulary head's file, and the constants of its formula."""

    vocab_size: int = Field(ge=1)
    scale: float
    softcap: float | None
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ServerInfo(_Record):
    """What GET /v1/info tells of a served teacher."""

    protocol: int
    model: str = Field(min_length=1)
    tokenizer: str
    vocab_size: int = Field(ge=1)
    width: int = Field(ge=1)
    dtype: str
    positions: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    head: HeadInfo


@dataclass(frozen=True)
class Expected:
    """What the run knows of the teacher that must be behind the servers; `rows`: of its largest micro-batch."""

    tokenizer: str
    vocab_size: int
    shared_ids: int
    sequence_length: int
    rows: int


def read_info(replicas: Replicas, *, expected: Expected) -> ServerInfo:
    """What all servers agree on and the run expects. Errors: TeacherError, for a server that cannot be reached too."""
    infos: dict[str, ServerInfo] = {}
    for server in replicas.servers:
        try:
            infos[server] = replicas.ask("GET", "/v1/info", read=_info, max_bytes=_INFO_BYTES, server=server)
        except (RefusedError, UnavailableError) as error:
            raise TeacherError(f"teacher.servers: {error}") from error
    first = next(iter(infos.values()))
    for server, info in infos.items():
        if info != first:
            raise TeacherError(f"teacher.servers: {server} serves another teacher than {replicas.servers[0]}.")
    for what, found, wanted in (
        ("vocabulary size", first.vocab_size, expected.vocab_size),
        ("tokenizer", first.tokenizer, expected.tokenizer),
    ):
        if found != wanted:
            raise TeacherError(
                f"teacher.servers: {replicas.servers[0]} has {what} {found}, teacher.model has {wanted}; name the "
                "model that the server was started with."
            )
    if first.sequence_length < expected.sequence_length:
        raise TeacherError(
            f"train.sequence_length = {expected.sequence_length}: the server takes rows of up to "
            f"{first.sequence_length}; lower it, or start the server with a longer train.sequence_length."
        )
    positions = expected.rows * expected.sequence_length
    if first.positions < positions:
        raise TeacherError(
            f"train.micro_batch_size or eval.micro_batch_size = {expected.rows}: with rows of train.sequence_length = "
            f"{expected.sequence_length} these are {positions} positions, and the server takes up to "
            f"{first.positions} in a request; lower it, or start the server with --positions {positions}."
        )
    return first


def fetch_head(replicas: Replicas, *, info: ServerInfo, folder: Path) -> Path:
    """The head's file in `folder`, downloaded unless it is there and whole; several hosts may do so at once.

    Errors: TeacherError.
    """
    path = folder / f"teacher_head-{info.head.sha256[:16]}.safetensors"
    temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        if _is_whole(path, head=info.head):
            return path
        try:
            _download_head(replicas, head=info.head, target=temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (RefusedError, UnavailableError) as error:
        raise TeacherError(f"teacher.servers: {error}") from error
    except OSError as error:
        raise TeacherError(f"{path}: the teacher's vocabulary head could not be kept there ({error}).") from error
    return path


def _is_whole(path: Path, *, head: HeadInfo) -> bool:
    """Whether the file is there with the right bytes: a disk or a crash may have left others under its name."""
    if not path.exists() or path.stat().st_size != head.bytes:
        return False
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == head.sha256


def _download_head(replicas: Replicas, *, head: HeadInfo, target: Path) -> None:
    digest = hashlib.sha256()
    with open(target, "xb") as stream:

        def write(piece: bytes) -> None:
            digest.update(piece)
            stream.write(piece)

        replicas.download("/v1/head", write=write, size=head.bytes)
        stream.flush()
        os.fsync(stream.fileno())
    if digest.hexdigest() != head.sha256:
        raise TeacherError("teacher.servers: the vocabulary head arrived damaged; start again.")


def read_head(path: Path, *, info: ServerInfo, device: torch.device) -> VocabularyHead:
    """The whole head on `device`: every rank holds it. Errors: TeacherError."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"{path}: the teacher's vocabulary head cannot be read ({error}).") from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or weight.shape[0] < info.head.vocab_size or weight.shape[1] != info.width:
        raise TeacherError(f"{path}: not the head that the server described; remove the file.")
    return VocabularyHead(
        weight_VD=weight.to(device),
        vocab_size=info.head.vocab_size,
        bias_V=None if bias is None else bias.to(device),
        scale=info.head.scale,
        softcap=info.head.softcap,
    )


class OwnServers:
    """Servers of `launch/serve_teacher.py`. A step is one request, or several where a server's limit asks for it or
    several servers can share it. An answer of other weights than those of the start is refused."""

    def __init__(
        self, *, replicas: Replicas, info: ServerInfo, head: VocabularyHead, shared_ids: int, rank: int = 0
    ) -> None:
        self._replicas, self._info, self._head = replicas, info, head
        self._shared_ids, self._rank = shared_ids, rank

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for more ids a position than a server sends."""
        if request.distribution is None:
            return
        try:
            check_wanted(request.distribution)
        except WireError as error:
            raise TeacherError(f"objective.signal: the teacher's servers refuse it: {error}.") from error

    def split(self, micro_batches: Sequence[Batch]) -> list[slice]:
        """See Source.split."""
        share = min(-(-len(micro_batches) // len(self._replicas.servers)), MAX_MICRO_BATCHES)
        parts, start, positions = [], 0, 0
        for place, batch in enumerate(micro_batches):
            size = batch.input_ids_BS.numel()
            if place > start and (positions + size > self._info.positions or place - start == share):
                parts.append(slice(start, place))
                start, positions = place, 0
            positions += size
        return [*parts, slice(start, len(micro_batches))]

    def ask(self, micro_batches: Sequence[Batch], *, request: SignalRequest, place: int) -> list[Answer]:
        """See Source.ask."""
        assert request.distribution is not None
        wanted = request.distribution
        wire = WireRequest(
            batches=tuple(micro_batches),
            wanted=wanted,
            vocab_size=self._shared_ids,
            seeds=self._seeds(wanted, place=place, count=len(micro_batches)),
        )

        def read(body: bytes) -> list[Answer]:
            model, answers = decode_answer(body, request=wire, width=self._info.width, dtype=self._info.dtype)
            if model != self._info.model:
                raise RefusedError(
                    f"the server now serves another teacher ({model[:12]}) than the run began with "
                    f"({self._info.model[:12]}); start it with the former weights"
                )
            return answers

        return self._replicas.ask(
            "POST",
            "/v1/signals",
            read=read,
            max_bytes=self._answer_bytes(wire),
            content=encode_request(wire),
            content_type=CONTENT_TYPE,
        )

    def signal(self, answer: Answer, *, batch: Batch, request: SignalRequest) -> TeacherSignal:
        """See Source.signal."""
        device = batch.input_ids_BS.device
        on = {name: tensor.to(device, non_blocking=True) for name, tensor in answer.items()}
        match request.distribution:
            case TopKRequest():
                return TopKSignal(on["ids"], on["logp"], on["tail"], on["tempered_tail"], vocab_size=self._shared_ids)
            case SampledRequest():
                return SampledSignal(on["ids"], on["weight"], on["logp"], vocab_size=self._shared_ids)
        return HiddenSignal(_in_place(on["hidden"], batch=batch), self._head)

    @property
    def failures(self) -> int:
        """See Source.failures."""
        return self._replicas.failures

    def close(self) -> None:
        """See Source.close."""
        self._replicas.close()

    def _seeds(self, wanted: Any, *, place: int, count: int) -> tuple[int, ...]:
        """The same as an online teacher's on this rank."""
        if not isinstance(wanted, SampledRequest):
            return ()
        return tuple(wanted.of_micro_batch(place + index, rank=self._rank).seed for index in range(count))

    def _answer_bytes(self, wire: WireRequest) -> int:
        tokens = sum(batch.counted_T.numel() for batch in wire.batches)
        match wire.wanted:
            case TopKRequest(k=k):
                per_token = 8 * k + 8
            case SampledRequest(draws=draws):
                per_token = 12 * draws
            case _:
                per_token = 4 * self._info.width
        return tokens * per_token + _SLACK_BYTES


def _in_place(hidden_TE: Tensor, *, batch: Batch) -> Tensor:
    """(B, S, E) with the received states at the counted positions and zeros elsewhere, which nobody reads."""
    rows, positions = batch.input_ids_BS.shape
    hidden_PE = hidden_TE.new_zeros(rows * positions, hidden_TE.shape[-1])
    return hidden_PE.index_copy_(0, batch.counted_T, hidden_TE).view(rows, positions, -1)


def _info(body: bytes) -> ServerInfo:
    try:
        info = ServerInfo.model_validate(json.loads(body))
    except (ValidationError, ValueError, RecursionError) as error:
        raise WireError(
            f"GET /v1/info is not answered as launch/serve_teacher.py does ({type(error).__name__})"
        ) from error
    if info.protocol != PROTOCOL:
        raise RefusedError(f"the server speaks protocol {info.protocol}, this client {PROTOCOL}: use one version")
    return info
