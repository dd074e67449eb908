"""Selection of tokens: rule, histogram and quantile, and what the pass then trains on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sparse_reference import (
    gradients,
    run_pass,
    same,
    student_logits64,
    teacher_logits64,
    terms_of,
    top_k,
    with_counted,
)
from torch import Tensor
from vocabulary_reference import VOCAB, Case, make_case

from largekd.config.divergence import SelectionConfig
from largekd.contracts import SampledSignal
from largekd.objectives.selection import SCORE_BINS, SelectionRule, TokenSelection, bounded, histogram, quantile

BY = ["teacher_entropy", "student_entropy", "gap"]
TERMS = ("cross_entropy", "forward_kl", "jsd")
CPU = torch.device("cpu")


def scores64(case: Case, *, by: str) -> Tensor:
    """In nats at temperature 1, over the shared ids."""
    teacher, student = teacher_logits64(case), student_logits64(case).detach()
    p, q = teacher.softmax(-1), student[:, : teacher.shape[-1]].softmax(-1)
    return {
        "teacher_entropy": -(p * p.log()).sum(-1),
        "student_entropy": -(q * q.log()).sum(-1),
        "gap": (p * (p / q).log()).sum(-1),
    }[by]


def weights64(case: Case) -> Tensor:
    return case.batch.token_weight_BS.flatten()[case.batch.counted_T].double()


def limit_of(score_T: Tensor, *, keep: int, above: bool) -> Tensor:
    """Between two scores, so that `keep` tokens are kept."""
    ordered = score_T.sort(descending=above).values
    return bounded((ordered[keep - 1] + ordered[keep]) / 2).float()


def test_the_rule_is_strict() -> None:
    score = torch.tensor([0.1, 0.5, 0.9])
    assert SelectionRule("gap", above=True).keeps(score, limit=torch.tensor(0.5)).tolist() == [0.0, 0.0, 1.0]
    assert SelectionRule("gap", above=False).keeps(score, limit=torch.tensor(0.5)).tolist() == [1.0, 0.0, 0.0]


def test_bounded_keeps_the_order_in_the_unit_interval() -> None:
    score = torch.tensor([-1e-7, 0.0, 1e-9, 1e-3, 1.0, 12.0, 1e4])
    found = bounded(score)
    assert found[0] == found[1] and found[1].abs() < 1e-6 and found[-1] == pytest.approx(1.0)
    assert torch.equal(found[1:].unique(), found[1:])
    # Equal ratios are equal distances: certain tokens are told apart as well as uncertain ones.
    torch.testing.assert_close(found[3] - found[2], 2 * (found[4] - found[3]))


def test_histogram_adds_weights() -> None:
    g = torch.Generator().manual_seed(0)
    score, weight = torch.rand(5000, generator=g), torch.rand(5000, generator=g)
    expected, _ = np.histogram(score.numpy(), bins=SCORE_BINS, range=(0, 1), weights=weight.numpy())
    np.testing.assert_allclose(histogram(score, weight_T=weight).numpy(), expected, rtol=1e-5, atol=1e-6)
    ends = histogram(torch.tensor([0.0, 1.0]), weight_T=torch.tensor([2.0, 3.0]))
    assert ends[0] == 2.0 and ends[-1] == 3.0 and ends.sum() == 5.0
    assert histogram(score[:0], weight_T=weight[:0]).shape == (SCORE_BINS,)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.77, 0.99])
def test_quantile_equals_numpy_to_a_bin(share) -> None:
    score = bounded(torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double() ** 3 * 9.0)
    found = quantile(histogram(score, weight_T=torch.ones(20_000).double()), share_below=share)
    assert found == pytest.approx(np.quantile(score.numpy(), share, method="inverted_cdf"), abs=1.0 / SCORE_BINS)


@pytest.mark.parametrize("center", [-9.0, -6.0, 1.0])
def test_shares_hold_for_certain_and_uncertain_teachers(center) -> None:
    generator = torch.Generator().manual_seed(2)
    score = bounded((torch.randn(20_000, generator=generator) * 2 + center).exp())
    limit = quantile(histogram(score, weight_T=torch.ones(20_000)), share_below=0.3)
    assert float((score > limit).double().mean()) == pytest.approx(0.7, abs=0.005)


def test_quantile_follows_weights_and_is_linear_inside_a_bin() -> None:
    counts = torch.zeros(8).double()
    counts[2], counts[5] = 1.0, 3.0
    expected = {0.125: 2.5 / 8, 0.25: 3 / 8, 0.5: (5 + 1 / 3) / 8, 0.875: (5 + 2.5 / 3) / 8, 1.0: 6 / 8}
    for share, wanted in expected.items():
        assert quantile(counts, share_below=share).item() == pytest.approx(wanted)


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("by", BY)
def test_only_kept_tokens_train_the_divergences(by, temperature, above) -> None:
    """Cross-entropy over all tokens plus the divergences of a batch that has the kept tokens alone."""
    case = make_case(dtype=torch.float64, teacher_vocab=VOCAB - 30)
    score_T = scores64(case, by=by)
    limit = limit_of(score_T, keep=9, above=above)
    kept = bounded(score_T) > limit if above else bounded(score_T) < limit
    assert kept.sum() == 9
    found = run_pass(
        case,
        terms=terms_of(*TERMS),
        signal=case.signal,
        temperature=temperature,
        selection=SelectionRule(by, above),
        limit=limit,
    )
    hard = run_pass(case, terms=terms_of("cross_entropy"), signal=None)
    batch = with_counted(case, kept)
    arguments = {"signal": case.signal, "temperature": temperature, "batch": batch}
    soft = run_pass(case, terms=terms_of(*TERMS[1:]), **arguments)
    torch.testing.assert_close(found["sums"], torch.cat([hard["sums"], soft["sums"]]))
    torch.testing.assert_close(found["kept"][0], weights64(case)[kept].sum())
    expected = histogram(bounded(score_T), weight_T=weights64(case))
    torch.testing.assert_close(found["histogram"], expected)
    same(case, found["loss"], hard["loss"] + soft["loss"], value=1e-9, slope=1e-9)


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", BY)
def test_the_choice_depends_on_no_chunk_and_no_micro_batch(by, compiles) -> None:
    case = make_case()
    limit = limit_of(scores64(case, by=by), keep=14, above=True)
    arguments = {"terms": terms_of(*TERMS), "signal": case.signal, "selection": SelectionRule(by, True), "limit": limit}
    tokens = torch.arange(case.batch.counted_T.numel())
    for parts, chunk in (([tokens], 1), ([tokens], 7), ([tokens[:5], tokens[5:]], 7), ([tokens[::2], tokens[1::2]], 3)):
        found = [
            run_pass(case, chunk=chunk, temperature=2.0, batch=with_counted(case, p), compile=compiles, **arguments)
            for p in parts
        ]
        whole = run_pass(case, chunk=41, temperature=2.0, **arguments)
        for name in ("sums", "kept", "histogram"):
            torch.testing.assert_close(sum(f[name] for f in found), whole[name], rtol=1e-5, atol=1e-5)
        same(case, sum(f["loss"] for f in found), whole["loss"], value=1e-4, slope=1e-5)


@pytest.mark.parametrize("by", BY)
def test_sparse_signals_with_all_ids_choose_as_dense_ones(by) -> None:
    case = make_case(dtype=torch.float64)
    limit = limit_of(scores64(case, by=by), keep=10, above=True)
    arguments = {"terms": terms_of(*TERMS), "selection": SelectionRule(by, True), "limit": limit}
    found, expected = (run_pass(case, signal=s, **arguments) for s in (top_k(case, k=VOCAB), case.signal))
    for name in ("sums", "kept", "histogram"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("kind", ["tail", "renormalise", "drop", "sampled"])
def test_the_students_entropy_needs_no_whole_teacher(kind) -> None:
    case = make_case(dtype=torch.float64, teacher_vocab=VOCAB - 30)
    score_T = scores64(case, by="student_entropy")
    limit = limit_of(score_T, keep=10, above=False)
    signal = top_k(case, k=4)
    if kind == "sampled":
        signal = SampledSignal(signal.ids_TK, signal.logp_TK.exp(), signal.logp_TK, vocab_size=VOCAB - 30)
    arguments = {"terms": terms_of("forward_kl"), "signal": signal, "sparse": kind, "temperature": 2.0}
    selection = SelectionRule("student_entropy", False)
    found = run_pass(case, selection=selection, limit=limit, measure=True, **arguments)
    kept = bounded(score_T) < limit
    torch.testing.assert_close(found["kept"][0], weights64(case)[kept].sum())
    torch.testing.assert_close(found["histogram"], histogram(bounded(score_T), weight_T=weights64(case)))
    cut = {name: value[kept] for name, value in vars(signal).items() if isinstance(value, Tensor)}
    alone = run_pass(case, **{**arguments, "signal": replace(signal, **cut)}, batch=with_counted(case, kept))
    same(case, found["loss"], alone["loss"], value=1e-9, slope=1e-9)


def test_tokens_without_a_signal_are_neither_counted_nor_kept() -> None:
    case = make_case(dtype=torch.float64)
    signal = top_k(case, k=VOCAB)
    present = torch.arange(len(signal.ids_TK)) % 2 == 0
    signal = replace(signal, present_T=present.double())
    score_T = scores64(case, by="gap")
    limit = limit_of(score_T, keep=15, above=True)
    found = run_pass(
        case, terms=terms_of("forward_kl"), signal=signal, selection=SelectionRule("gap", True), limit=limit
    )
    kept = present & (bounded(score_T) > limit)
    torch.testing.assert_close(found["kept"][0], weights64(case)[kept].sum())
    expected = histogram(bounded(score_T)[present], weight_T=weights64(case)[present])
    torch.testing.assert_close(found["histogram"], expected)
    torch.testing.assert_close(found["sums"][0], (weights64(case) * score_T)[kept].sum())


def test_without_a_teacher_nothing_is_scored() -> None:
    """A recipe may name a selection and have no divergence."""
    case = make_case()
    found = run_pass(
        case,
        terms=terms_of("cross_entropy"),
        signal=None,
        selection=SelectionRule("gap", True),
        limit=torch.tensor(0.2),
    )
    assert found["kept"].tolist() == [0.0] and found["histogram"].tolist() == [0.0] * SCORE_BINS
    plain = run_pass(case, terms=terms_of("cross_entropy"), signal=None)
    same(case, found["loss"], plain["loss"], value=1e-6, slope=1e-6)


def test_nothing_kept_gives_nothing() -> None:
    case = make_case()
    arguments = {"terms": terms_of("forward_kl", "reverse_kl"), "signal": case.signal}
    found = run_pass(case, selection=SelectionRule("gap", True), limit=torch.tensor(1.0), **arguments)
    assert found["kept"].item() == 0 and not found["sums"].any()
    assert not any(g.any() for g in gradients(case, found["loss"]))


@pytest.mark.parametrize("keep", ["above", "below"])
def test_the_first_step_keeps_all_and_later_ones_the_share(keep) -> None:
    """Scores drift slowly from step to step, as a model's do; two ranks add their histograms."""
    selection = TokenSelection(SelectionConfig(by="gap", keep=keep, share=0.3), device=CPU)
    g = torch.Generator().manual_seed(0)
    shares = []
    for step in range(12):
        score_RT = bounded(torch.randn(2, 2000, generator=g).exp() * 0.97**step)
        weight_RT = torch.rand(2, 2000, generator=g) + 0.5
        kept = selection.rule.keeps(score_RT, limit=selection.limit)
        shares.append(float((kept * weight_RT).sum() / weight_RT.sum()))
        assert selection.expected_share == (1.0 if step == 0 else 0.3)
        mine, other = (histogram(s, weight_T=w) for s, w in zip(score_RT, weight_RT, strict=True))
        selection.learn(mine, reduce=lambda total, other=other: total + other)
    assert shares[0] == 1.0
    assert all(abs(share - 0.3) < 0.04 for share in shares[1:])


