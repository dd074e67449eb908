"""The policy gradient against an enumeration of all sequences, and its place in the fused pass."""

import itertools

import numpy as np
import pytest
import torch
from tiny import make_rows

from largekd.config.objective import ObjectiveConfig
from largekd.config.rollouts import PolicyGradientConfig, RolloutConfig
from largekd.objectives.policy import advantages, clipped_terms, returns_to_go
from largekd.objectives.terms import PolicyGradient, VocabularyTerm, build_objective
from largekd.objectives.vocabulary import VocabularyPass

VOCAB, LONGEST, END = 5, 3, 0


def _sequences() -> list[tuple[int, ...]]:
    """All sequences that end with END or at the greatest length."""
    found = []
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(VOCAB), repeat=length):
            if END not in ids[:-1] and (ids[-1] == END or length == LONGEST):
                found.append(ids)
    return found


class _Table:
    """A model with its own logits after every prefix, in float64."""

    def __init__(self, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LONGEST) for p in itertools.product(range(1, VOCAB), repeat=n)]
        self.place = {prefix: index for index, prefix in enumerate(prefixes)}
        self.logits = torch.randn(len(prefixes), VOCAB, dtype=torch.float64, generator=generator).requires_grad_()

    def logq(self, ids: tuple[int, ...]) -> torch.Tensor:
        rows = self.logits.log_softmax(-1)
        return torch.stack([rows[self.place[ids[:t]], ids[t]] for t in range(len(ids))])


