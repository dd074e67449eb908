"""Asking servers that return log-probabilities of prompts: vLLM and SGLang.

Each sample is a prompt of its own; the likeliest ids at position t of the prompt, which the server gives with the token
at t, are the teacher's signal for the prediction made at t - 1. To learn of the prediction after a sample's last
input token, the prompt ends with that prediction's label, so that a server needs one position more than a row has.

The entries are at temperature 1, and the mass of the ids that are not named is 1 - their sum.
Formats: vLLM's POST /v1/completions (`prompt_logprobs`) and POST /tokenize; SGLang's POST /generate
(`return_logprob`, `top_logprobs_num`) and POST /v1/tokenize, as their documentation and sources describe them.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from largekd.contracts import Batch, Segment, SignalRequest, TeacherSignal, TopKRequest, TopKSignal
from largekd.errors import TeacherError
from largekd.runtime.http import RefusedError, UnavailableError
from largekd.teachers.remote import Answer
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_wire import WireError, check_answer

Entries = list[tuple[int, float]]
"""One position: ids with their log-probabilities, at least the asked number, likeliest first or not."""

_ENTRY_BYTES = 160
_NEVER = -1.0e4
_SLACK_BYTES = 1 << 20
# A server without the endpoint, and one that was started without a tokenizer.
_TELLS_NOTHING = frozenset({400, 404, 405, 500, 501})

logger = logging.getLogger(__name__)


class Dialect(Protocol):
    """How one kind of server is asked."""

    @property
    def path(self) -> str:
        """Where the requests go."""

    @property
    def tokenize_path(self) -> str:
        """Where it tells how it splits a text."""

    def body(self, prompts: Sequence[Sequence[int]], *, k: int) -> dict[str, Any]:
        """The request's JSON."""

    def entries(self, answer: Any, *, prompts: int) -> list[list[Entries | None]]:
        """For each prompt, for each of its tokens, the entries at that token; None for the first.

        Errors: any of KeyError, TypeError, ValueError, IndexError, AttributeError for another format.
        """


@dataclass(frozen=True)
class VLLM:
    """OpenAI's completions with vLLM's prompt_logprobs; the asked token comes besides the `k` likeliest."""

    model: str
    path: str = "/v1/completions"
    tokenize_path: str = "/tokenize"

    def body(self, prompts: Sequence[Sequence[int]], *, k: int) -> dict[str, Any]:
        """See Dialect.body."""
        asked = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        return {"model": self.model, "prompt": [list(prompt) for prompt in prompts], **asked}

    def entries(self, answer: Any, *, prompts: int) -> list[list[Entries | None]]:
        """See Dialect.entries."""
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(prompts)):
            raise ValueError("choices are missing")
        return [
            [
                None if place is None else [(int(name), float(entry["logprob"])) for name, entry in place.items()]
                for place in choice["prompt_logprobs"]
            ]
            for choice in choices
        ]


@dataclass(frozen=True)
class SGLang:
    """SGLang's native endpoint."""

    path: str = "/generate"
    tokenize_path: str = "/v1/tokenize"

    def body(self, prompts: Sequence[Sequence[int]], *, k: int) -> dict[str, Any]:
        """See Dialect.body."""
        asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}
        sampling = {"max_new_tokens": 1, "temperature": 1.0}
        return {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling, **asked}

    def entries(self, answer: Any, *, prompts: int) -> list[list[Entries | None]]:
        """See Dialect.entries."""
        found = answer if isinstance(answer, list) else [answer]
        if len(found) != prompts:
            raise ValueError("answers are missing")
        return [
            [
                None if place is None else [(int(entry[1]), float(entry[0])) for entry in place]
                for place in one["meta_info"]["input_top_logprobs"]
            ]
            for one in found
        ]


