"""The likelihood of spans: the binary divergence, and the term in the pass against a float64 reference."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from sparse_reference import run_pass, same, student_logits64, terms_of, top_k, with_counted
from torch import Tensor
from vocabulary_reference import TOKENS, Case, make_case

from largekd.contracts import IGNORE_LABEL, Batch, TopKSignal, Translation
from largekd.objectives.spans import binary_kl
from largekd.objectives.terms import SpanLikelihood, VocabularyTerm

SPAN = VocabularyTerm("span_likelihood", SpanLikelihood())
GROUPS = ((0, 1), (1, 2), (3, 1), (4, 4), (9, 1), (10, 2), (12, 3), (18, 5), (23, 1), (24, 2))
"""First counted token and length of each scored group; counted tokens 8, 15, 16, 17, 26 are in none."""


def translation_of(groups: Sequence[tuple[int, int]], *, tokens: int) -> Translation:
    """Scored groups alone, each a single token of the teacher."""
    long = {"dtype": torch.int64}
    first_L, length_L = (torch.tensor(column, **long) for column in zip(*groups, strict=True))
    span_G = torch.tensor([place for place, (_, length) in enumerate(groups) if length > 1], **long)
    signal_T = torch.full((tokens,), -1)
    for place, (first, length) in enumerate(groups):
        if length == 1:
            signal_T[first] = place
    spans = [groups[place] for place in span_G]
    places = torch.arange(len(groups))
    none, blank = torch.zeros(0, **long), torch.zeros(1, 8, **long)
    teacher = Batch(blank, torch.full_like(blank, IGNORE_LABEL), blank.float(), none)
    return Translation(
        teacher=teacher,
        student_start_G=none,
        student_length_G=none,
        teacher_start_G=none,
        teacher_length_G=none,
        student_group_BS=torch.zeros(1, TOKENS, **long),
        teacher_group_BS=blank,
        scored_first_L=first_L,
        scored_length_L=length_L,
        scored_row_L=places,
        scored_teacher_length_L=torch.ones_like(places),
        signal_T=signal_T,
        span_G=span_G,
        span_first_T=torch.tensor([first for first, _ in spans], **long),
        span_of_U=torch.tensor([x for x, (_, length) in enumerate(spans) for _ in range(length)], **long),
        span_token_U=torch.tensor([first + i for first, length in spans for i in range(length)], **long),
        row_N=places,
        id_N=torch.zeros_like(places),
        scored_N=places,
    )


def translated(case: Case, groups: Sequence[tuple[int, int]] = GROUPS, *, tokens: slice = slice(None)) -> Case:
    """The case with a translation of some of its counted tokens; groups count from the first of them."""
    counted = torch.arange(case.batch.counted_T.numel())[tokens]
    batch = with_counted(case, counted)
    return replace(case, batch=replace(batch, translation=translation_of(groups, tokens=len(counted))))


def signal_of(case: Case, *, temperature: float = 1.0, seed: int = 5) -> TopKSignal:
    """Four ids with a tail where a group is one token, and a log-probability for each group."""
    groups = case.batch.translation.scored_row_L.numel()
    logp_L = -4.0 * torch.rand(groups, generator=torch.Generator().manual_seed(seed)).double()
    present_T = (case.batch.translation.signal_T >= 0).double()
    return replace(top_k(case, k=4, temperature=temperature), present_T=present_T, scored_logp_L=logp_L)


def spans64(case: Case, signal: TopKSignal) -> Tensor:
    """Σ weight · binary KL, span by span."""
    rows = case.batch.counted_T
    labels, weight = (x.flatten()[rows] for x in (case.batch.labels_BS, case.batch.token_weight_BS.double()))
    logq = student_logits64(case).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    found = case.batch.translation
    total = logq.new_zeros(())
    for place in found.span_G:
        first, length = int(found.scored_first_L[place]), int(found.scored_length_L[place])
        p, q = signal.scored_logp_L[place].double().exp(), logq[first : first + length].sum().exp()
        total = total + weight[first] * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return total


def test_binary_kl_and_its_slope_equal_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    logp = -9.0 * torch.rand(400, generator=g).double() - 1e-3
    logq = (-9.0 * torch.rand(400, generator=g).double() - 1e-3).requires_grad_()
    p, q = logp.exp(), logq.exp()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    (slope,) = torch.autograd.grad(expected.sum(), logq)
    value, found = binary_kl(logp, logq.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)
    assert (value >= 0).all()
    single, slope32 = binary_kl(logp.float(), logq.detach().float())
    torch.testing.assert_close(single.double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope32.double(), slope, rtol=1e-4, atol=1e-6)


def test_binary_kl_is_zero_and_flat_where_both_agree() -> None:
    logs = torch.tensor([-12.0, -3.0, -0.5, -1e-3, -1e-9, 0.0])
    value, slope = binary_kl(logs, logs)
    assert value.tolist() == [0.0] * 6 and slope.tolist() == [0.0] * 6


def test_binary_kl_of_extremes_is_finite() -> None:
    extremes = torch.tensor([float("-inf"), -1e4, -200.0, -1e-9, 0.0, 1e-6])
    value, slope = binary_kl(*(x.flatten() for x in torch.meshgrid(extremes, extremes, indexing="ij")))
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    # A certain teacher is cross-entropy: −log Q, with the slope −1 in log Q.
    value, slope = binary_kl(torch.zeros(3), torch.tensor([-0.5, -2.0, -30.0]))
    torch.testing.assert_close(value, torch.tensor([0.5, 2.0, 30.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, -torch.ones(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
@pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 2.0, "softcap": 4.0, "padded_rows": 3}], ids=str)
def test_alone_equals_the_reference(options, chunk) -> None:
    case = translated(make_case(dtype=torch.float64, **options))
    signal = signal_of(case)
    expected = spans64(case, signal)
    found = run_pass(case, terms=[SPAN], signal=signal, chunk=chunk)
    torch.testing.assert_close(found["sums"][0], expected.detach(), rtol=1e-9, atol=1e-9)
    same(case, found["loss"], expected, value=1e-9, slope=1e-9)


@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 4e-3, 2**-6)])
def test_lower_precisions(dtype, value, slope) -> None:
    case = translated(make_case(dtype=dtype))
    signal = signal_of(case)
    same(case, run_pass(case, terms=[SPAN], signal=signal)["loss"], spans64(case, signal), value=value, slope=slope)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_beside_ids_and_cross_entropy(temperature, chunk) -> None:
    """Spans keep temperature 1; ids count only where a group is one token."""
    case = translated(make_case(dtype=torch.float64))
    signal = signal_of(case, temperature=temperature)
    plain = {"signal": signal, "temperature": temperature, "measure": True}
    terms = (*terms_of("cross_entropy"), SPAN, *terms_of("forward_kl"))
    found = run_pass(case, terms=terms, scales=[0.5, 3.0, 0.25], chunk=chunk, **plain)
    others = run_pass(case, terms=(terms[0], terms[2]), scales=[0.5, 0.25], **plain)
    expected = spans64(case, signal)
    wanted = torch.stack([others["sums"][0], expected.detach(), others["sums"][1]])
    torch.testing.assert_close(found["sums"], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["health"], others["health"])
    same(case, found["loss"], others["loss"] + 3.0 * expected, value=1e-6, slope=1e-9)
    present = case.batch.translation.signal_T >= 0
    alone = run_pass(
        case,
        terms=terms_of("forward_kl"),
        signal=replace(
            signal,
            present_T=None,
            scored_logp_L=None,
            **{n: getattr(signal, n)[present] for n in ("ids_TK", "logp_TK", "tail_T", "tempered_tail_T")},
        ),
        batch=with_counted(case, present),
        temperature=temperature,
    )
    torch.testing.assert_close(found["sums"][2], alone["sums"][0])


def test_micro_batches_add_up() -> None:
    base = make_case(dtype=torch.float64)
    whole = translated(base)
    cut = 10  # between two groups
    earlier = [group for group in GROUPS if group[0] < cut]
    later = [(first - cut, length) for first, length in GROUPS if first >= cut]
    parts = [translated(base, earlier, tokens=slice(0, cut)), translated(base, later, tokens=slice(cut, None))]
    terms = (*terms_of("cross_entropy", "forward_kl"), SPAN)
    signal = signal_of(whole)
    losses = []
    for part, tokens, groups in zip(
        parts, (slice(0, cut), slice(cut, None)), (slice(0, len(earlier)), slice(len(earlier), None)), strict=True
    ):
        rows = ("ids_TK", "logp_TK", "tail_T", "tempered_tail_T", "present_T")
        mine = {name: getattr(signal, name)[tokens] for name in rows}
        mine["scored_logp_L"] = signal.scored_logp_L[groups]
        losses.append(run_pass(part, terms=terms, signal=replace(signal, **mine))["loss"])
    expected = run_pass(whole, terms=terms, signal=signal)["loss"]
    same(base, losses[0] + losses[1], expected, value=1e-9, slope=1e-9)


def test_without_spans_the_term_is_zero() -> None:
    case = translated(make_case(dtype=torch.float64), [(first, 1) for first in range(0, 27, 2)])
    signal = signal_of(case)
    found = run_pass(case, terms=(*terms_of("forward_kl"), SPAN), signal=signal)
    expected = run_pass(case, terms=terms_of("forward_kl"), signal=signal)
    assert found["sums"][1] == 0
    same(case, found["loss"], expected["loss"], value=1e-12, slope=1e-12)


def test_an_equal_student_learns_nothing() -> None:
    case = translated(make_case(dtype=torch.float64))
    labels = case.batch.labels_BS.flatten()[case.batch.counted_T]
    logq = student_logits64(case).detach().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    logp_L = torch.stack([logq[first : first + length].sum() for first, length in GROUPS])
    signal = replace(signal_of(case), scored_logp_L=logp_L)
    found = run_pass(case, terms=[SPAN], signal=signal)
    assert found["loss"].abs() < 1e-12
    assert torch.autograd.grad(found["loss"], case.hidden_BSD)[0].abs().max() < 1e-12
