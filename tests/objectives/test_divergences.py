"""The row functions by themselves: values, slopes, limits."""

import math

import pytest
import torch
from vocabulary_reference import divergence64

from largekd.objectives.divergences import (
    JSD,
    LOG_FLOOR,
    AdaptiveKL,
    AlphaBeta,
    BidirectionalKL,
    DistributionPair,
    Divergence,
    RankingHinge,
    SkewedForwardKL,
    SkewedReverseKL,
    cross_entropy,
    entropy,
    forward_kl,
    log_probabilities,
    logit_gradient,
    logit_mse,
    reverse_kl,
    sorted_distance,
    total_variation,
)

DIVERGENCES: dict[str, tuple[Divergence, dict[str, float]]] = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "bidirectional_kl": (
        BidirectionalKL(forward_weight=0.3, reverse_weight=1.1),
        dict(forward_weight=0.3, reverse_weight=1.1),
    ),
    "jsd": (JSD(mix=0.2), dict(mix=0.2)),
    "skewed_forward_kl": (SkewedForwardKL(skew=0.15), dict(skew=0.15)),
    "skewed_reverse_kl": (SkewedReverseKL(skew=0.15), dict(skew=0.15)),
    "adaptive_kl": (AdaptiveKL(head_mass=0.6), dict(head_mass=0.6)),
    "total_variation": (total_variation, {}),
    "alpha_beta": (AlphaBeta(alpha=0.4, beta=0.7), dict(alpha=0.4, beta=0.7)),
    "logit_mse": (logit_mse, {}),
    "ranking_hinge": (RankingHinge(top_k=7, margin=1.5), dict(top_k=7, margin=1.5)),
    "sorted_distance": (sorted_distance, {}),
}
# Functions whose value at q = p is not the least they can have, or that see the order alone.
NOT_A_DISTANCE = {"ranking_hinge"}
# Functions that no merging of outcomes can increase: f-divergences.
DATA_PROCESSING: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "bidirectional_kl": BidirectionalKL(forward_weight=0.3, reverse_weight=1.1),
    "jsd": JSD(mix=0.2),
    "skewed_forward_kl": SkewedForwardKL(skew=0.15),
    "skewed_reverse_kl": SkewedReverseKL(skew=0.15),
    "total_variation": total_variation,
}
INF = float("inf")


def logits(rows: int = 5, ids: int = 17, *, std: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(rows, ids, generator=g) * std).double() for _ in range(2))


def pair_of(teacher: torch.Tensor, student: torch.Tensor) -> DistributionPair:
    return DistributionPair.of_logits(teacher_RV=teacher, student_RV=student)


