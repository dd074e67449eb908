"""Terms over the routers of a mixture-of-experts student: balance, z loss, distillation; and what their figures need.

Shape letters: L layers with a router, X experts, P positions, K experts that a token is sent to, C pairs of layers,
N active terms. The terms have no parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from largekd.config.router_checks import ROUTER_TERMS
from largekd.contracts import Batch, RouterTap, Taps
from largekd.objectives.alignment import AlignmentPlan
from largekd.objectives.features import FeaturePositions
from largekd.objectives.layer_maps import LayerPair

BALANCE, Z, DISTIL = ROUTER_TERMS
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class RouterPair:
    """Two layers whose routers are compared over the experts that both have.

    student_X, teacher_X: int64 place of each expert among the compared ones, −1: not compared; None: its own place.
    """

    layers: LayerPair
    compared: int
    student_X: Tensor | None = None
    teacher_X: Tensor | None = None


class RouterTerms:
    """Sums over positions, each divided by L (the distillation: by C); see `balance_sum`, `z_sum` and `routing_kl`.

    All positions of samples count, prompts too: they are routed like the others. Fill does not.
    """

    def __init__(
        self,
        *,
        terms: Sequence[str],
        layers: Sequence[int],
        experts: int,
        scoring: Scoring = "softmax",
        pairs: Sequence[RouterPair] = (),
        teacher_scoring: Scoring = "softmax",
    ) -> None:
        assert set(terms) <= set(ROUTER_TERMS) and (DISTIL not in terms or pairs)
        self.terms = tuple(terms)
        self.layers = tuple(layers)
        self.experts = experts
        self.pairs = tuple(pairs) if DISTIL in terms else ()
        self._scoring: Scoring = scoring
        self._teacher_scoring: Scoring = teacher_scoring

    def extend(self, plan: AlignmentPlan, /) -> AlignmentPlan:
        """The plan with the routers that both models must capture."""
        teacher = tuple(sorted({pair.layers.teacher for pair in self.pairs}))
        return replace(
            plan,
            student=replace(plan.student, router=self.layers),
            teacher=replace(plan.teacher, router=teacher),
        )

    def __call__(
        self,
        student: Taps,
        teacher: Taps | None,
        *,
        batch: Batch,
        load_LX: Tensor,
        squares_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(N,) differentiable float32 sums of the terms, and the figures that `RouterLoads` reads.

        load_LX: share of assignments that each expert got. To `squares_N` the backward pass adds the squared norm of
        each term's gradient of the router logits.
        """
        places_P = _positions(batch)
        sums: dict[str, list[Tensor]] = {name: [] for name in self.terms}
        loads, entropies = [], []
        logits_of = {layer: _rows(student.router[layer], places_P) for layer in self.layers}
        for place, layer in enumerate(self.layers):
            logits_PX = logits_of[layer]
            if BALANCE in sums:
                watched = self._watched(logits_PX, term=BALANCE, squares_N=squares_N)
                sums[BALANCE].append(balance_sum(watched, load_X=load_LX[place], scoring=self._scoring))
            if Z in sums:
                sums[Z].append(z_sum(self._watched(logits_PX, term=Z, squares_N=squares_N)))
            loads.append(_load(student.router[layer], places_P, experts=self.experts))
            entropies.append(_entropy_sum(logits_PX.detach(), scoring=self._scoring))
        overlaps = list(self._compare(student, teacher, batch=batch, sums=sums, squares_N=squares_N))
        counted = torch.tensor([places_P.numel(), _compared(batch)], dtype=torch.float64)
        figures = torch.cat(
            [
                torch.stack(loads).flatten(),
                torch.stack(entropies).double(),
                *(overlap.double().reshape(1) for overlap in overlaps),
                counted.to(places_P.device, non_blocking=True),
            ]
        )
        if not self.terms:
            return figures.new_zeros(0, dtype=torch.float32), figures
        return torch.stack([torch.stack(sums[name]).mean() for name in self.terms]), figures

    def _compare(
        self,
        student: Taps,
        teacher: Taps | None,
        *,
        batch: Batch,
        sums: dict[str, list[Tensor]],
        squares_N: Tensor | None,
    ) -> Iterator[Tensor]:
        """Add the distillation of each pair to `sums`; the shares of its choice that the student has, summed."""
        if not self.pairs:
            return
        assert teacher is not None, "the distillation of routers needs the teacher's"
        positions = FeaturePositions.of(batch)
        for pair in self.pairs:
            own, theirs = student.router[pair.layers.student], teacher.router[pair.layers.teacher]
            logits_PX = self._watched(_rows(own, positions.student_P), term=DISTIL, squares_N=squares_N)
            logq_PX = mapped(log_routing(logits_PX, scoring=self._scoring), pair.student_X, count=pair.compared)
            with torch.no_grad():
                taught = log_routing(_rows(theirs, positions.teacher_P), scoring=self._teacher_scoring)
                logp_PX = mapped(taught, pair.teacher_X, count=pair.compared)
                chosen = _chosen(own, positions.student_P, pair.student_X, count=pair.compared)
                yield _overlap(chosen, _chosen(theirs, positions.teacher_P, pair.teacher_X, count=pair.compared))
            sums[DISTIL].append(routing_kl(logp_PX, logq_PX))

    def _watched(self, logits_PX: Tensor, *, term: str, squares_N: Tensor | None) -> Tensor:
        if squares_N is None or not logits_PX.requires_grad:
            return logits_PX
        square = squares_N[self.terms.index(term)]
        alias = logits_PX.view_as(logits_PX)

        def add(gradient: Tensor) -> None:
            square.add_(gradient.float().square().sum())

        alias.register_hook(add)
        return alias


