"""Row blocks on several threads."""

import threading

import pytest
import torch
from vocabulary_reference import make_case

from largekd.objectives.divergences import JSD
from largekd.objectives.terms import VocabularyTerm
from largekd.objectives.vocabulary import VocabularyPass
from largekd.objectives.workers import map_spans

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 24, 25, 100])
def test_spans_cover_everything_in_whole_blocks(threads, size) -> None:
    spans = map_spans(lambda span: span, size=size, block=4, device=CPU)
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(size))
    assert len(spans) <= threads
    assert all(span.start % 4 == 0 for span in spans)


def test_each_task_has_one_thread_and_no_gradients(threads) -> None:
    def task(_: slice) -> tuple[int, bool, int]:
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()

    with torch.no_grad():
        found = map_spans(task, size=90, block=10, device=CPU)
    assert found and all(row[:2] == (1, False) for row in found)
    assert torch.get_num_threads() == threads


def test_an_error_in_a_task_is_raised_and_the_threads_are_restored(threads) -> None:
    def task(span: slice) -> None:
        raise ArithmeticError(span.start)

    with pytest.raises(ArithmeticError):
        map_spans(task, size=90, block=10, device=CPU)
    assert torch.get_num_threads() == threads


def test_the_pass_does_not_depend_on_threads(monkeypatch) -> None:
    monkeypatch.setattr("largekd.objectives.sweep.CPU_BLOCK_ELEMENTS", 2 * 401)
    before, outcomes = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        case = make_case(bias=True)
        module = VocabularyPass(
            terms=[
                VocabularyTerm("cross_entropy", None),
                VocabularyTerm("jsd", JSD(mix=0.3)),
            ],
            chunk_tokens=13,
        )
        arguments = {"batch": case.batch, "signal": case.signal, "scales": torch.tensor([0.5, 2.0])}
        arguments["temperature"] = torch.tensor(2.0)
        result = module(
            case.hidden_BSD, case.weight_VD, case.bias_V, vocab_size=case.vocab_size, measure=True, **arguments
        )
        result["loss"].backward()
        leaves = (case.hidden_BSD, case.weight_VD, case.bias_V)
        outcomes.append([*(result[key].detach() for key in result), *(leaf.grad for leaf in leaves)])
        torch.set_num_threads(before)
    for one, three in zip(*outcomes, strict=True):
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)
