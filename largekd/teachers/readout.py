"""From a teacher's hidden states to sparse signals: likeliest ids with the mass of the others, or drawn ids.

Shape letters: T counted tokens, C tokens of one chunk, W ids that both models have (or, with a translation, the
teacher's), K kept entries, M entries that have a student's id, L scored groups of a translation, N the teacher's tokens
of those, E teacher width.

Logits exist for one chunk of tokens at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from largekd.contracts import SampledRequest, SampledSignal, TopKRequest, TopKSignal, Translation, VocabularyHead

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Readout:
    """Hidden states (positions, width) with the head that reads them; `vocab_size` ids from 0 on take part."""

    hidden_PE: Tensor
    head: VocabularyHead
    vocab_size: int

    def top_k(self, rows_T: Tensor, *, request: TopKRequest) -> TopKSignal:
        """The `k` likeliest ids of each row with exact tails at temperature 1 and at the request's."""
        k = min(request.k, self.vocab_size)
        parts = [_top_k(logp_CW, k=k, temperature=request.temperature) for _, logp_CW in self._chunks(rows_T)]
        ids_TK, logp_TK, tail_T, tempered_T = (torch.cat(column) for column in zip(*parts, strict=True))
        return TopKSignal(ids_TK, logp_TK, tail_T, tempered_T, vocab_size=self.vocab_size)

    def sampled(self, rows_T: Tensor, *, request: SampledRequest) -> SampledSignal:
        """Draws with replacement from p^power (normalised), weighted by p over it; p at the request's temperature."""
        parts = []
        generator = torch.Generator(device=self.hidden_PE.device).manual_seed(request.seed)
        for _, logp_CW in self._chunks(rows_T):
            logp_CW = torch.log_softmax(logp_CW / request.temperature, dim=-1)
            proposal_CW = torch.log_softmax(logp_CW * request.proposal_power, dim=-1)
            # A rank that raised here would leave the others waiting; a weight that is not finite skips the step on all.
            p_CW = proposal_CW.exp()
            broken_C = p_CW.isnan().any(-1, keepdim=True)
            ids_CK = torch.multinomial(
                torch.where(broken_C, 1.0, p_CW), request.draws, replacement=True, generator=generator
            )
            logp_CK = logp_CW.gather(-1, ids_CK)
            weight_CK = (logp_CK - proposal_CW.gather(-1, ids_CK)).exp() / request.draws
            weight_CK = weight_CK.masked_fill(broken_C, float("nan"))
            parts.append((ids_CK, weight_CK, logp_CK))
        ids_TK, weight_TK, logp_TK = (torch.cat(column) for column in zip(*parts, strict=True))
        return SampledSignal(ids_TK, weight_TK, logp_TK, vocab_size=self.vocab_size)

    def label_logp(self, rows_Q: Tensor, *, labels_Q: Tensor) -> Tensor:
        """log p[label] of each row."""
        parts = [logp_CW.gather(-1, labels_Q[span, None]).squeeze(-1) for span, logp_CW in self._chunks(rows_Q)]
        return torch.cat(parts)

    def log_probabilities(self, rows_T: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(place, (C, W) float32) of a few rows at a time, at least once; the caller may overwrite what it is given."""
        return self._chunks(rows_T)

    def _chunks(self, rows_T: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-probabilities in float32 of a few rows at a time; at least one, maybe empty, chunk."""
        head, weight_WE = self.head, self.head.weight_VD[: self.vocab_size]
        for start in range(0, max(rows_T.numel(), 1), CHUNK_TOKENS):
            span = slice(start, start + CHUNK_TOKENS)
            logits_CW = torch.mm(self.hidden_PE[rows_T[span]].to(weight_WE.dtype), weight_WE.t()).float()
            if head.bias_V is not None:
                logits_CW += head.bias_V[: self.vocab_size]
            logits_CW *= head.scale
            if head.softcap is not None:
                logits_CW = head.softcap * torch.tanh(logits_CW / head.softcap)
            logits_CW = torch.log_softmax(logits_CW, dim=-1)  # one name: the logits must not outlive the yield
            yield span, logits_CW


def _top_k(logp_CW: Tensor, *, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp_CK, ids_CK = logp_CW.topk(k, dim=-1)
    # Summing the others themselves keeps small tails exact, which 1 − Σ p would not.
    rest_CW = logp_CW.scatter_(-1, ids_CK, float("-inf"))
    tail_C = torch.logsumexp(rest_CW, dim=-1)
    tempered_C = tail_C if temperature == 1.0 else torch.logsumexp(rest_CW / temperature, dim=-1)
    return ids_CK, logp_CK, tail_C, tempered_C


def scored_rows(translation: Translation) -> tuple[Tensor, Tensor]:
    """For each counted token: the teacher's flat position that predicts its group, and whether there is one."""
    present_T = translation.signal_T >= 0
    if translation.scored_row_L.numel() == 0:
        return torch.zeros_like(translation.signal_T), present_T
    return translation.scored_row_L[translation.signal_T.clamp_min(0)], present_T


def translated(
    readout: Readout, *, request: TopKRequest, translation: Translation, student_of_W: Tensor, labels_T: Tensor
) -> TopKSignal:
    """The teacher's distribution where both models stand before the same byte, in the student's ids.

    Kept are those of the teacher's likeliest ids that the student has with the same bytes, and the label itself: if
    the teacher spells it in several tokens, with the product of their probabilities (a merged token); the rest of the
    mass is the tail. At a temperature other than 1 a merged token and what it leaves of its first token are outcomes
    like single ids. student_of_W: the student's id of each of the teacher's, −1 where it has none. labels_T: the
    student's labels.
    """
    groups = _scored(readout, translation=translation)
    present_T, group_T = translation.signal_T >= 0, translation.signal_T.clamp_min(0)
    signal = readout.top_k(groups.row_L[group_T], request=request)
    ids_TK = student_of_W[signal.ids_TK]
    merged_T = torch.where(present_T, groups.logp_L[group_T], float("-inf"))
    # A merged token is one way to go on from its first token, which keeps the other ways.
    opens_TK = signal.ids_TK == groups.first_L[group_T][:, None]
    first_T = groups.first_logp_L[group_T]
    others_T = _log_difference(first_T, merged_T)
    own_TK = torch.where(opens_TK & present_T[:, None], others_T[:, None], signal.logp_TK)
    # The label stands first; where it is also among the likeliest ids it must not count twice.
    known_TK = (ids_TK >= 0) & (ids_TK != labels_T[:, None])
    kept_TK, unknown_TK = (torch.where(chosen, own_TK, float("-inf")) for chosen in (known_TK, ~known_TK))
    # Distinct teacher ids may mean one student's id only if the map is one to one, which shared_tokens ensures.
    ids_TM = torch.cat([labels_T[:, None], ids_TK.clamp_min(0)], dim=-1)
    logp_TM = torch.cat([merged_T[:, None], kept_TK], dim=-1)
    logp_TM[:, 0].clamp_(min=-1.0e4)
    hidden_T = ~opens_TK.any(-1)  # the first token is one of those that make up the tail

    def tail(before_T: Tensor, t: float) -> Tensor:
        moved_T = _log_difference(first_T / t, others_T / t)
        less_T = torch.where(hidden_T, _log_difference(before_T, moved_T), before_T)
        return torch.logaddexp(less_T, torch.logsumexp(unknown_TK / t, dim=-1))

    return TopKSignal(
        ids_TM,
        logp_TM,
        tail_T=tail(signal.tail_T, 1.0),
        tempered_tail_T=tail(signal.tempered_tail_T, request.temperature),
        present_T=present_T.to(logp_TM.dtype),
        scored_logp_L=groups.logp_L,
    )


def _log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """log(exp(larger) − exp(smaller)); −inf where nothing is left."""
    left = -torch.expm1((smaller - larger).clamp_max(0.0))
    return torch.where(left > 1e-7, larger + left.clamp_min(1e-7).log(), float("-inf"))


@dataclass(frozen=True)
class _ScoredGroups:
    """The teacher's view of scored groups: log-probability (the sum over its tokens), first token with its own
    log-probability, and the position that predicts it. One group that is none where a batch has none."""

    logp_L: Tensor
    first_L: Tensor
    first_logp_L: Tensor
    row_L: Tensor


def _scored(readout: Readout, *, translation: Translation) -> _ScoredGroups:
    scored_N, id_N = translation.scored_N, translation.id_N
    logp_N = readout.label_logp(translation.row_N, labels_Q=id_N)
    groups = translation.scored_row_L.numel()
    if groups == 0:
        none = logp_N.new_zeros(1)
        return _ScoredGroups(none, id_N.new_full((1,), -1), none, id_N.new_zeros(1))
    logp_L = logp_N.new_zeros(groups).index_add_(0, scored_N, logp_N)
    lengths_L = translation.scored_teacher_length_L
    first_L = lengths_L.cumsum(0) - lengths_L
    return _ScoredGroups(logp_L, id_N[first_L], logp_N[first_L], translation.scored_row_L)