def log_routing(logits_PX: Tensor, /, *, scoring: Scoring) -> Tensor:
    """(P, X) log of the routing distribution: softmax(logits), or σ(logits) / Σ σ(logits)."""
    if scoring == "softmax":
        return logits_PX.log_softmax(-1)
    scores_PX = torch.nn.functional.logsigmoid(logits_PX)
    return scores_PX - scores_PX.logsumexp(-1, keepdim=True)


def balance_sum(logits_PX: Tensor, /, *, load_X: Tensor, scoring: Scoring = "softmax") -> Tensor:
    """X · Σ_x f_x · Σ_t p_tx: over the number of tokens 1 for equal loads f or equal p (Fedus et al. 2021, eq. 4).

    load_X: f, summing to 1; no gradient flows to it.
    """
    probability_X = log_routing(logits_PX, scoring=scoring).exp().sum(0)
    return logits_PX.shape[-1] * (load_X.to(probability_X.dtype) * probability_X).sum()


def z_sum(logits_PX: Tensor, /) -> Tensor:
    """Σ_t (log Σ_x exp z_tx)² (Zoph et al. 2022, eq. 5)."""
    return logits_PX.logsumexp(-1).square().sum()


def routing_kl(logp_PX: Tensor, logq_PX: Tensor, /) -> Tensor:
    """Σ_t KL(p_t‖q_t) = Σ_t Σ_x p·(log p − log q), in nats; an expert with p = 0 adds nothing."""
    difference_PX = torch.where(logp_PX > -torch.inf, logp_PX - logq_PX, 0.0)
    return (logp_PX.exp() * difference_PX).sum()


def mapped(log_PX: Tensor, place_X: Tensor | None, /, *, count: int) -> Tensor:
    """(P, count): the probability of the compared experts, experts at one place added up, normalised over them.

    place_X: each expert's place, −1: left out; None: log_PX itself.
    """
    if place_X is None:
        return log_PX
    # The experts that are left out share a last column, which is cut off.
    place_PX = torch.where(place_X < 0, count, place_X).expand(log_PX.shape[0], -1)
    highest_P1 = log_PX.detach().max(-1, keepdim=True).values
    total_PC = log_PX.new_zeros(log_PX.shape[0], count + 1).scatter_add(1, place_PX, (log_PX - highest_P1).exp())
    kept_PC = total_PC[:, :count].clamp_min(torch.finfo(log_PX.dtype).tiny).log()
    return kept_PC.log_softmax(-1)


def _rows(tap: RouterTap, places_P: Tensor) -> Tensor:
    return tap.logits_BSX.flatten(0, 1).index_select(0, places_P).float()


def _load(tap: RouterTap, places_P: Tensor, *, experts: int) -> Tensor:
    """(X,) assignments of each expert, float64."""
    choice = tap.choice_BSK.flatten(0, 1).index_select(0, places_P).flatten()
    ones = torch.ones(choice.shape, dtype=torch.float64, device=choice.device)
    return torch.zeros(experts, dtype=torch.float64, device=choice.device).index_add_(0, choice, ones)


def _entropy_sum(logits_PX: Tensor, *, scoring: Scoring) -> Tensor:
    logp_PX = log_routing(logits_PX, scoring=scoring)
    return -(logp_PX.exp() * logp_PX).sum()


def _chosen(tap: RouterTap, places_P: Tensor, place_X: Tensor | None, *, count: int) -> Tensor:
    """(P, count) 1 where a compared expert is among the chosen ones."""
    choice_PK = tap.choice_BSK.flatten(0, 1).index_select(0, places_P)
    if place_X is not None:
        place_PK = place_X[choice_PK]
        choice_PK = torch.where(place_PK < 0, count, place_PK)
    chosen = torch.zeros(choice_PK.shape[0], count + 1, device=choice_PK.device)
    return chosen.scatter_(1, choice_PK, 1.0)[:, :count]


def _overlap(own_PC: Tensor, theirs_PC: Tensor) -> Tensor:
    """Σ_t |chosen by both| / |chosen by the teacher|; a token whose chosen experts are all left out adds 0."""
    both_P = (own_PC * theirs_PC).sum(-1)
    return (both_P / theirs_PC.sum(-1).clamp_min(1.0)).double().sum()


def _positions(batch: Batch) -> Tensor:
    """Flat positions of the student's samples, fill left out, whether or not there is a translation."""
    return FeaturePositions.of(replace(batch, translation=None)).student_P


def _compared(batch: Batch) -> int:
    if batch.translation is not None:
        return batch.translation.student_start_G.numel()
    return sum(segment.length for row in batch.segments for segment in row)


def expert_places(
    expert_map: Sequence[int] | None, *, student: int, teacher: int
) -> tuple[int, Mapping[str, Tensor | None]]:
    """How many experts are compared, and each side's places; `expert_map` as in the configuration, already checked."""
    if expert_map is None:
        assert student == teacher
        return student, {"student_X": None, "teacher_X": None}
    places = torch.tensor(list(expert_map))
    larger, compared = ("student", teacher) if student > teacher else ("teacher", student)
    kept = torch.zeros(compared, dtype=torch.bool)
    kept[places[places >= 0]] = True
    # An expert of the smaller model that none is mapped to is not compared either.
    order = torch.where(kept, kept.long().cumsum(0) - 1, -1)
    mapped_places = torch.where(places < 0, -1, order[places.clamp_min(0)])
    smaller = None if bool(kept.all()) else order
    sides = {f"{larger}_X": mapped_places, f"{'teacher' if larger == 'student' else 'student'}_X": smaller}
    return int(kept.sum()), sides
