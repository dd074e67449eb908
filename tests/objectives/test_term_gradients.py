"""`squares` of the pass: the squared norm of each scaled term's own gradient of the hidden states."""

import pytest
import torch
from sparse_reference import SPARSE_DIVERGENCES, run_pass, teacher_logits64, terms_of, top_k
from test_plugins import plugin
from test_span_likelihood import SPAN, signal_of, translated
from vocabulary_reference import VOCAB, make_case, reference

from largekd.objectives.selection import SelectionRule

NAMES = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")
SCALES = [0.5, 3e-7, 40.0, 1.5]


def squares_of(case, *, terms, scales, **arguments) -> torch.Tensor:
    """One pass per term, by autograd, in float64."""
    found = []
    for index, term in enumerate(terms):
        loss = run_pass(case, terms=[term], scales=[scales[index]], **arguments)["loss"]
        (gradient,) = torch.autograd.grad(loss, case.hidden_BSD)
        found.append(gradient.double().square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_the_norms_of_float64_autograd(temperature) -> None:
    case = make_case(bias=True, softcap=5.0, teacher_vocab=VOCAB - 30)
    found = run_pass(
        case,
        terms=terms_of(*NAMES),
        scales=SCALES,
        signal=case.signal,
        temperature=temperature,
        term_gradients=True,
    )
    for name, scale, square in zip(NAMES, SCALES, found["squares"], strict=True):
        expected = reference(case, names=[name], temperature=temperature)[0] * scale
        (gradient,) = torch.autograd.grad(expected, case.hidden_BSD)
        assert float(square) == pytest.approx(float(gradient.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 41])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_divergence_on_sparse_rows(dtype, chunk) -> None:
    case = make_case(dtype=dtype)
    terms = terms_of(*SPARSE_DIVERGENCES)
    scales = [0.1 * (i + 1) for i in range(len(terms))]
    arguments = {"signal": top_k(case, k=6, temperature=2.0), "temperature": 2.0}
    found = run_pass(case, terms=terms, scales=scales, chunk=chunk, term_gradients=True, **arguments)
    expected = squares_of(case, terms=terms, scales=scales, **arguments)
    torch.testing.assert_close(
        found["squares"].double(), expected, rtol=1e-5 if dtype == torch.float64 else 2e-2, atol=0
    )


def test_spans_plugins_and_selections() -> None:
    case = translated(make_case(dtype=torch.float64))
    terms, scales = (*terms_of("cross_entropy", "forward_kl"), SPAN), [0.3, 0.7, 2.0]
    arguments = {"signal": signal_of(case)}
    found = run_pass(case, terms=terms, scales=scales, term_gradients=True, **arguments)
    expected = squares_of(case, terms=terms, scales=scales, **arguments)
    torch.testing.assert_close(found["squares"].double(), expected, rtol=1e-6, atol=0)
    case = make_case(dtype=torch.float64)
    arguments = {"signal": case.signal, "selection": SelectionRule("gap", True), "limit": torch.tensor(0.7)}
    terms = (*terms_of("cross_entropy"), plugin(), *terms_of("jsd"))
    found = run_pass(case, terms=terms, scales=scales, term_gradients=True, measure=True, **arguments)
    expected = squares_of(case, terms=terms, scales=scales, **arguments)
    torch.testing.assert_close(found["squares"].double(), expected, rtol=1e-6, atol=0)
    assert 0 < found["kept"].item() < teacher_logits64(case).shape[0] * 1.5


def test_measuring_changes_neither_the_loss_nor_its_gradient() -> None:
    case = make_case()
    arguments = {"terms": terms_of(*NAMES), "scales": SCALES, "signal": case.signal}
    plain, measured = run_pass(case, **arguments), run_pass(case, term_gradients=True, **arguments)
    assert "squares" not in plain and measured["squares"].shape == (4,) and not measured["squares"].requires_grad
    assert torch.equal(plain["loss"], measured["loss"])
    one, other = (torch.autograd.grad(result["loss"], case.hidden_BSD)[0] for result in (plain, measured))
    assert torch.equal(one, other)


def test_a_scale_of_zero_has_no_norm() -> None:
    case = make_case()
    found = run_pass(
        case, terms=terms_of("cross_entropy", "forward_kl"), scales=[0.0, 1.0], signal=case.signal, term_gradients=True
    )
    assert found["squares"][0] == 0 and found["squares"][1] > 0


def test_a_frozen_pass_still_measures() -> None:
    """Held-out data has no gradient, but its terms have norms."""
    case = make_case()
    arguments = {"terms": terms_of("forward_kl"), "signal": case.signal, "term_gradients": True}
    expected = run_pass(case, **arguments)["squares"]
    with torch.no_grad():
        torch.testing.assert_close(run_pass(case, **arguments)["squares"], expected)