def gradient(
    divergence: str | Divergence, teacher: torch.Tensor, student: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    pair = pair_of(teacher, student)
    value, slope = (DIVERGENCES[divergence][0] if isinstance(divergence, str) else divergence)(pair)
    return value, logit_gradient(pair.student_q_RV, slope, slope.sum(-1))


@pytest.mark.parametrize("ids", [401, 1, 2])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient(name, ids) -> None:
    if name == "ranking_hinge" and ids == 1:
        pytest.skip("one id has no pairs; see the test of too few pairs")
    teacher, student = logits(41, ids)
    student.requires_grad_()
    expected = divergence64(name, teacher.softmax(-1), student.softmax(-1), **DIVERGENCES[name][1])
    if name == "adaptive_kl" and ids == 1:
        expected = 0.0 * student.sum(-1)  # the reference divides by gaps of 0
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    value, actual = gradient(name, teacher, student.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mass", [1.0, 0.7])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_slope_is_the_derivative_by_each_log_probability(name, mass) -> None:
    """Rows need not be complete: with a mass of 0.7 a constant times q would not cancel."""
    teacher, student = logits(41, 401)
    logp = teacher.log_softmax(-1) + math.log(mass)
    logq = (student.log_softmax(-1) + math.log(mass)).requires_grad_()
    expected = divergence64(name, logp.exp(), logq.exp(), **DIVERGENCES[name][1])
    (wanted,) = torch.autograd.grad(expected.sum(), logq)
    pair = DistributionPair.of_logs(teacher_logp_RV=logp, student_logq_RV=logq.detach())
    value, slope = DIVERGENCES[name][0](pair)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_arithmetic_on_inputs_of_any_dtype(name, dtype) -> None:
    """The inputs are rounded first, so that only the arithmetic differs from the reference."""
    teacher, student = (x.to(dtype).double() for x in logits(41, 401))
    # bf16 rounds many logits to the same number; a ranking's reference expects no ties among the teacher's first.
    teacher += torch.linspace(0, 1e-3, 401).double()
    student += torch.linspace(0, 1e-3, 401).double()
    student.requires_grad_()
    expected = divergence64(name, teacher.softmax(-1), student.softmax(-1), **DIVERGENCES[name][1])
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    value, actual = gradient(name, teacher.float(), student.detach().float())
    assert value.dtype == actual.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_large_vocabulary_in_float32(name) -> None:
    """Sums of 150,000 numbers keep their digits."""
    teacher, student = (x.float() for x in logits(2, 151_936))
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = divergence64(name, p, q, **DIVERGENCES[name][1])
    value, slope = gradient(name, teacher, student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    _, exact = gradient(name, teacher.double(), student.double())
    assert ((slope - exact).abs().sum(-1) < 1e-4 * exact.abs().sum(-1)).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_do_not_see_each_other(name) -> None:
    teacher, student = (x.float() for x in logits(9, 33))
    value, slope = gradient(name, teacher, student)
    parts = [gradient(name, teacher[rows], student[rows]) for rows in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(value, torch.cat([part[0] for part in parts]))
    torch.testing.assert_close(slope, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("name", DIVERGENCES.keys() - NOT_A_DISTANCE)
def test_nothing_to_learn_from_an_equal(name) -> None:
    teacher, _ = (x.float() for x in logits(41, 401))
    value, slope = gradient(name, teacher, teacher.clone())
    torch.testing.assert_close(value, torch.zeros(41), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope, torch.zeros(41, 401), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_column_that_both_lack_does_not_exist(name) -> None:
    teacher, student = logits()
    teacher[:, [2, 9]] = student[:, [2, 9]] = -INF
    kept = [i for i in range(17) if i not in (2, 9)]
    value, slope = gradient(name, teacher.float(), student.float())
    expected_value, expected_slope = gradient(name, teacher[:, kept].float(), student[:, kept].float())
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(slope[:, kept], expected_slope)
    assert not slope[:, [2, 9]].any()


@pytest.mark.parametrize("std", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_both_sides_may_underflow(name, std) -> None:
    teacher, student = (x.float() for x in logits(std=std))
    value, slope = gradient(name, teacher, student)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert (value >= -1e-6).all()
    torch.testing.assert_close(slope.sum(-1), torch.zeros(5), atol=1e-2 * std, rtol=0)


def corners() -> torch.Tensor:
    """(rows, 6) logits: certain of one id, of another, of two, of ids at the float's edge, uniform, one id left."""
    rows = torch.full((6, 6), -INF)
    rows[0, 0] = 0.0
    rows[1, 5] = 0.0
    rows[2, :2] = 0.0
    rows[3] = torch.tensor([0.0, -87.0, -103.0, -110.0, -5000.0, -9.9e3])
    rows[4] = 0.0
    rows[5] = torch.tensor([3e4, -3e4, 0.0, 3e4, -INF, 1.0])
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha_beta_small", "skew_tiny"])
def test_every_corner_is_finite(name, dtype) -> None:
    extra = {"alpha_beta_small": AlphaBeta(alpha=1e-3, beta=1e-2), "skew_tiny": SkewedReverseKL(skew=1e-6)}
    divergence = extra.get(name) or DIVERGENCES[name][0]
    teacher = corners().to(dtype).repeat_interleave(6, dim=0)
    student = corners().to(dtype).repeat(6, 1)
    value, slope = gradient(divergence, teacher, student)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert (value >= -1e-6).all()
    same = value.view(6, 6).diagonal()
    if name not in NOT_A_DISTANCE:
        torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6, rtol=0)


@pytest.mark.parametrize("zero", [-INF, -1e4, -200.0])
def test_one_hot_teacher_is_cross_entropy(zero) -> None:
    _, student = (x.float() for x in logits())
    label = torch.tensor([3, 0, 16, 5, 5])
    teacher = torch.full((5, 17), zero)
    teacher[torch.arange(5), label] = 0.0
    value, slope = gradient("forward_kl", teacher, student)
    torch.testing.assert_close(value, cross_entropy(log_probabilities(student), label))
    torch.testing.assert_close(slope, student.softmax(-1) - torch.nn.functional.one_hot(label, 17))


def test_teacher_without_mass_somewhere() -> None:
    """JSD keeps its bound; reverse KL is large but finite and pushes the student's mass away."""
    teacher, student = (x.float() for x in logits())
    teacher[:, 4] = -INF
    q = student.softmax(-1)
    value, slope = gradient("jsd", teacher, student)
    expected = divergence64("jsd", teacher.double().softmax(-1), q.double(), 0.2)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(slope).all()
    value, slope = gradient("reverse_kl", teacher, student)
    assert torch.isfinite(value).all() and (value > -0.5 * LOG_FLOOR * q[:, 4]).all()
    assert (slope[:, 4] > 0).all()


def test_jsd_mix_is_the_teachers_share() -> None:
    """mix → 1: the mixture is the teacher, D / (1 − mix) → KL(student‖teacher); mix → 0 the other way round."""
    teacher, student = logits(std=1.0)
    pair = DistributionPair.of_logits(teacher_RV=teacher, student_RV=student)
    near_one, near_zero = JSD(mix=1 - 1e-6)(pair)[0] / 1e-6, JSD(mix=1e-6)(pair)[0] / 1e-6
    torch.testing.assert_close(near_one, reverse_kl(pair)[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_zero, forward_kl(pair)[0], rtol=1e-3, atol=1e-4)
    assert (forward_kl(pair)[0] - reverse_kl(pair)[0]).abs().min() > 0.01


def test_jsd_is_symmetric_at_one_half_and_bounded() -> None:
    teacher, student = logits(std=30.0)
    one, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=teacher, student_RV=student))
    other, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=student, student_RV=teacher))
    torch.testing.assert_close(one, other)
    assert (one <= math.log(2) + 1e-12).all() and one.max() > 0.6
    disjoint = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    value, _ = JSD(mix=0.5)(DistributionPair.of_logits(teacher_RV=disjoint[0], student_RV=disjoint[1]))
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)


def test_entropy_of_the_uniform_distribution() -> None:
    logp = log_probabilities(torch.zeros(2, 50))
    torch.testing.assert_close(entropy(logp, logp.exp()), torch.full((2,), math.log(50)))


def test_equal_parameters_are_equal_functions() -> None:
    """They key compiled forms."""
    made = [
        (BidirectionalKL(0.5, 0.5), BidirectionalKL(0.5, 0.5), BidirectionalKL(0.5, 0.4)),
        (SkewedForwardKL(0.1), SkewedForwardKL(0.1), SkewedReverseKL(0.1)),
        (AdaptiveKL(0.5), AdaptiveKL(0.5), AdaptiveKL(0.6)),
        (AlphaBeta(0.5, 0.5), AlphaBeta(0.5, 0.5), AlphaBeta(0.5, 0.6)),
        (RankingHinge(8, 1.0), RankingHinge(8, 1.0), RankingHinge(9, 1.0)),
    ]
    for one, same, other in made:
        assert hash(one) == hash(same) and one == same and one != other


def test_bidirectional_is_the_sum_of_both_directions() -> None:
    teacher, student = logits()
    pair = pair_of(teacher, student)
    value, slope = BidirectionalKL(forward_weight=0.3, reverse_weight=2.0)(pair)
    parts = forward_kl(pair), reverse_kl(pair)
    torch.testing.assert_close(value, 0.3 * parts[0][0] + 2.0 * parts[1][0])
    torch.testing.assert_close(slope, 0.3 * parts[0][1] + 2.0 * parts[1][1])


@pytest.mark.parametrize(
    ("skewed", "plain"), [(SkewedForwardKL(skew=0.0), forward_kl), (SkewedReverseKL(skew=0.0), reverse_kl)]
)
def test_no_skew_is_plain_kl(skewed, plain) -> None:
    teacher, student = (x.float() for x in logits(std=100.0))
    student[:, 3] = -INF
    for actual, expected in zip(skewed(pair_of(teacher, student)), plain(pair_of(teacher, student)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("skewed", "plain"), [(SkewedForwardKL(skew=1e-8), forward_kl), (SkewedReverseKL(skew=1e-8), reverse_kl)]
)
def test_a_vanishing_skew_tends_to_plain_kl(skewed, plain) -> None:
    pair = pair_of(*logits())
    for actual, expected in zip(skewed(pair), plain(pair), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", [SkewedForwardKL, SkewedReverseKL])
def test_skew_bounds_the_value_at_disjoint_supports(kind, skew) -> None:
    value, _ = gradient(kind(skew=skew), torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]]))
    assert value.item() == pytest.approx(-math.log(skew), rel=1e-5)
    value, _ = gradient(kind(skew=skew), *logits(64, 33, std=30.0))
    assert (value <= -math.log(skew) + 1e-12).all() and (value >= 0).all() and value.max() > 0.5 * -math.log(skew)


def test_adaptive_lies_between_both_directions() -> None:
    pair = pair_of(*logits(64, 33))
    value, _ = AdaptiveKL(head_mass=0.5)(pair)
    both = torch.stack([forward_kl(pair)[0], reverse_kl(pair)[0]])
    assert (value >= both.amin(0) - 1e-12).all() and (value <= both.amax(0) + 1e-12).all()
    assert ((value - both[0]).abs() > 1e-3).any() and ((value - both[1]).abs() > 1e-3).any()


def test_adaptive_weights_by_the_gaps() -> None:
    """Head {0}: gap 0.3; tail: 0.1 + 0.2. Then with the mass of the head raised: {0, 1}, gaps 0.4 and 0.2."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.4, 0.4]])
    pair = DistributionPair.of_logs(teacher_logp_RV=p.log(), student_logq_RV=q.log())
    forward, reverse = forward_kl(pair)[0].item(), reverse_kl(pair)[0].item()
    assert forward - reverse > 0.01
    assert AdaptiveKL(head_mass=0.4)(pair)[0].item() == pytest.approx(0.5 * forward + 0.5 * reverse, rel=1e-5)
    assert AdaptiveKL(head_mass=0.6)(pair)[0].item() == pytest.approx((2 * forward + reverse) / 3, rel=1e-5)


def test_adaptive_head_ends_where_its_mass_is_reached() -> None:
    """The first id has half of the mass exactly, so that it is the head alone: gaps 0.125 and 0.125 + 0.25."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.375, 0.125, 0.5]])
    pair = DistributionPair.of_logs(teacher_logp_RV=p.log(), student_logq_RV=q.log())
    expected = 0.25 * forward_kl(pair)[0] + 0.75 * reverse_kl(pair)[0]
    torch.testing.assert_close(AdaptiveKL(head_mass=0.5)(pair)[0], expected)


def test_adaptive_ignores_the_order_of_ties() -> None:
    """Three ids tie where the head ends: all of them are in it, wherever they stand."""
    p = torch.tensor([[0.4, 0.15, 0.15, 0.15, 0.1, 0.05]])
    q = torch.tensor([[0.3, 0.05, 0.20, 0.15, 0.1, 0.2]])
    gap = (p - q).abs()
    pair = DistributionPair.of_logs(teacher_logp_RV=p.log(), student_logq_RV=q.log())
    share = gap[:, :4].sum() / gap.sum()
    expected = share * forward_kl(pair)[0] + (1 - share) * reverse_kl(pair)[0]
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 1, 0, 4, 2], [2, 1, 0, 3, 5, 4]):
        moved = DistributionPair.of_logs(teacher_logp_RV=p[:, order].log(), student_logq_RV=q[:, order].log())
        torch.testing.assert_close(AdaptiveKL(head_mass=0.5)(moved)[0], expected)


