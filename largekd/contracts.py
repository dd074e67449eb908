"""The records that rooms exchange.

Shape letters: B sequences (rows), S positions, T counted tokens, V student vocabulary, W teacher vocabulary,
D student width, E teacher width, K kept entries, G groups of a translation (in attention: key heads), L scored groups,
N teacher tokens of scored groups, H heads, d width of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_LABEL = -100

Origin = Literal["train", "eval", "rollout"]
"""Which data set a batch's samples come from; rollout: some were generated, and are in no data set."""

HEALTH_NAMES = (
    "token_weight",
    "ce",
    "student_top1_correct",
    "student_entropy",
    "signal_weight",
    "teacher_entropy",
    "teacher_ce",
    "kl_t1",
    "top1_agree",
)
"""Figures at temperature 1, each a sum over tokens times the token's weight, in the order in which they travel."""

TEACHER_HEALTH_NAMES = HEALTH_NAMES[5:]
"""The figures that need a teacher, summed over the tokens whose weights make up `signal_weight`."""

MIXTURE_NAMES = ("weight", "responsibility", "kl_t1", "teacher_ce")
"""Figures of each member of a mixture at temperature 1, sums over tokens times the token's weight; the first two add up
to the tokens' weight over the members (responsibility: of the tokens whose label is a shared id)."""


class Segment(NamedTuple):
    """One sample's place in a row: it fills positions [offset, offset + length)."""

    sample_id: int
    offset: int
    length: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows.

    `labels_BS` is already shifted: position t holds the token that must be predicted there, or IGNORE_LABEL.
    Exactly one of the two layouts holds: padded rows have `attention_mask_BS` and no `position_ids_BS`; packed rows
    have `position_ids_BS`, restarting in every segment (the padded tail is a segment of its own), and no mask.
    `counted_T` are the flat positions (b * S + s) whose label counts and whose weight is positive: it is made with
    the batch so that the loss needs no device synchronisation.
    `segment_BS` numbers the samples of a row from 1; 0 is fill. `translation` is there when the teacher has another
    tokenizer. `origin` says which data set the samples' ids belong to. `teacher_BS`: where records name one of several
    teachers, its place among them, −1 where they name none.

    Generated rows: `task_weight_BS` is the label's weight in the cross-entropy (None: its token weight);
    `advantage_BS` and `sampled_logq_BS` are what the policy gradient needs of each sampled label: how much better than
    expected it was, and its log-probability when it was drawn; `sampled_BS` is 1 there and 0 at other labels.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    token_weight_BS: Tensor
    counted_T: Tensor
    attention_mask_BS: Tensor | None = None
    position_ids_BS: Tensor | None = None
    segments: tuple[tuple[Segment, ...], ...] = ()
    segment_BS: Tensor | None = None
    translation: "Translation | None" = None
    origin: Origin = "train"
    teacher_BS: Tensor | None = None
    task_weight_BS: Tensor | None = None
    advantage_BS: Tensor | None = None
    sampled_logq_BS: Tensor | None = None
    sampled_BS: Tensor | None = None

    def to(self, *, device: torch.device) -> "Batch":
        """This batch with its tensors on `device`; the copies are asynchronous where memory is pinned."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.translation is not None:
            moved["translation"] = self.translation.to(device=device)
        return replace(self, **moved)

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a Hugging Face decoder."""
        inputs = {"input_ids": self.input_ids_BS}
        if self.position_ids_BS is not None:
            inputs["position_ids"] = self.position_ids_BS
        if self.attention_mask_BS is not None:
            inputs["attention_mask"] = self.attention_mask_BS
        return inputs

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Ids of the samples in this batch; filler rows have none."""
        return tuple(segment.sample_id for row in self.segments for segment in row)


@dataclass(frozen=True)
class Translation:
    """The same samples in the teacher's tokens, and the groups of tokens that spell the same bytes on both sides.

    teacher: the teacher's rows, packed, sample by sample in the same order as the student's and under the same segment
    numbers; a segment may be empty. Like the student's, its samples have no position for their last token.

    Groups (G), for what is compared at positions: group g is the student's flat positions [student_start_G,
    + student_length_G) of `input_ids_BS` and the teacher's [teacher_start_G, + teacher_length_G) of its own batch.
    Groups are ordered and do not overlap, none crosses samples, and each token of one has a position on both sides.
    student_group_BS, teacher_group_BS: per position, 1 + the group's number within its row; 0: not aligned.

    Scored groups (L), for what is compared at predictions: each of the student's tokens is a counted label and each of
    the teacher's is predicted by a position. They may end with a sample's last token, and are not a part of G.
    Group l's labels are those of the counted positions [scored_first_L, + scored_length_L), indices into `counted_T`;
    the teacher predicts its first token at the flat position scored_row_L and the others at the
    scored_teacher_length_L − 1 positions that follow.
    signal_T: for each counted position, the scored group that is its label and nothing else of the student's; −1: none.
    Spans (X) are the scored groups of two or more student tokens, and U are these tokens in order. span_G: each span's
    place among the scored groups. span_first_T: (X) index into `counted_T` of its first token. span_of_U, span_token_U:
    each token's span and its index into `counted_T`.
    row_N, id_N, scored_N: for each teacher token of each scored group, in order: the flat position that predicts it,
    its id, and its group. The sum of the log-probabilities over a group's tokens is the group's log-probability.
    """

    teacher: Batch
    student_start_G: Tensor
    student_length_G: Tensor
    teacher_start_G: Tensor
    teacher_length_G: Tensor
    student_group_BS: Tensor
    teacher_group_BS: Tensor
    scored_first_L: Tensor
    scored_length_L: Tensor
    scored_row_L: Tensor
    scored_teacher_length_L: Tensor
    signal_T: Tensor
    span_G: Tensor
    span_first_T: Tensor
    span_of_U: Tensor
    span_token_U: Tensor
    row_N: Tensor
    id_N: Tensor
    scored_N: Tensor

    def to(self, *, device: torch.device) -> "Translation":
        """This translation with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, teacher=self.teacher.to(device=device), **moved)