class PromptServers:
    """Servers of one dialect; they give the `k` likeliest ids, whatever is asked for.

    tail: what the objective does with the ids that are not kept. evaluation: held-out figures, which ask for the full
    distribution, are taken over the `k` likeliest ids and the mass of the others.
    """

    def __init__(
        self,
        *,
        replicas: Replicas,
        dialect: Dialect,
        k: int,
        tail: Literal["tail", "renormalise", "drop"],
        shared_ids: int,
    ) -> None:
        self._replicas, self._dialect, self._tail, self._shared_ids = replicas, dialect, tail, shared_ids
        self._k = min(k, shared_ids)

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for drawn ids, and for what needs the tail at another temperature than 1."""
        wanted = request.distribution
        if wanted is not None and wanted != "full" and not isinstance(wanted, TopKRequest):
            raise TeacherError(
                "teacher.protocol: servers of prompts give the likeliest ids alone; set objective.signal.kind to top_k."
            )
        if isinstance(wanted, TopKRequest):
            check_temperature((wanted.temperature, wanted.temperature), tail=self._tail)

    def split(self, micro_batches: Sequence[Batch]) -> list[slice]:
        """One request for each micro-batch."""
        return [slice(place, place + 1) for place in range(len(micro_batches))]

    def ask(self, micro_batches: Sequence[Batch], *, request: SignalRequest, place: int) -> list[Answer]:
        """See Source.ask."""
        return [self._ask(batch) for batch in micro_batches]

    def _ask(self, batch: Batch) -> Answer:
        samples = _counted_samples(batch)
        if not samples:
            return self._tensors([])
        prompts = [prompt for _, prompt in samples]
        tokens = sum(map(len, prompts))

        def read(body: bytes) -> Answer:
            try:
                places = self._dialect.entries(json.loads(body), prompts=len(prompts))
                by_position: dict[int, Entries | None] = {}
                for (start, prompt), found in zip(samples, places, strict=True):
                    if len(found) != len(prompt):
                        raise ValueError("positions are missing")
                    by_position |= {start + at: entries for at, entries in enumerate(found[1:])}
                rows = [by_position[position] for position in batch.counted_T.tolist()]
                answer = self._tensors([self._row(entries) for entries in rows])
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
                raise WireError(f"the answer is not in the format of {self._dialect.path} ({error!r})") from error
            check_answer(answer, vocab_size=self._shared_ids)
            return answer

        return self._replicas.ask(
            "POST",
            self._dialect.path,
            read=read,
            max_bytes=tokens * (self._k + 1) * _ENTRY_BYTES + _SLACK_BYTES,
            content=json.dumps(self._dialect.body(prompts, k=self._k)).encode(),
        )

    def _row(self, entries: Entries | None) -> tuple[list[int], list[float]]:
        """The `k` likeliest, likeliest first; ids that the student does not have belong to the tail."""
        if entries is None or len(entries) < self._k:
            raise ValueError(f"fewer than {self._k} ids at a position")
        known = [(place, logp) for place, logp in sorted(entries, key=lambda entry: -entry[1])[: self._k]]
        known = [(place, logp) for place, logp in known if 0 <= place < self._shared_ids]
        ids, logp = [place for place, _ in known], [value for _, value in known]
        unused = (place for place in range(self._shared_ids) if place not in ids)
        missing = self._k - len(ids)
        values = logp + [-math.inf] * missing
        # The first entry of a signal is never empty.
        return ids + [next(unused) for _ in range(missing)], [max(values[0], _NEVER), *values[1:]]

    def _tensors(self, rows: Sequence[tuple[list[int], list[float]]]) -> Answer:
        ids_TK = torch.tensor([ids for ids, _ in rows], dtype=torch.int64).reshape(-1, self._k)
        logp_TK = torch.tensor([logp for _, logp in rows], dtype=torch.float64).reshape(-1, self._k)
        left_T = 1.0 - logp_TK.exp().sum(-1)
        # Rounding may take the mass above 1; much more than that is refused by the check.
        tail_T = left_T.clamp_min(1e-10).log().float()
        return {"ids": ids_TK, "logp": logp_TK.float(), "tail": tail_T, "tempered_tail": tail_T}

    def signal(self, answer: Answer, *, batch: Batch, request: SignalRequest) -> TeacherSignal:
        """See Source.signal."""
        on = {name: tensor.to(batch.input_ids_BS.device, non_blocking=True) for name, tensor in answer.items()}
        return TopKSignal(on["ids"], on["logp"], on["tail"], on["tempered_tail"], vocab_size=self._shared_ids)

    @property
    def failures(self) -> int:
        """See Source.failures."""
        return self._replicas.failures

    def close(self) -> None:
        """See Source.close."""
        self._replicas.close()


def check_temperature(extremes: tuple[float, float], *, tail: Literal["tail", "renormalise", "drop"]) -> None:
    """Errors: TeacherError for a temperature other than 1 where the mass of the other ids is read: the sum over the
    kept ids (`drop`) is of probabilities among all ids too, and the masses are known at temperature 1 alone."""
    if tail == "renormalise" or extremes == (1.0, 1.0):
        return
    low, high = extremes
    found = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    raise TeacherError(
        f"objective.temperature = {found}: servers of prompts do not tell the mass of the other ids at a temperature, "
        f"which objective.signal.tail = {tail} needs; set the temperature to 1, or the tail to renormalise."
    )


def probe_tokenizer(
    replicas: Replicas,
    *,
    path: str,
    text: str,
    expected: Sequence[list[int]],
    model: str | None = None,
    required: bool = True,
) -> None:
    """Compare the tokens of `text` that each server tells at POST `path` with `expected`. Errors: TeacherError.

    expected: without special tokens, and with them, because some releases of SGLang add them whatever is asked.
    required: whether a server that does not tell is an error; else there is a warning.
    """
    asked = {"prompt": text, "add_special_tokens": False} | ({} if model is None else {"model": model})

    def read(body: bytes) -> list[int]:
        try:
            return [int(token) for token in json.loads(body)["tokens"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise WireError(f"POST {path} is not answered in the documented format") from error

    for server in replicas.servers:
        try:
            found = replicas.ask(
                "POST",
                path,
                read=read,
                max_bytes=_SLACK_BYTES,
                content=json.dumps(asked).encode(),
                server=server,
            )
        except (RefusedError, UnavailableError) as error:
            if required or error.status not in _TELLS_NOTHING:
                raise TeacherError(f"teacher.servers: {error}") from error
            logger.warning(
                "teacher.servers: %s does not tell how it splits text (status %s): that its tokenizer is that of "
                "teacher.model could not be checked; with another one the student learns nonsense",
                server,
                error.status,
            )
            continue
        if found not in expected:
            raise TeacherError(
                f"teacher.servers: {server} splits a probe text into other tokens than the tokenizer of teacher.model "
                f"({found[:8]} ... instead of {expected[0][:8]} ...); name the model that it serves."
            )


def _counted_samples(batch: Batch) -> list[tuple[int, list[int]]]:
    """(flat position of its first token, prompt) of each sample that has a counted position."""
    width = batch.input_ids_BS.shape[1]
    ids, labels = batch.input_ids_BS.tolist(), batch.labels_BS.tolist()
    counted = set(batch.counted_T.tolist())
    samples = []
    for row, segments in enumerate(batch.segments):
        for _, offset, length in map(Segment._make, segments):
            start = row * width + offset
            if counted.isdisjoint(range(start, start + length)):
                continue
            inside = ids[row][offset : offset + length]
            # Where the last label does not count nobody looks at its position: any token will do.
            samples.append((start, [*inside, max(labels[row][offset + length - 1], 0)]))
    return samples