def test_adaptive_with_a_row_that_never_reaches_the_head() -> None:
    """All of it is head: forward KL."""
    logp, logq = (x.log_softmax(-1) + math.log(0.3) for x in logits())
    pair = DistributionPair.of_logs(teacher_logp_RV=logp, student_logq_RV=logq)
    value, slope = AdaptiveKL(head_mass=0.5)(pair)
    torch.testing.assert_close(value, forward_kl(pair)[0])
    torch.testing.assert_close(slope, forward_kl(pair)[1])


def test_total_variation_bounds() -> None:
    teacher, student = logits(64, 33)
    pair = pair_of(teacher, student)
    value, _ = total_variation(pair)
    assert (value >= 0).all() and (value <= 1).all()
    assert (value.square() <= forward_kl(pair)[0] / 2).all(), "Pinsker"
    assert (value.square() <= reverse_kl(pair)[0] / 2).all(), "Pinsker"
    disjoint = pair_of(torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([[-INF, -INF, 0.0]]))
    assert total_variation(disjoint)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("alpha", "beta", "plain"),
    [(1.0, 1e-6, forward_kl), (1e-6, 1.0, reverse_kl)],
)
def test_alpha_beta_limits(alpha, beta, plain) -> None:
    pair = pair_of(*logits(64, 33))
    value, slope = AlphaBeta(alpha=alpha, beta=beta)(pair)
    expected_value, expected_slope = plain(pair)
    torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-6)
    q = pair.student_q_RV
    torch.testing.assert_close(
        logit_gradient(q, slope, slope.sum(-1)),
        logit_gradient(q, expected_slope, expected_slope.sum(-1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_alpha_beta_closed_forms() -> None:
    """(½, ½): twice the squared distance of square roots. (1, 1): half of the squared distance."""
    pair = pair_of(*logits())
    p, q = pair.teacher_p_RV, pair.student_q_RV
    torch.testing.assert_close(AlphaBeta(0.5, 0.5)(pair)[0], 2 * (p.sqrt() - q.sqrt()).square().sum(-1))
    torch.testing.assert_close(AlphaBeta(1.0, 1.0)(pair)[0], 0.5 * (p - q).square().sum(-1))


def test_small_powers_keep_their_digits_in_float32() -> None:
    """The textbook form divides a rounded difference by αβ = 10⁻⁴; taken per outcome it is divided by 10⁻² only."""
    teacher, student = logits(41, 401)
    expected = divergence64("alpha_beta", teacher.softmax(-1), student.softmax(-1), alpha=0.01, beta=0.01)
    value, _ = AlphaBeta(alpha=0.01, beta=0.01)(pair_of(teacher.float(), student.float()))
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)


def test_small_powers_of_nothing_are_nothing() -> None:
    """exp(0.01 · LOG_FLOOR) is no zero in float64, exp(0.001 · LOG_FLOOR) in no dtype."""
    teacher, student = logits()
    teacher[:, [2, 5]], student[:, [2, 9]] = -INF, -INF
    p, q = teacher.softmax(-1), student.softmax(-1)
    for alpha, beta in ((0.001, 0.001), (0.001, 0.002)):
        expected = divergence64("alpha_beta", p, q, alpha=alpha, beta=beta)
        value, _ = AlphaBeta(alpha=alpha, beta=beta)(pair_of(teacher, student))
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("plain", [forward_kl, reverse_kl])
def test_a_high_temperature_makes_kl_a_square(plain) -> None:
    teacher, student = logits(41, 401)
    centred = [x - x.mean(-1, keepdim=True) for x in (teacher, student)]
    square = (centred[0] - centred[1]).square().mean(-1) / 2
    errors = []
    for temperature in (1e2, 1e3):
        pair = pair_of(teacher / temperature, student / temperature)
        torch.testing.assert_close(temperature**2 * logit_mse(pair)[0], square)
        errors.append((temperature**2 * plain(pair)[0] / square - 1).abs().max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 5


def test_logit_mse_counts_the_ids_that_both_can_name() -> None:
    teacher, student = logits()
    teacher[:, 2], student[:, 9] = -INF, -INF
    kept = [i for i in range(17) if i not in (2, 9)]
    value, slope = gradient("logit_mse", teacher, student)
    expected_value, expected_slope = gradient("logit_mse", teacher[:, kept], student[:, kept])
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(slope[:, kept], expected_slope)
    torch.testing.assert_close(slope[:, [2, 9]], torch.zeros(5, 2).double(), atol=1e-12, rtol=0)


def test_ranking_is_content_with_the_right_order() -> None:
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    value, slope = gradient(RankingHinge(top_k=4, margin=1.0), teacher, 2 * teacher)
    assert value.item() == 0.0 and not slope.any()
    # Pairs (0,1), (0,2), (1,2) of a student that has them the other way round: 1 + 1, 1 + 2, 1 + 1.
    value, slope = gradient(RankingHinge(top_k=3, margin=1.0), teacher, -teacher)
    assert value.item() == pytest.approx((2 + 3 + 2) / 3)
    torch.testing.assert_close(slope, torch.tensor([[-2 / 3, 0.0, 2 / 3, 0.0, 0.0]]), atol=1e-6, rtol=0)


def test_ranking_leaves_out_ties_and_impossible_ids() -> None:
    """Of 0, 1, 2, 3 the first two tie, 3 is ruled out by the student: pairs (0,2) and (1,2) are left."""
    teacher = torch.tensor([[2.0, 2.0, 1.0, 0.5]])
    student = torch.tensor([[0.0, 5.0, 1.0, -INF]])
    value, slope = gradient(RankingHinge(top_k=4, margin=1.0), teacher, student)
    assert value.item() == pytest.approx((2.0 + 0.0) / 2)
    torch.testing.assert_close(slope, torch.tensor([[-0.5, 0.0, 0.5, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("teacher", [[[0.0]], [[1.0, -INF]], [[1.0, 1.0, 1.0]]])
def test_ranking_with_too_few_pairs(teacher) -> None:
    teacher = torch.tensor(teacher)
    value, slope = gradient(RankingHinge(top_k=8, margin=1.0), teacher, torch.arange(teacher.numel()).float()[None])
    assert value.item() == 0.0 and not slope.any()


@pytest.mark.parametrize(("teacher_ids", "student_ids"), [(401, 333), (333, 401), (401, 1)])
def test_sorted_distance_of_two_vocabularies(teacher_ids, student_ids) -> None:
    teacher, student = logits(41, teacher_ids)[0], logits(41, student_ids, seed=1)[1].requires_grad_()
    expected = divergence64("sorted_distance", teacher.softmax(-1), student.softmax(-1))
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    value, actual = gradient("sorted_distance", teacher, student.detach())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-13)
    padded = torch.nn.functional.pad(teacher, (0, 50), value=-INF)
    torch.testing.assert_close(gradient("sorted_distance", padded, student.detach())[0], value)


def test_sorted_distance_does_not_know_the_ids() -> None:
    teacher, student = logits()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    value, slope = gradient("sorted_distance", teacher, student)
    moved_value, moved_slope = gradient("sorted_distance", teacher.flip(-1), student[:, order])
    torch.testing.assert_close(moved_value, value)
    torch.testing.assert_close(moved_slope, slope[:, order])
    assert (value <= 2 * total_variation(pair_of(teacher, student))[0] + 1e-12).all()


def top_k_and_tail(logp: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = logp.gather(-1, ids)
    tail = logp.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)
    return torch.cat([kept, tail], dim=-1)


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("name", DATA_PROCESSING)
def test_merging_outcomes_loses_information(name, k) -> None:
    """The K likeliest ids and one tail: never more than the whole row, and nearly all of it with K near V."""
    dense = pair_of(*logits(64, 33))
    ids = dense.teacher_logp_RV.topk(k, dim=-1).indices
    sparse = DistributionPair.of_logs(
        teacher_logp_RV=top_k_and_tail(dense.teacher_logp_RV, ids),
        student_logq_RV=top_k_and_tail(dense.student_logq_RV, ids),
    )
    whole, merged = DATA_PROCESSING[name](dense)[0], DATA_PROCESSING[name](sparse)[0]
    assert (merged <= whole + 1e-12).all()
    if k == 32:  # the tail is one id
        torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-9)
    else:
        assert (merged < 0.99 * whole).any()