def _expected_surrogate(student: _Table, teacher: _Table, *, clip: float | None, baseline: str) -> torch.Tensor:
    """E over all pairs of independent samples of the estimator, halved: two samples make a group."""
    config = PolicyGradientConfig(baseline=baseline, clip=clip)
    total = torch.zeros((), dtype=torch.float64)
    sequences = _sequences()
    known = {ids: (student.logq(ids), (teacher.logq(ids) - student.logq(ids)).detach().numpy()) for ids in sequences}
    chance = {ids: float(known[ids][0].sum().exp().detach()) for ids in sequences}
    coefficient = {ids: np.zeros(len(ids)) for ids in sequences}
    for first, second in itertools.product(sequences, repeat=2):
        given = advantages([known[first][1], known[second][1]], groups=[0, 0], config=config)
        coefficient[first] += chance[first] * chance[second] * given[0]
    for ids in sequences:
        logq, _ = known[ids]
        value, slope = clipped_terms(
            logq.detach(), sampled_logq_T=logq.detach(), advantage_T=torch.tensor(coefficient[ids]), clip=clip
        )
        assert torch.equal(value, -torch.tensor(coefficient[ids]))
        total = total + (slope * logq).sum()
    return total


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_its_mean_is_the_gradient_of_sequence_level_reverse_kl(baseline, clip):
    student, teacher = _Table(seed=1), _Table(seed=2)
    joint = {ids: student.logq(ids).sum() for ids in _sequences()}
    assert float(torch.stack(list(joint.values())).exp().sum().detach()) == pytest.approx(1.0)
    kl = sum(logq.exp() * (logq - teacher.logq(ids).sum().detach()) for ids, logq in joint.items())
    (expected,) = torch.autograd.grad(kl, student.logits)
    surrogate = _expected_surrogate(student, teacher, clip=clip, baseline=baseline)
    (found,) = torch.autograd.grad(surrogate, student.logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(expected.abs().max()) > 0.01


def test_a_mean_baseline_shrinks_the_gradient_by_the_samples_own_share():
    student, teacher = _Table(seed=1), _Table(seed=2)
    exact = torch.autograd.grad(_expected_surrogate(student, teacher, clip=None, baseline="none"), student.logits)[0]
    mean = torch.autograd.grad(_expected_surrogate(student, teacher, clip=None, baseline="batch_mean"), student.logits)
    assert float((mean[0] - exact).abs().max()) > 1e-4


def test_returns_and_baselines_by_hand():
    rewards = np.array([1.0, 2.0, 4.0])
    assert returns_to_go(rewards, discount=1.0, length_normalise=False).tolist() == [7.0, 6.0, 4.0]
    assert returns_to_go(rewards, discount=0.5, length_normalise=False).tolist() == [3.0, 4.0, 4.0]
    assert returns_to_go(rewards, discount=1.0, length_normalise=True).tolist() == [7 / 3, 3.0, 4.0]
    samples = [rewards, np.array([10.0]), np.array([1.0, 1.0])]
    config = PolicyGradientConfig(baseline="leave_one_out")
    found = advantages([*samples, np.array([5.0])], groups=[0, 0, 1, 1], config=config)
    assert [one.tolist() for one in found] == [[-3.0, 6.0, 4.0], [3.0], [-3.0, 1.0], [3.0]]
    with pytest.raises(AssertionError, match="no other sample"):
        advantages(samples, groups=[0, 0, 1], config=config)
    found = advantages(samples, groups=[0, 0, 1], config=PolicyGradientConfig(baseline="batch_mean"))
    assert found[1].tolist() == pytest.approx([10 - (7 + 6 + 4 + 10 + 2 + 1) / 6])


def test_clipping_stops_the_slope_on_the_side_that_the_advantage_points_to():
    logq = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    value, slope = clipped_terms(logq, sampled_logq_T=torch.zeros(5), advantage_T=advantage, clip=0.2)
    ratio = logq.exp()
    assert value.tolist() == pytest.approx([-1.2, float(ratio[1]), -float(ratio[2]), 0.8, -2.0])
    assert slope.tolist() == pytest.approx([0.0, float(ratio[1]), -float(ratio[2]), 0.0, -2.0])


def _batch(*, seed: int = 5):
    from dataclasses import replace

    batch = make_rows(count=4, packed=True, seed=seed, vocab=31)[3]
    generator = torch.Generator().manual_seed(8)
    shape = batch.input_ids_BS.shape
    sampled = (torch.rand(shape, generator=generator) < 0.5).float()
    return replace(
        batch,
        sampled_BS=sampled,
        task_weight_BS=batch.token_weight_BS * (1 - sampled),
        advantage_BS=torch.randn(shape, generator=generator) * sampled,
        sampled_logq_BS=(-3.4 + 0.3 * torch.randn(shape, generator=generator)) * sampled,
    )


def test_the_fused_pass_equals_autograd_on_full_logits():
    batch = _batch()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 24, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(31, 8, dtype=torch.float64, generator=generator)).requires_grad_()
    terms = (VocabularyTerm("cross_entropy", None), VocabularyTerm("policy_gradient", PolicyGradient(clip=0.2)))
    scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
    outputs = VocabularyPass(terms=terms, chunk_tokens=5)(
        hidden, weight, vocab_size=31, batch=batch, signal=None, scales=scales
    )
    found = torch.autograd.grad(outputs["loss"], [hidden, weight])

    def flat(name):
        return getattr(batch, name).flatten()[batch.counted_T].double()

    labels = batch.labels_BS.flatten()[batch.counted_T]
    logits = hidden.reshape(-1, 8)[batch.counted_T] @ weight.t()
    logq = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    ratio, advantage = (logq - flat("sampled_logq_BS")).exp(), flat("advantage_BS")
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = torch.stack([(-logq * flat("task_weight_BS")).sum(), (policy * flat("token_weight_BS")).sum()])
    clipped = (ratio.clamp(0.8, 1.2) * advantage < ratio * advantage).sum()
    assert 0 < int(clipped) < int(flat("sampled_BS").sum())
    torch.testing.assert_close(outputs["sums"], expected.detach(), rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad((expected * scales).sum(), [hidden, weight])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_rows_of_data_alone_leave_the_term_at_zero():
    batch = make_rows(count=4, packed=True, vocab=31)[3]
    hidden = torch.randn(1, 24, 8, requires_grad=True)
    terms = (VocabularyTerm("policy_gradient", PolicyGradient(clip=0.2)),)
    outputs = VocabularyPass(terms=terms, chunk_tokens=5)(
        hidden, torch.randn(31, 8), vocab_size=31, batch=batch, signal=None, scales=torch.ones(1)
    )
    outputs["loss"].backward()
    assert outputs["sums"].tolist() == [0.0] and float(hidden.grad.abs().sum()) == 0.0


def test_the_objective_has_the_term_only_where_rows_are_generated():
    rollouts = RolloutConfig(
        share=0.5, prompt_tokens=4, max_new_tokens=4, samples_per_prompt=2, policy_gradient={"weight": 0.5}
    )
    with_it = build_objective(ObjectiveConfig(alpha=0.9), rollouts=rollouts)
    assert [summand.name for summand in with_it.summands] == ["cross_entropy", "forward_kl", "policy_gradient"]
    assert with_it.factors(step=0, max_steps=2) == pytest.approx((0.1, 0.9, 0.5))
    for absent in (None, rollouts.model_copy(update={"share": 0.0})):
        assert build_objective(ObjectiveConfig(alpha=0.9), rollouts=absent) == build_objective(
            ObjectiveConfig(alpha=0.9)
        )