COUNT_NAMES = (
    "label_tokens",
    "signal_tokens",
    "spans",
    "positions",
    "samples",
    "task_tokens",
    "sampled_tokens",
    "routed_tokens",
)
"""What terms may be divided by, each a sum over a step's micro-batches and ranks; see `counts_of`."""


def counts_of(micro_batches: Sequence[Batch]) -> Tensor:
    """(len(COUNT_NAMES),) float64 sums over one rank's micro-batches, before the all-reduce.

    label_tokens: token weights of the counted positions. signal_tokens: of those that have a teacher's signal: all, or
    with a translation those whose label is a group of its own. spans: scored groups of several student tokens, times
    the weight of their first token.
    positions: positions of samples, fill left out; with a translation its groups. samples: samples with at least two
    such positions. task_tokens: label_tokens by the weights of the cross-entropy. sampled_tokens: label_tokens that
    the student drew, for the policy gradient. routed_tokens: the student's positions of samples, fill left out.
    """
    total = torch.zeros(len(COUNT_NAMES), dtype=torch.float64)
    for batch in micro_batches:
        total += torch.tensor(
            [*_counts_of_one(batch), *_generated_counts(batch), _routed_tokens(batch)], dtype=torch.float64
        )
    return total


def _routed_tokens(batch: Batch) -> float:
    return float(sum(segment.length for row in batch.segments for segment in row))


def _generated_counts(batch: Batch) -> list[float]:
    weight_T = batch.token_weight_BS.flatten()[batch.counted_T].double()
    task_T = weight_T
    if batch.task_weight_BS is not None:
        task_T = batch.task_weight_BS.flatten()[batch.counted_T].double()
    if batch.sampled_BS is None:
        return [float(task_T.sum()), 0.0]
    sampled_T = batch.sampled_BS.flatten()[batch.counted_T].double()
    return [float(task_T.sum()), float((weight_T * sampled_T).sum())]


def _counts_of_one(batch: Batch) -> list[float]:
    weight_T = batch.token_weight_BS.flatten()[batch.counted_T].double()
    tokens = float(weight_T.sum())
    translation = batch.translation
    if translation is None:
        lengths = [segment.length for row in batch.segments for segment in row]
        return [tokens, tokens, 0.0, float(sum(lengths)), float(sum(length > 1 for length in lengths))]
    signal = float(weight_T[translation.signal_T >= 0].sum())
    spans = float(weight_T[translation.span_first_T].sum())
    assert batch.segment_BS is not None
    width = batch.segment_BS.shape[1]
    starts_G = translation.student_start_G
    # A sample's identity: its row and its number there.
    samples_G = (starts_G // width) * (width + 1) + batch.segment_BS.flatten()[starts_G]
    groups = torch.unique(samples_G, return_counts=True)[1]
    return [tokens, signal, spans, float(starts_G.numel()), float((groups > 1).sum())]


@dataclass(frozen=True)
class VocabularyHead:
    """The map from hidden states to logits: softcap(scale * (hidden @ weight.T + bias)).

    `weight_VD` may have padded rows beyond `vocab_size`; they take no part in any distribution.
    `softcap` c means c * tanh(logit / c).
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TopKRequest:
    """The teacher's `k` likeliest ids; `temperature` is the one the tail must be known at."""

    k: int
    temperature: float = 1.0


@dataclass(frozen=True)
class SampledRequest:
    """`draws` ids per position from p^proposal_power, with importance weights; `seed` and the step decide them."""

    draws: int
    proposal_power: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def of_micro_batch(self, place: int, *, rank: int) -> "SampledRequest":
        """The same with a seed for the step's micro-batch `place` on `rank`: each of them draws for itself."""
        seed = (self.seed * 1_000_003 + rank) * 1_000_003 + place
        return replace(self, seed=seed % 2**63)


@dataclass(frozen=True)
class TapRequest:
    """Layers (0 is the first) whose output, whose attention's queries, keys and values, or whose router's logits and
    choice are captured."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    router: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hidden or self.attention or self.router)


@dataclass(frozen=True)
class SignalRequest:
    """What the active terms need of a teacher, the union over them; the whole `distribution`, less of it, or none."""

    distribution: Literal["full"] | TopKRequest | SampledRequest | None = None
    taps: TapRequest = TapRequest()


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's attention was computed from, after rotary embedding and per-head norms.

    query_BHSd: (sequences, heads, positions, head width); key_BGSd, value_BGSd: (…, key heads, …), G divides H.
    Scores are softcap(scale · query · keyᵀ); a query sees the last `window` positions (None: all before it).
    """

    query_BHSd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class RouterTap:
    """What a layer's router said: logits of its X experts, and the K experts that each token was sent to."""

    logits_BSX: Tensor
    choice_BSK: Tensor


@dataclass(frozen=True)
class Taps:
    """Captured activations by layer index: outputs (B, S, width) of decoder layers, attention inputs, routers."""

    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionInputs] = field(default_factory=dict)
    router: Mapping[int, RouterTap] = field(default_factory=dict)


