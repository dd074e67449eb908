"""What a remote teacher and its client send each other: safetensors with JSON metadata, checked on both sides.

A request holds the micro-batches of a step, each in its own shape, and what is wanted at their counted positions; the
answer holds that and nothing else. Nothing here is code: a body is numbers and names.

Tensors of a request, per micro-batch i: `i.input_ids` (B, S), `i.position_ids` (packed rows) or `i.attention_mask`
(padded rows) (B, S), `i.counted` (T), all int32. Of an answer: `i.hidden` (T, E); or `i.ids` int32 and `i.logp` (T, K)
with `i.tail` and `i.tempered_tail` (T); or `i.ids`, `i.logp` and `i.weight` (T, K).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from largekd.contracts import Batch, SampledRequest, TopKRequest

PROTOCOL = 1
CONTENT_TYPE = "application/vnd.largekd.safetensors"
MAX_KEPT = 4096
MAX_MICRO_BATCHES = 1024
_HEADER_LIMIT_BYTES = 1 << 20
_METADATA_KEY = "largekd"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MASS_SLACK = 1e-3

Wanted = Literal["full"] | TopKRequest | SampledRequest


class WireError(ValueError):
    """A body that does not say what the protocol allows; the message is fit for the other side."""


class Limits(NamedTuple):
    """The most that one request may ask for: positions (rows x columns) over all micro-batches, columns of a row."""

    positions: int
    sequence_length: int

    @property
    def body_bytes(self) -> int:
        """Three int32 per position, and the header."""
        return 12 * self.positions + _HEADER_LIMIT_BYTES


@dataclass(frozen=True)
class WireRequest:
    """Micro-batches and what is wanted of each; `vocab_size` ids from 0 on take part in sparse answers.

    seeds: of the draws, one for each micro-batch; empty where nothing is drawn.
    """

    batches: tuple[Batch, ...]
    wanted: Wanted
    vocab_size: int
    seeds: tuple[int, ...] = ()


def check_wanted(wanted: Wanted) -> None:
    """Errors: WireError for what every server refuses, such as more than MAX_KEPT ids a position."""
    _wanted(_describe(wanted))


def encode_request(request: WireRequest) -> bytes:
    """The body of POST /v1/signals."""
    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(request.batches):
        layout = "attention_mask" if batch.position_ids_BS is None else "position_ids"
        values = batch.attention_mask_BS if batch.position_ids_BS is None else batch.position_ids_BS
        assert values is not None
        tensors[f"{place}.input_ids"] = batch.input_ids_BS
        tensors[f"{place}.{layout}"] = values
        tensors[f"{place}.counted"] = batch.counted_T
    about = {
        "protocol": PROTOCOL,
        "wanted": _describe(request.wanted),
        "vocab_size": request.vocab_size,
        "seeds": list(request.seeds),
    }
    whole = {name: tensor.to("cpu", torch.int32).contiguous() for name, tensor in tensors.items()}
    return save(whole, metadata={_METADATA_KEY: json.dumps(about)})


def decode_request(body: bytes, *, limits: Limits, vocab_size: int) -> WireRequest:
    """The request in a body; `vocab_size` is the model's. Errors: WireError."""
    about, shapes = _read_header(body)
    wanted = _wanted(about.get("wanted"))
    shared = _integer(about, "vocab_size", low=1, high=vocab_size)
    count = _check_layout(shapes, limits=limits)
    seeds = about.get("seeds")
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise WireError("seeds must be a list of integers from 0 to 2^63 - 1")
    if len(seeds) != (count if isinstance(wanted, SampledRequest) else 0):
        raise WireError("seeds must hold one number for each micro-batch that is drawn for")
    tensors = _load(body)
    batches = tuple(_batch(tensors, place=place, vocab_size=vocab_size) for place in range(count))
    return WireRequest(batches=batches, wanted=wanted, vocab_size=shared, seeds=tuple(seeds))


def encode_answer(parts: Mapping[str, Tensor], *, model: str) -> bytes:
    """The answer to a request; `model` is the digest of the weights that gave it."""
    about = {"protocol": PROTOCOL, "model": model}
    whole = {name: tensor.to("cpu").contiguous() for name, tensor in parts.items()}
    return save(whole, metadata={_METADATA_KEY: json.dumps(about)})


