"""Several teachers: what they ask of their members, how weights are learnt, kept and reported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from largekd.config.teacher import (
    ConfidenceWeightsConfig,
    FixedWeightsConfig,
    LearnedWeightsConfig,
    RoutedWeightsConfig,
)
from largekd.contracts import (
    Batch,
    HiddenSignal,
    MixtureSignal,
    SignalRequest,
    TapRequest,
    Taps,
    TapSignal,
    TopKRequest,
    VocabularyHead,
)
from largekd.errors import CheckpointError, TeacherError
from largekd.objectives.divergences import forward_kl
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass
from largekd.runtime.ranks import current_ranks
from largekd.teachers.mixture import Member, MixtureTeacher

TOKENS, WIDTH, VOCAB = 40, 8, 23


class StoredTeacher:
    """Answers every batch with the same hidden states, and notes what it was asked for."""

    def __init__(self, hidden_BSE: Tensor, head: VocabularyHead) -> None:
        self.hidden_BSE, self.head = hidden_BSE, head
        self.requests: list[SignalRequest] = []
        self.closed = False
        self.state = None
        self.metrics: Mapping[str, float] = {}

    def check(self, request: SignalRequest) -> None:
        self.requests.append(request)

    @contextmanager
    def signals(self, micro_batches: Sequence[Batch], *, request: SignalRequest) -> Iterator[Iterator]:
        self.requests.append(request)
        yield (self._answer(request) for _ in micro_batches)

    def _answer(self, request: SignalRequest):
        taps = Taps(hidden={layer: self.hidden_BSE for layer in request.taps.hidden})
        if request.distribution is None:
            return TapSignal(taps) if request.taps else None
        return HiddenSignal(self.hidden_BSE, self.head, taps=taps)

    def after_step(self, figures: Mapping[str, Tensor]) -> None:
        assert "mixture" in figures or not figures

    def close(self) -> None:
        self.closed = True


def make_batch() -> Batch:
    labels = torch.arange(TOKENS).remainder(VOCAB)[None]
    weight = torch.linspace(0.5, 1.5, TOKENS)[None]
    return Batch(labels, labels, weight, torch.arange(TOKENS))


def make_members(*, better: int = 0, strength: float = 3.0) -> list[StoredTeacher]:
    """Two teachers; `better` gives the labels `strength` nats more than the other does."""
    generator = torch.Generator().manual_seed(0)
    members = []
    for place in range(2):
        logits = torch.randn(1, TOKENS, VOCAB, generator=generator)
        if place == better:
            logits.scatter_add_(-1, make_batch().labels_BS[..., None], torch.full((1, TOKENS, 1), strength))
        members.append(StoredTeacher(logits, VocabularyHead(torch.eye(VOCAB), VOCAB)))
    return members


def mixture(members, weighting, weights=(1.0, 1.0), **options) -> MixtureTeacher:
    named = [Member(n, w, m) for n, w, m in zip(("left", "right"), weights, members, strict=True)]
    return MixtureTeacher(named, weighting=weighting, ranks=current_ranks(), device=torch.device("cpu"), **options)


def one_step(teacher: MixtureTeacher, *, batch: Batch | None = None, measure: bool = False) -> MixtureSignal:
    """A step's pass over one micro-batch, and what the teacher learns of it."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((1, TOKENS, WIDTH), (VOCAB, WIDTH)))
    module = VocabularyPass(terms=[VocabularyTerm("forward_kl", forward_kl)], chunk_tokens=16)
    batch = batch or make_batch()
    with torch.no_grad(), teacher.signals([batch], request=SignalRequest("full")) as signals:
        signal = next(signals)
        figures = module(
            hidden, weight, vocab_size=VOCAB, batch=batch, signal=signal, scales=torch.ones(1), measure=measure
        )
    teacher.after_step(figures)
    return signal


def test_fixed_weights_are_shares_and_stay() -> None:
    teacher = mixture(make_members(), FixedWeightsConfig(), weights=(3.0, 1.0))
    signal = one_step(teacher)
    assert signal.log_weight_M.exp().tolist() == pytest.approx([0.75, 0.25])
    assert not signal.learned and signal.confidence_scale is None and signal.route_T is None
    assert teacher.weights == (0.75, 0.25) and teacher.state is None
    assert teacher.metrics == {
        "teacher/weight/left": pytest.approx(0.75),
        "teacher/weight/right": pytest.approx(0.25),
    }


def test_weights_are_equal_unless_they_are_given() -> None:
    assert mixture(make_members(), FixedWeightsConfig()).weights == (0.5, 0.5)


@pytest.mark.parametrize("better", [0, 1])
def test_learned_weights_follow_expectation_maximisation_to_the_better_teacher(better) -> None:
    members, rate = make_members(better=better), 0.2
    teacher = mixture(members, LearnedWeightsConfig(kind="learned", rate=rate), weights=(2.0, 3.0))
    batch = make_batch()
    labels, token_weight = batch.labels_BS[0], batch.token_weight_BS[0].double()
    likelihood = torch.stack(
        [m.hidden_BSE[0].double().softmax(-1).gather(-1, labels[:, None]).squeeze(-1) for m in members], dim=-1
    )
    expected, fit = torch.tensor([0.4, 0.6], dtype=torch.float64), []
    for _ in range(60):
        one_step(teacher)
        fit.append(float((token_weight * (likelihood @ expected).log()).sum()))
        joint = expected * likelihood
        posterior = joint / joint.sum(-1, keepdim=True)
        expected = (1 - rate) * expected + rate * (token_weight @ posterior) / token_weight.sum()
        assert teacher.weights == pytest.approx(expected.tolist(), abs=1e-5)
        assert sum(teacher.weights) == pytest.approx(1.0, abs=1e-12) and min(teacher.weights) >= 0
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(fit))
    assert teacher.weights[better] > 0.9
    assert teacher.metrics["teacher/weight/left"] == pytest.approx(teacher.weights[0])


