"""How a token's signal becomes bytes: fixed-width records, a few tensors with one row for each token.

Shape letters: T tokens, C tokens of one chunk, K kept entries, W teacher ids, E teacher width.

An id is a 16-bit plane and what is above it, in base ⌈W / 65536⌉ and as many digits to a byte as fit: 18 bits of a
vocabulary of 151,936 cost 17.6. Log-probabilities l₁ ≥ l₂ ≥ … of likeliest ids are stored as follows: l₁, l₂ and the
log of the remaining mass in steps of 1/2048 from 0 to −32, and the others relative to l₂ in 255 levels of
u = exp((l − l₂) / 4), which is level n at 1 − n / 254.5. The step is 1/64 nat beside l₂, 1/4 of a nat 11 nats below:
a divergence weighs the relative error of a probability with the probability. Σ exp is then l₂'s probability times Σ u⁴,
so that the decoder can make all of them sum to one without exponentials.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from largekd.config.cache import CodecConfig, HiddenCodecConfig, SampledCodecConfig, TopKCodecConfig
from largekd.contracts import SampledRequest
from largekd.teachers.readout import Readout

LINEAR_STEPS = 2048
"""Levels of one nat of l₁, l₂ and the remaining mass."""

TEMPERED_STEPS = 1024
"""Levels of one nat of log Σ_tail p^(1/T), which lies between −32 and 32."""

LEVELS = 254.5
"""u = 1 − level / 254.5; level 255 is −inf."""

_SIGN = 32768
_BLOCK_TOKENS = 512
_EMPTY = 65535

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class IdPlanes:
    """Ids below `vocab_size` in `low` (T, K) int16 and `high` (T, bytes) uint8, which may have no column."""

    vocab_size: int
    count: int

    @property
    def base(self) -> int:
        """Values of an id's part above 16 bits."""
        return -(-self.vocab_size // 65536)

    @property
    def digits(self) -> int:
        """Digits in one byte; 0: a digit takes several bytes, or there is none."""
        base = self.base
        return 0 if not 2 <= base <= 256 else max(d for d in range(1, 9) if base**d <= 256)

    @property
    def high_bytes(self) -> int:
        """Columns of `high`."""
        if self.base == 1:
            return 0
        return -(-self.count // self.digits) if self.digits else self.count * self._bytes_each

    @property
    def _bytes_each(self) -> int:
        return -(-(self.base - 1).bit_length() // 8)

    def encode(self, ids_TK: Tensor) -> Rows:
        """`low` and `high` of int64 ids."""
        assert ids_TK.shape[1] == self.count
        low_TK = ((ids_TK & 0xFFFF) - _SIGN).to(torch.int16)
        above_TK = ids_TK >> 16
        if self.base == 1:
            return {"low": low_TK, "high": above_TK.new_empty((len(ids_TK), 0), dtype=torch.uint8)}
        if self.digits:
            padded = torch.nn.functional.pad(above_TK, (0, self.high_bytes * self.digits - self.count))
            powers = self.base ** torch.arange(self.digits, device=ids_TK.device)
            high = (padded.unflatten(1, (self.high_bytes, self.digits)) * powers).sum(-1)
        else:
            shifts = 8 * torch.arange(self._bytes_each, device=ids_TK.device)
            high = ((above_TK[..., None] >> shifts) & 0xFF).flatten(1)
        return {"low": low_TK, "high": high.to(torch.uint8)}

    def table(self, *, device: torch.device) -> Tensor | None:
        """What `decode` looks up: for each byte its digits, times 65536, and what brings `low` back to 0 … 65535."""
        if not self.digits:
            return None
        powers = self.base ** torch.arange(self.digits)
        digits = torch.arange(256)[:, None] // powers % self.base
        return (digits * 65536 + _SIGN).to(device)

    def decode(self, rows: Mapping[str, Tensor], *, table: Tensor | None) -> Tensor:
        """int64 ids (T, K)."""
        ids_TK = rows["low"].long()
        if table is not None:
            above = table.index_select(0, rows["high"].flatten().int())
            return ids_TK.add_(above.view(len(ids_TK), -1)[:, : self.count])
        if self.base > 1:
            parts = rows["high"].long().unflatten(1, (self.count, self._bytes_each))
            for place in range(self._bytes_each):
                ids_TK += parts[..., place] << (16 + 8 * place)
        return ids_TK.add_(_SIGN)


class TopKRows(NamedTuple):
    """Decoded entries, normalised: Σ exp(logp) + exp(tail) = 1. `tempered`: log Σ_tail p^(1/T) by temperature."""

    ids_TK: Tensor
    logp_TK: Tensor
    tail_T: Tensor
    tempered: Mapping[float, Tensor]


class DrawnRows(NamedTuple):
    """Decoded draws; weight_TK are importance weights, see SampledSignal."""

    ids_TK: Tensor
    weight_TK: Tensor
    logp_TK: Tensor


class Codec(Protocol):
    """Bytes of one token's signal."""

    @property
    def shapes(self) -> Mapping[str, tuple[torch.dtype, int]]:
        """Dtype and width of each tensor of a shard."""

    def encode(self, readout: Readout, rows_T: Tensor, *, labels_T: Tensor, seed: int) -> Rows:
        """Records of the rows of `readout`. `finite` (T,) says whether the teacher's figures were numbers."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a record."""


class _Codec:
    shapes: Mapping[str, tuple[torch.dtype, int]]

    @property
    def token_bytes(self) -> int:
        return sum(dtype.itemsize * width for dtype, width in self.shapes.values())


class TopKCodec(_Codec):
    """`k` ids; where k > 1 the last of them is the label if it is none of the likeliest."""

    def __init__(self, config: TopKCodecConfig, *, vocab_size: int) -> None:
        self.k = min(config.k, vocab_size)
        self.temperatures = tuple(sorted({t for t in config.temperatures if t != 1.0}))
        self.ids = IdPlanes(vocab_size, self.k)
        self._exact = min(self.k, 2)
        self._table: Tensor | None = None
        self.shapes = {
            "low": (torch.int16, self.k),
            "high": (torch.uint8, self.ids.high_bytes),
            "exact": (torch.int16, self._exact + 1),
            "levels": (torch.uint8, self.k - self._exact),
            "tempered": (torch.int16, len(self.temperatures)),
        }

    def encode(self, readout: Readout, rows_T: Tensor, *, labels_T: Tensor, seed: int) -> Rows:
        """See Codec.encode."""
        parts = [
            self.encode_chunk(logp_CW, labels_C=labels_T[span]) for span, logp_CW in readout.log_probabilities(rows_T)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def encode_chunk(self, logp_CW: Tensor, *, labels_C: Tensor) -> Rows:
        """Records of a few tokens' log-probabilities, which are overwritten."""
        logp_CK, ids_CK = logp_CW.topk(self.k, dim=-1)
        if self.k > 1:
            known_C = ids_CK.eq(labels_C[:, None]).any(-1)
            label_logp_C = logp_CW.gather(-1, labels_C[:, None]).squeeze(-1)
            ids_CK[:, -1] = torch.where(known_C, ids_CK[:, -1], labels_C)
            logp_CK[:, -1] = torch.where(known_C, logp_CK[:, -1], label_logp_C)
        rest_CW = logp_CW.scatter_(-1, ids_CK, float("-inf"))
        tail_C = torch.logsumexp(rest_CW, dim=-1)
        tempered = [torch.logsumexp(rest_CW / t, dim=-1) for t in self.temperatures]
        exact = torch.cat([logp_CK[:, : self._exact], tail_C[:, None]], dim=-1)
        codes = _linear_codes(exact)
        second_C = _linear_values(codes[:, self._exact - 1])
        u = ((logp_CK[:, self._exact :] - second_C[:, None]) / 4).exp().clamp_max(1.0)
        # A level of 255 says that an id is impossible, which none is that only is very unlikely.
        levels = torch.where(u > 0, ((1 - u) * LEVELS).round().clamp_max(254), 255)
        tempered_C = torch.stack(tempered, -1) if tempered else exact.new_empty((len(exact), 0))
        return {
            **self.ids.encode(ids_CK),
            "exact": codes,
            "levels": levels.nan_to_num(255).to(torch.uint8),
            "tempered": _tempered_codes(tempered_C),
            "finite": ~logp_CK.isnan().any(-1) & logp_CK[:, 0].isfinite(),
        }

    def decode(self, rows: Mapping[str, Tensor]) -> TopKRows:
        """All entries, sorted by falling log-probability."""
        device, tokens = rows["low"].device, len(rows["low"])
        if self._table is None or self._table.device != device:
            self._table = self.ids.table(device=device)
        ids_TK = torch.empty((tokens, self.k), dtype=torch.int64, device=device)
        logp_TK = torch.empty((tokens, self.k), dtype=torch.float32, device=device)
        tail_T = torch.empty(tokens, dtype=torch.float32, device=device)
        # Blocks that stay in a processor's cache; an accelerator takes all at once.
        step = _BLOCK_TOKENS if device.type == "cpu" else max(tokens, 1)
        for start in range(0, tokens, step):
            span = slice(start, start + step)
            block = {name: tensor[span] for name, tensor in rows.items()}
            ids_TK[span] = self.ids.decode(block, table=self._table)
            logp_TK[span], tail_T[span] = self._log_masses(block)
        tempered = dict(zip(self.temperatures, _tempered_values(rows["tempered"]).unbind(-1), strict=True))
        return TopKRows(ids_TK, logp_TK, tail_T, tempered)

    def _log_masses(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(T, K) and (T,), normalised."""
        exact = _linear_values(rows["exact"])
        masses = exact.exp()
        u = rows["levels"].float().mul_(-1 / LEVELS).add_(1.0).clamp_min_(0.0)
        total = masses.sum(-1)
        if u.shape[1]:
            total = total + masses[:, self._exact - 1] * u.square().square_().sum(-1)
        exact -= total.log_()[:, None]
        below = u.log_().mul_(4.0).add_(exact[:, self._exact - 1, None])
        return torch.cat([exact[:, : self._exact], below], dim=-1), exact[:, -1]


class SampledCodec(_Codec):
    """Drawn ids with a level of their log-probability, and unless all weigh the same with their weight."""

    def __init__(self, config: SampledCodecConfig, *, vocab_size: int) -> None:
        self.config = config
        self.ids = IdPlanes(vocab_size, config.draws)
        self._table: Tensor | None = None
        self.shapes = {
            "low": (torch.int16, config.draws),
            "high": (torch.uint8, self.ids.high_bytes),
            "levels": (torch.uint8, config.draws),
            "weights": (torch.int16, 0 if config.proposal_power == 1.0 else config.draws),
        }

    def encode(self, readout: Readout, rows_T: Tensor, *, labels_T: Tensor, seed: int) -> Rows:
        """See Codec.encode; `seed` is the micro-batch's own."""
        config = self.config
        request = SampledRequest(config.draws, config.proposal_power, config.temperature, seed=seed)
        drawn = readout.sampled(rows_T, request=request)
        level = ((1 - (drawn.logp_TK / 4).exp()) * LEVELS).round().clamp(0, 254)
        weights = _tempered_codes((drawn.weight_TK * config.draws).log()[:, : self.shapes["weights"][1]])
        return {
            **self.ids.encode(drawn.ids_TK),
            "levels": level.nan_to_num(0).to(torch.uint8),
            "weights": weights,
            "finite": drawn.weight_TK.isfinite().all(-1),
        }

    def decode(self, rows: Mapping[str, Tensor]) -> DrawnRows:
        """All draws, in their order."""
        device, draws = rows["low"].device, self.config.draws
        if self._table is None or self._table.device != device:
            self._table = self.ids.table(device=device)
        logp_TK = rows["levels"].float().mul_(-1 / LEVELS).add_(1.0).log_().mul_(4.0)
        if self.shapes["weights"][1]:
            weight_TK = _tempered_values(rows["weights"]).exp_().div_(draws)
        else:
            weight_TK = torch.full_like(logp_TK, 1.0 / draws)
        return DrawnRows(self.ids.decode(rows, table=self._table), weight_TK, logp_TK)


class HiddenCodec(_Codec):
    """Last hidden states as they are."""

    def __init__(self, config: HiddenCodecConfig, *, width: int, dtype: torch.dtype) -> None:
        self.width = width
        self.shapes = {"hidden": (dtype, width)}

    def encode(self, readout: Readout, rows_T: Tensor, *, labels_T: Tensor, seed: int) -> Rows:
        """See Codec.encode."""
        hidden_TE = readout.hidden_PE[rows_T]
        return {"hidden": hidden_TE, "finite": hidden_TE.isfinite().all(-1)}


AnyCodec = TopKCodec | SampledCodec | HiddenCodec


def build_codec(config: CodecConfig, *, vocab_size: int, width: int, dtype: torch.dtype) -> AnyCodec:
    """The codec of a teacher with `vocab_size` ids and hidden states of `width` values of `dtype`."""
    match config:
        case TopKCodecConfig():
            return TopKCodec(config, vocab_size=vocab_size)
        case SampledCodecConfig():
            return SampledCodec(config, vocab_size=vocab_size)
        case HiddenCodecConfig():
            return HiddenCodec(config, width=width, dtype=dtype)


def dense_log_probabilities(ids_TK: Tensor, logp_TK: Tensor, tail_T: Tensor, *, vocab_size: int) -> Tensor:
    """(T, vocab_size) a whole distribution from a sparse one: the tail's mass is spread evenly over all other ids.

    The forward KL from the teacher to it is that of the entries and the tail as one outcome, plus the tail's mass times
    (log of the number of other ids − the entropy of the teacher's distribution among them).
    """
    others = vocab_size - torch.isfinite(logp_TK).sum(-1)
    each_T = torch.where(others > 0, tail_T - others.clamp_min(1).log(), float("-inf"))
    dense_TV = each_T[:, None].expand(-1, vocab_size).clone()
    # An empty entry may name any id, so that it must not overwrite another one.
    empty_TK = torch.isneginf(logp_TK)
    ids_TK = torch.where(empty_TK, ids_TK[:, :1], ids_TK)
    return dense_TV.scatter_(-1, ids_TK, torch.where(empty_TK, logp_TK[:, :1], logp_TK))


def _linear_codes(logp: Tensor) -> Tensor:
    code = (logp * -LINEAR_STEPS).round().clamp(0, _EMPTY - 1)
    code = torch.where(torch.isneginf(logp), float(_EMPTY), code).nan_to_num(_EMPTY)
    return (code - _SIGN).to(torch.int16)


def _linear_values(codes: Tensor) -> Tensor:
    logp = codes.float().add_(_SIGN).mul_(-1.0 / LINEAR_STEPS)
    return logp.masked_fill_(codes == _EMPTY - _SIGN, float("-inf"))


def _tempered_codes(values: Tensor) -> Tensor:
    return (values * TEMPERED_STEPS).round().nan_to_num(0).clamp(-_SIGN, _SIGN - 1).to(torch.int16)


def _tempered_values(codes: Tensor) -> Tensor:
    return codes.float() / TEMPERED_STEPS