def decode_answer(body: bytes, *, request: WireRequest, width: int, dtype: str) -> tuple[str, list[dict[str, Tensor]]]:
    """The digest of the answering weights, and the tensors of each micro-batch, `ids` as int64.

    width, dtype: of hidden states. Errors: WireError for anything that cannot be a teacher's answer to `request`.
    """
    about, shapes = _read_header(body)
    model = about.get("model")
    if not isinstance(model, str):
        raise WireError("the answer does not name its model")
    expected = {}
    for place, batch in enumerate(request.batches):
        for name, (kind, columns) in _answer_schema(request, width=width, dtype=dtype).items():
            tokens = batch.counted_T.numel()
            expected[f"{place}.{name}"] = (kind, [tokens] if columns is None else [tokens, columns])
    if shapes != expected:
        raise WireError(f"the answer's tensors are {_brief(shapes)} instead of {_brief(expected)}")
    tensors = _load(body)
    answers = []
    for place in range(len(request.batches)):
        prefix = f"{place}."
        answer = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        if "ids" in answer:
            answer["ids"] = answer["ids"].long()
        check_answer(answer, vocab_size=request.vocab_size)
        answers.append(answer)
    return model, answers


def check_answer(answer: Mapping[str, Tensor], *, vocab_size: int) -> None:
    """Errors: WireError for numbers that are no distribution over `vocab_size` ids, or no hidden states."""
    if "hidden" in answer:
        if not bool(answer["hidden"].isfinite().all()):
            raise WireError("hidden states are not finite")
        return
    ids_TK, logp_TK = answer["ids"], answer["logp"]
    if ids_TK.numel() == 0:
        return
    if int(ids_TK.min()) < 0 or int(ids_TK.max()) >= vocab_size:
        raise WireError(f"an id is not from 0 to {vocab_size - 1}")
    if bool(logp_TK.isnan().any()) or float(logp_TK.max()) > _MASS_SLACK:
        raise WireError("a log-probability is not a number, or above 0")
    if "weight" in answer:
        weight_TK = answer["weight"]
        if not bool((weight_TK.isfinite() & (weight_TK >= 0) & logp_TK.isfinite()).all()):
            raise WireError("a drawn id has no finite weight or log-probability")
        return
    tails = torch.stack([answer["tail"], answer["tempered_tail"]])
    if bool(tails.isnan().any()) or bool((tails == math.inf).any()):
        raise WireError("a tail is not a number")
    mass_T = logp_TK.exp().sum(-1) + answer["tail"].exp()
    if not bool(logp_TK[:, 0].isfinite().all()) or float(mass_T.max()) > 1.0 + _MASS_SLACK:
        raise WireError("probabilities sum to more than 1, or the first of a position is 0")
    if ids_TK.shape[1] > 1 and bool((ids_TK.sort(-1).values.diff(dim=-1) == 0).any()):
        raise WireError("an id occurs twice at one position")


def _answer_schema(request: WireRequest, *, width: int, dtype: str) -> dict[str, tuple[str, int | None]]:
    """Name -> (dtype, columns); None: one number a token."""
    match request.wanted:
        case TopKRequest(k=k):
            kept = min(k, request.vocab_size)
            return {"ids": ("I32", kept), "logp": ("F32", kept), "tail": ("F32", None), "tempered_tail": ("F32", None)}
        case SampledRequest(draws=draws):
            return {"ids": ("I32", draws), "logp": ("F32", draws), "weight": ("F32", draws)}
    return {"hidden": (dtype, width)}