@pytest.mark.parametrize("by", BY)
def test_every_score_is_kept_at_first(by) -> None:
    for keep in ("above", "below"):
        case = make_case()
        selection = TokenSelection(SelectionConfig(by=by, keep=keep, share=0.5), device=CPU)
        arguments = {"terms": terms_of("forward_kl"), "signal": case.signal}
        found = run_pass(case, selection=selection.rule, limit=selection.limit, **arguments)
        plain = run_pass(case, **arguments)
        torch.testing.assert_close(found["kept"][0].double(), weights64(case).sum(), rtol=1e-5, atol=1e-5)
        same(case, found["loss"], plain["loss"], value=1e-6, slope=1e-6)


def test_a_threshold_in_nats_stays() -> None:
    case = make_case(dtype=torch.float64)
    selection = TokenSelection(SelectionConfig(by="student_entropy", keep="below", threshold=4.5), device=CPU)
    found = run_pass(
        case, terms=terms_of("forward_kl"), signal=case.signal, selection=selection.rule, limit=selection.limit
    )
    kept = scores64(case, by="student_entropy") < 4.5
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(found["kept"][0], weights64(case)[kept].sum())
    before = selection.limit.clone()
    selection.learn(found["histogram"], reduce=lambda total: total)
    assert selection.limit == before and selection.expected_share == 1.0


def test_a_step_without_tokens_keeps_the_limit() -> None:
    selection = TokenSelection(SelectionConfig(by="gap", share=0.5), device=CPU)
    counts = torch.ones(SCORE_BINS)
    selection.learn(counts, reduce=lambda total: total)
    learnt = selection.limit.clone()
    assert learnt == pytest.approx(0.5)
    selection.learn(torch.zeros(SCORE_BINS), reduce=lambda total: total)
    assert selection.limit == learnt


def test_state_returns() -> None:
    config = SelectionConfig(by="gap", share=0.25)
    one, other = TokenSelection(config, device=CPU), TokenSelection(config, device=CPU)
    one.learn(torch.arange(SCORE_BINS).float(), reduce=lambda total: total)
    assert one.state() != other.state()
    other.restore(one.state())
    assert other.state() == one.state() and torch.equal(other.limit, one.limit)
    assert other.limit.dtype == one.limit.dtype and other.expected_share == 0.25
