"""The compiled row function and its fallback."""

import logging

import pytest
import torch
from vocabulary_reference import make_case

from largekd.objectives import compiled
from largekd.objectives.divergences import JSD, forward_kl, reverse_kl
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass

TERMS = tuple(
    VocabularyTerm(str(i), divergence) for i, divergence in enumerate((None, forward_kl, reverse_kl, JSD(mix=0.3)))
)
SCALES = torch.tensor([0.5, 0.3, 0.2, 1.5])


def outcome(*, compile: bool, temperature: float, **options) -> tuple[VocabularyPass, list[torch.Tensor]]:
    case = make_case(bias=True, softcap=5.0, **options)
    module = VocabularyPass(terms=TERMS, chunk_tokens=20, compile=compile)
    arguments = {"vocab_size": case.vocab_size, "batch": case.batch, "signal": case.signal, "scales": SCALES}
    arguments["temperature"] = None if temperature == 1.0 else torch.tensor(temperature)
    result = module(case.hidden_BSD, case.weight_VD, case.bias_V, softcap=5.0, **arguments)
    result["loss"].backward()
    return module, [
        result["loss"].detach(),
        result["sums"],
        case.hidden_BSD.grad,
        case.weight_VD.grad,
        case.bias_V.grad,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(temperature, dtype) -> None:
    module, actual = outcome(compile=True, temperature=temperature, dtype=dtype, teacher_vocab=371)
    assert module.rows.compiles, "compilation fell back"
    _, expected = outcome(compile=False, temperature=temperature, dtype=dtype, teacher_vocab=371)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-3}
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_fallback_is_logged_once_and_exact(monkeypatch, caplog) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def broken(*_, **__):
        def fail(_block):
            raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

        return fail

    monkeypatch.setattr(compiled.torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        module, actual = outcome(compile=True, temperature=2.0)
    assert not module.rows.compiles
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "objective.compile" in caplog.text and "no compiler" in caplog.text
    _, expected = outcome(compile=False, temperature=2.0)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_without_a_compiler_the_eager_form_takes_over(caplog) -> None:
    import torch._inductor.config

    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True})
    with no_compiler, caplog.at_level(logging.WARNING, logger=compiled.__name__):
        module, actual = outcome(compile=True, temperature=3.0)
    torch._dynamo.reset()
    assert not module.rows.compiles and "/nonexistent/c++" in caplog.text
    assert torch.equal(actual[0], outcome(compile=False, temperature=3.0)[1][0])


@pytest.mark.slow
def test_many_plans_on_several_threads_stay_compiled(monkeypatch) -> None:
    """More plans and block shapes than torch recompiles one function for, met by two threads at once."""
    monkeypatch.setattr("largekd.objectives.sweep.CPU_BLOCK_ELEMENTS", 4 * 401)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for temperature in (1.0, 1.25, 1.5, 1.75, 2.25):
            module, actual = outcome(compile=True, temperature=temperature)
            assert module.rows.compiles, "compilation fell back"
            _, expected = outcome(compile=False, temperature=temperature)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)