def _read_header(body: bytes) -> tuple[dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """Metadata of ours, and dtype and shape by name; nothing is allocated for the tensors."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(_HEADER_LIMIT_BYTES, len(body) - 8):
        raise WireError("the body is not safetensors, is cut short, or has too long a header")
    try:
        header = json.loads(body[8 : 8 + size])
        metadata = header.pop("__metadata__")
        about = json.loads(metadata[_METADATA_KEY])
        shapes = {str(name): (str(entry["dtype"]), list(entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError("the header is not that of this protocol") from error
    if not isinstance(about, dict) or about.get("protocol") != PROTOCOL:
        raise WireError(f"protocol {PROTOCOL} is spoken here")
    return about, shapes


def _load(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise WireError(f"the tensors cannot be read ({type(error).__name__})") from error


def _check_layout(shapes: Mapping[str, tuple[str, list[int]]], *, limits: Limits) -> int:
    """The number of micro-batches. Errors: WireError for names, dtypes, shapes and sizes."""
    count, positions = sum(name.endswith(".input_ids") for name in shapes), 0
    if not 1 <= count <= MAX_MICRO_BATCHES or len(shapes) != 3 * count:
        raise WireError("each micro-batch has input_ids, counted, and one of position_ids and attention_mask")
    for place in range(count):
        layout = "position_ids" if f"{place}.position_ids" in shapes else "attention_mask"
        try:
            ids, other, counted = (shapes[f"{place}.{name}"] for name in ("input_ids", layout, "counted"))
        except KeyError as error:
            raise WireError(f"{error.args[0]} is missing") from error
        if {kind for kind, _ in (ids, other, counted)} != {"I32"}:
            raise WireError("all tensors must be int32")
        if len(ids[1]) != 2 or min(ids[1]) < 1 or other[1] != ids[1] or len(counted[1]) != 1:
            raise WireError(f"micro-batch {place}: the shapes do not fit each other")
        if ids[1][1] > limits.sequence_length:
            raise WireError(f"rows have at most {limits.sequence_length} positions here, not {ids[1][1]}")
        positions += math.prod(ids[1])
        if counted[1][0] > math.prod(ids[1]):
            raise WireError(f"micro-batch {place} counts more positions than it has")
    if positions > limits.positions:
        raise WireError(f"a request has at most {limits.positions} positions here, not {positions}")
    return count


def _batch(tensors: Mapping[str, Tensor], *, place: int, vocab_size: int) -> Batch:
    ids_BS, counted_T = tensors[f"{place}.input_ids"].long(), tensors[f"{place}.counted"].long()
    positions_BS, mask_BS = tensors.get(f"{place}.position_ids"), tensors.get(f"{place}.attention_mask")
    if int(ids_BS.min()) < 0 or int(ids_BS.max()) >= vocab_size:
        raise WireError(f"an input id is not from 0 to {vocab_size - 1}")
    increasing = bool((counted_T.diff() > 0).all())
    if counted_T.numel() and (not increasing or int(counted_T[0]) < 0 or int(counted_T[-1]) >= ids_BS.numel()):
        raise WireError("counted positions must increase and lie within the rows")
    if positions_BS is not None:
        steps_BS = positions_BS[:, 1:]
        if bool((positions_BS[:, 0] != 0).any()) or bool(((steps_BS != 0) & (positions_BS.diff(dim=1) != 1)).any()):
            raise WireError("position_ids must start at 0 and go up by one or start again")
    if mask_BS is not None and (bool(((mask_BS != 0) & (mask_BS != 1)).any()) or bool((mask_BS.sum(-1) == 0).any())):
        raise WireError("attention_mask must be of 0 and 1, with a 1 in every row")
    return Batch(
        input_ids_BS=ids_BS,
        labels_BS=torch.zeros_like(ids_BS),
        token_weight_BS=torch.ones(ids_BS.shape),
        counted_T=counted_T,
        attention_mask_BS=None if mask_BS is None else mask_BS.long(),
        position_ids_BS=None if positions_BS is None else positions_BS.long(),
    )


def _describe(wanted: Wanted) -> dict[str, Any]:
    match wanted:
        case TopKRequest(k=k, temperature=temperature):
            return {"kind": "top_k", "k": k, "temperature": temperature}
        case SampledRequest(draws=draws, proposal_power=power, temperature=temperature):
            return {"kind": "sampled", "draws": draws, "proposal_power": power, "temperature": temperature}
    return {"kind": "hidden"}


def _wanted(described: Any) -> Wanted:
    match sorted(described) if isinstance(described, dict) else None, described:
        case ["kind"], {"kind": "hidden"}:
            return "full"
        case ["k", "kind", "temperature"], {"kind": "top_k"}:
            return TopKRequest(_integer(described, "k", low=1, high=MAX_KEPT), _number(described, "temperature"))
        case ["draws", "kind", "proposal_power", "temperature"], {"kind": "sampled"}:
            power = _number(described, "proposal_power")
            if power > 1:
                raise WireError("proposal_power must be at most 1")
            draws = _integer(described, "draws", low=1, high=MAX_KEPT)
            return SampledRequest(draws, power, _number(described, "temperature"))
    raise WireError("wanted must be of kind hidden, top_k (k, temperature) or sampled (draws, proposal_power, ...)")


def _integer(about: Mapping[str, Any], name: str, *, low: int, high: int) -> int:
    value = about.get(name)
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"{name} must be an integer from {low} to {high}")
    return value


def _number(about: Mapping[str, Any], name: str) -> float:
    value = about[name]
    if type(value) not in (int, float) or not 1e-3 <= value <= 1e3:
        raise WireError(f"{name} must be a number from 0.001 to 1000")
    return float(value)


def _brief(shapes: Mapping[str, Sequence[Any]]) -> str:
    first = [f"{name} {kind} {shape}" for name, (kind, shape) in list(shapes.items())[:3]]
    return f"{len(shapes)} ({', '.join(first)}{', ...' if len(shapes) > 3 else ''})"
