"""Several teachers at once: the student learns from the weighted mixture of their probabilities.

Shape letters: M members, F figures of MIXTURE_NAMES.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largekd.config.teacher import ConfidenceWeightsConfig, LearnedWeightsConfig, RoutedWeightsConfig, WeightingConfig
from largekd.contracts import (
    MIXTURE_NAMES,
    Batch,
    HiddenSignal,
    MixtureSignal,
    SignalRequest,
    TapRequest,
    Taps,
    TeacherSignal,
)
from largekd.errors import CheckpointError, TeacherError
from largekd.runtime.files import read_json, write_json
from largekd.runtime.ranks import Ranks, all_sum
from largekd.teachers.protocol import Teacher, TeacherState

_WEIGHTS_FILE = "weights.json"


@dataclass(frozen=True)
class Member:
    """One of several teachers; `weight` is its share before all are divided by their sum."""

    name: str
    weight: float
    teacher: Teacher


class MixtureTeacher:
    """p(v) = Σ_m w_m · p_m(v), which the vocabulary pass evaluates from the members' hidden states and heads.

    Members are online teachers, or caches of hidden states. Each online one runs its forward on every batch, whatever
    the weights: ranks must call the same collectives. Captured activations come from the member at `taps_from` alone.

    Learned weights follow expectation maximisation, step by step: with the posterior r_m = w_m·p_m(y) / Σ of the labels
    y at temperature 1, w ← (1 − rate)·w + rate·mean r over the label tokens of all ranks. They stay a distribution; a
    weight of 0 stays 0. Source: Cappé and Moulines 2009 (online EM), arXiv 0712.4273, here with a constant step size.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        weighting: WeightingConfig,
        ranks: Ranks,
        device: torch.device,
        taps_from: int = 0,
    ) -> None:
        self._members = tuple(members)
        self._weighting = weighting
        self._ranks = ranks
        self._taps_from = taps_from
        shares = torch.tensor([member.weight for member in members], dtype=torch.float64)
        self._weight_M = (shares / shares.sum()).to(device)
        self._figures_FM: Tensor | None = None
        self._measured = False

    @property
    def weights(self) -> tuple[float, ...]:
        """The members' weights, which confidence or a record's own teacher may change token by token."""
        return tuple(self._weight_M.tolist())

    def check(self, request: SignalRequest) -> None:
        """Errors: TeacherError for less than whole distributions; whatever a member refuses."""
        if request.distribution not in ("full", None):
            raise TeacherError(
                "objective.signal.kind: a mixture of teachers (teacher.kind) needs their whole distributions, because "
                "the few ids that each of them would give are others; set it to full."
            )
        for place, member in enumerate(self._members):
            member.teacher.check(self._request_of(place, request=request))

    @contextmanager
    def signals(
        self, micro_batches: Sequence[Batch], *, request: SignalRequest
    ) -> Iterator[Iterator[TeacherSignal | None]]:
        """See Teacher.signals."""
        with ExitStack() as stack:
            streams = [
                stack.enter_context(
                    member.teacher.signals(micro_batches, request=self._request_of(place, request=request))
                )
                for place, member in enumerate(self._members)
            ]
            # All micro-batches of a step have the same weights.
            log_weight_M = self._weight_M.log().float()
            yield (
                self._combined(
                    [next(stream) for stream in streams], batch=batch, request=request, log_weight_M=log_weight_M
                )
                for batch in micro_batches
            )

    def _request_of(self, place: int, *, request: SignalRequest) -> SignalRequest:
        return request if place == self._taps_from else replace(request, taps=TapRequest())

    def _combined(
        self,
        signals: Sequence[TeacherSignal | None],
        *,
        batch: Batch,
        request: SignalRequest,
        log_weight_M: Tensor,
    ) -> TeacherSignal | None:
        tapped = signals[self._taps_from]
        if request.distribution is None:
            return tapped
        dense = tuple(signal for signal in signals if isinstance(signal, HiddenSignal))
        assert len(dense) == len(signals), "a mixture's members give whole distributions"
        routed = isinstance(self._weighting, RoutedWeightsConfig) and batch.teacher_BS is not None
        return MixtureSignal(
            members=dense,
            log_weight_M=log_weight_M,
            confidence_scale=self._weighting.scale if isinstance(self._weighting, ConfidenceWeightsConfig) else None,
            route_T=batch.teacher_BS.reshape(-1)[batch.counted_T] if routed and batch.teacher_BS is not None else None,
            learned=isinstance(self._weighting, LearnedWeightsConfig),
            taps=Taps() if tapped is None else tapped.taps,
        )

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        """Learn the weights. One all-reduce of a few numbers; nothing waits for the device."""
        for member in self._members:
            member.teacher.after_step(figures)
        if "mixture" not in figures:
            self._figures_FM = None
            return
        self._figures_FM = all_sum(figures["mixture"].double())
        self._measured = "health" in figures
        if isinstance(self._weighting, LearnedWeightsConfig):
            posterior_M = self._figures_FM[MIXTURE_NAMES.index("responsibility")]
            total, rate = posterior_M.sum(), self._weighting.rate
            # Without a label that all models have, the step says nothing.
            share_M = torch.where(total > 0, posterior_M / total.clamp_min(1e-300), self._weight_M)
            moved_M = (1.0 - rate) * self._weight_M + rate * share_M
            self._weight_M = moved_M / moved_M.sum()

    @property
    def state(self) -> TeacherState | None:
        """The learned weights, and what the members keep."""
        learned = isinstance(self._weighting, LearnedWeightsConfig)
        states = {member.name: member.teacher.state for member in self._members}
        return _MixtureState(self, states) if learned or any(state is not None for state in states.values()) else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last step: weights (learned: as they are now), and where it was measured each member's distance to the
        student and cross-entropy, per counted token; and what the members have to say."""
        values = {f"{name}/{m.name}": v for m in self._members for name, v in m.teacher.metrics.items()}
        names = [member.name for member in self._members]
        figures = None if self._figures_FM is None else dict(zip(MIXTURE_NAMES, self._figures_FM.tolist(), strict=True))
        tokens = 0.0 if figures is None else sum(figures["weight"])
        weights: Sequence[float] = self.weights
        if figures is not None and tokens and not isinstance(self._weighting, LearnedWeightsConfig):
            weights = [weight / tokens for weight in figures["weight"]]
        values |= {f"teacher/weight/{name}": weight for name, weight in zip(names, weights, strict=True)}
        if figures is not None and self._measured:
            for figure in ("kl_t1", "teacher_ce"):
                means = [total / tokens if tokens else math.nan for total in figures[figure]]
                values |= {f"kd/{figure}/{name}": mean for name, mean in zip(names, means, strict=True)}
        return values

    def close(self) -> None:
        """Release all members."""
        for member in self._members:
            member.teacher.close()

    def save(self, folder: Path) -> None:
        """Write the weights by name."""
        if self._ranks.is_main:
            names = [member.name for member in self._members]
            write_json(folder / _WEIGHTS_FILE, value=dict(zip(names, self.weights, strict=True)))

    def load(self, folder: Path) -> None:
        """Go on with saved weights. Errors: CheckpointError when they are of other teachers."""
        try:
            saved: dict[str, Any] = read_json(folder / _WEIGHTS_FILE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / _WEIGHTS_FILE}: cannot be read ({error})") from error
        names = [member.name for member in self._members]
        if sorted(saved) != sorted(names):
            raise CheckpointError(
                f"{folder / _WEIGHTS_FILE} holds weights of {', '.join(saved)}, and teacher.members are "
                f"{', '.join(names)}; resume with the configuration it was saved with, or set run.fresh=true"
            )
        self._weight_M = torch.tensor([saved[name] for name in names], dtype=torch.float64).to(self._weight_M.device)


@dataclass(frozen=True)
class _MixtureState:
    """The weights in the folder itself, each member's own state below its name."""

    mixture: MixtureTeacher
    members: Mapping[str, TeacherState | None]

    def save(self, folder: Path) -> None:
        self.mixture.save(folder)
        for name, state in self.members.items():
            if state is not None:
                (folder / name).mkdir(exist_ok=True)
                state.save(folder / name)

    def load(self, folder: Path) -> None:
        self.mixture.load(folder)
        for name, state in self.members.items():
            if state is not None:
                state.load(folder / name)