@dataclass(frozen=True)
class HiddenSignal:
    """Last hidden states and the teacher's head: a full distribution without logits.

    The counted token i reads row `rows_T[i]` of the flattened hidden states (None: the student's own flat position),
    and has a signal where `present_T[i]` (None: everywhere).
    """

    hidden_BSE: Tensor
    head: VocabularyHead
    rows_T: Tensor | None = None
    present_T: Tensor | None = None
    taps: Taps = Taps()


@dataclass(frozen=True)
class TopKSignal:
    """K ids with log-probabilities and the log of the mass that is left, for each counted token, at temperature 1.

    ids_TK: int64, in the student's vocabulary; an entry with `logp_TK` = −inf is empty, the first one never. Ids of one
    row differ. vocab_size: ids that both models have (None: all of the student's).
    tail_T: log(1 − Σ p). tempered_tail_T: log Σ_tail p^(1/temperature) for the objective's temperature (at
    temperature 1 the same). present_T: where there is a signal (None: everywhere). scored_logp_L: the teacher's
    log-probability of each scored group of a translation.
    """

    ids_TK: Tensor
    logp_TK: Tensor
    tail_T: Tensor
    tempered_tail_T: Tensor
    vocab_size: int | None = None
    present_T: Tensor | None = None
    scored_logp_L: Tensor | None = None
    taps: Taps = Taps()


@dataclass(frozen=True)
class SampledSignal:
    """Drawn ids and importance weights, for each counted token: Σ_k weight_k · onehot(id_k) has the mean p.

    p is the distribution at the objective's temperature. ids_TK: int64, may repeat; logp_TK: log p of each.
    """

    ids_TK: Tensor
    weight_TK: Tensor
    logp_TK: Tensor
    vocab_size: int | None = None
    taps: Taps = Taps()


@dataclass(frozen=True)
class MixtureSignal:
    """p(v) = Σ_m w_m · p_m(v) over the ids that the student and all members have, at any temperature a mixture of the
    members' distributions at that temperature. The members have the student's tokenizer and a signal everywhere.

    log_weight_M: float32 logarithms of the weights, which add up to 1; −inf: no part. confidence_scale: weights are
    multiplied with exp(−entropy of p_m at temperature 1 / scale), token by token, and normalised; None: they are not.
    route_T: for each counted token the one member that it learns from, −1: the weights decide; None: everywhere.
    learned: each member's share in the labels' likelihood is wanted.
    """

    members: tuple[HiddenSignal, ...]
    log_weight_M: Tensor
    confidence_scale: float | None = None
    route_T: Tensor | None = None
    learned: bool = False
    taps: Taps = Taps()


@dataclass(frozen=True)
class TapSignal:
    """Captured activations alone."""

    taps: Taps


@dataclass(frozen=True)
class OwnSignal(TapSignal):
    """Asks the student's own forward for its teacher's activations, and with `distribution` for last hidden states."""

    taps: Taps = field(default_factory=Taps)
    distribution: bool = True


Distribution = HiddenSignal | TopKSignal | SampledSignal | MixtureSignal
TeacherSignal = Distribution | TapSignal


@dataclass(frozen=True)
class Progress:
    """Where a run stands; schedules are functions of this alone. `tokens` are label tokens over all ranks, `train_s`
    seconds of wall time inside steps, `consecutive_skips` the non-finite steps since the last good one.

    step and max_steps count over all stages. The stage of index `stage` has `stage_steps` (0: all of max_steps) from
    `stage_first` on; its engine's life, the phase of index `phase`, ends with step `phase_end` (0: max_steps).
    """

    step: int = 0
    max_steps: int = 0
    tokens: int = 0
    train_s: float = 0.0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    stage: int = 0
    stage_first: int = 0
    stage_steps: int = 0
    phase: int = 0
    phase_end: int = 0

    @property
    def stage_step(self) -> int:
        """Steps of this stage that are done; with `stage_length` what schedules are functions of."""
        return self.step - self.stage_first

    @property
    def stage_length(self) -> int:
        """Steps of this stage."""
        return self.stage_steps or self.max_steps

    @property
    def last(self) -> int:
        """The last step before the run ends or another engine takes over."""
        return self.phase_end or self.max_steps