def test_a_step_without_labels_and_a_weight_of_zero_teach_nothing() -> None:
    learned = LearnedWeightsConfig(kind="learned", rate=1.0)
    teacher = mixture(make_members(better=1), learned, weights=(1.0, 3.0))
    nothing = Batch(make_batch().input_ids_BS, make_batch().labels_BS, torch.ones(1, TOKENS), torch.arange(0))
    one_step(teacher, batch=nothing)
    assert teacher.weights == (0.25, 0.75)
    certain = mixture(make_members(better=1), learned, weights=(1.0, 0.0))
    one_step(certain)
    assert certain.weights == (1.0, 0.0)


def test_metrics_of_weights_by_confidence_are_means_over_tokens() -> None:
    members = make_members(strength=6.0)
    teacher = mixture(members, ConfidenceWeightsConfig(kind="confidence", scale=0.5))
    one_step(teacher)
    entropy = []
    for member in members:
        p = member.hidden_BSE[0].double().softmax(-1)
        entropy.append(-(p * p.log()).sum(-1))
    share = torch.softmax(-torch.stack(entropy, dim=-1) / 0.5, dim=-1)
    mean = make_batch().token_weight_BS[0].double() @ share / make_batch().token_weight_BS.double().sum()
    assert teacher.metrics["teacher/weight/left"] == pytest.approx(float(mean[0]), rel=1e-5)
    assert float(mean[0]) > 0.6, "the surer one counts more"


def test_a_record_may_name_its_teacher() -> None:
    teacher = mixture(make_members(), RoutedWeightsConfig(kind="routed"), weights=(1.0, 3.0))
    named = torch.full((1, TOKENS), -1)
    named[0, :10], named[0, 10:15] = 1, 0
    batch = Batch(make_batch().input_ids_BS, make_batch().labels_BS, torch.ones(1, TOKENS), torch.arange(5, TOKENS),
                  teacher_BS=named)  # fmt: skip
    signal = one_step(teacher, batch=batch)
    assert torch.equal(signal.route_T, named[0, 5:])
    assert teacher.metrics["teacher/weight/right"] == pytest.approx((5 + 0.75 * 25) / 35)
    assert one_step(teacher).route_T is None


def test_distances_are_reported_only_where_they_were_measured() -> None:
    teacher = mixture(make_members(), FixedWeightsConfig())
    one_step(teacher, measure=True)
    found = teacher.metrics
    assert {name for name in found if name.startswith("kd/")} == {
        f"kd/{figure}/{name}" for figure in ("kl_t1", "teacher_ce") for name in ("left", "right")
    }
    batch, member = make_batch(), make_members()[0]
    own = -member.hidden_BSE[0].double().log_softmax(-1).gather(-1, batch.labels_BS[0][:, None]).squeeze(-1)
    weight = batch.token_weight_BS[0].double()
    assert found["kd/teacher_ce/left"] == pytest.approx(float((weight * own).sum() / weight.sum()), rel=1e-5)
    assert found["kd/teacher_ce/left"] < found["kd/teacher_ce/right"]
    one_step(teacher)
    assert not any(name.startswith("kd/") for name in teacher.metrics)


def test_activations_come_from_one_member() -> None:
    members = make_members()
    teacher = mixture(members, FixedWeightsConfig(), taps_from=1)
    request = SignalRequest("full", TapRequest(hidden=(2,)))
    teacher.check(request)
    with teacher.signals([make_batch()] * 2, request=request) as signals:
        found = list(signals)
    assert len(found) == 2 and found[0].taps.hidden[2] is members[1].hidden_BSE
    assert all(not asked.taps for asked in members[0].requests) and members[1].requests[-1] == request
    with teacher.signals([make_batch()], request=SignalRequest(None, request.taps)) as signals:
        assert isinstance(next(signals), TapSignal)
    assert members[0].requests[-1] == SignalRequest()


def test_requests_that_cannot_be_served_are_refused() -> None:
    members = make_members()
    teacher = mixture(members, FixedWeightsConfig())
    with pytest.raises(TeacherError, match=r"objective\.signal\.kind: .*whole distributions"):
        teacher.check(SignalRequest(TopKRequest(k=4)))


def test_learned_weights_survive_in_a_folder_and_those_of_others_are_refused(tmp_path) -> None:
    weighting = LearnedWeightsConfig(kind="learned", rate=0.3)
    teacher = mixture(make_members(), weighting)
    for _ in range(3):
        one_step(teacher)
    teacher.state.save(tmp_path)
    fresh = mixture(make_members(), weighting)
    assert fresh.weights != teacher.weights
    fresh.state.load(tmp_path)
    assert fresh.weights == teacher.weights
    (tmp_path / "weights.json").write_text('{"left": 0.5, "middle": 0.5}')
    with pytest.raises(CheckpointError, match=r"left, middle, and teacher\.members are left, right"):
        fresh.state.load(tmp_path)
    (tmp_path / "weights.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        fresh.state.load(tmp_path)


def test_closing_closes_all() -> None:
    members = make_members()
    mixture(members, FixedWeightsConfig()).close()
    assert all(member.closed for member in members)
