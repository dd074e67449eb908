"""Draws: their frequencies, what top-k and top-p leave, and independence of the batch."""

import numpy as np
import pytest
import torch

from largekd.generation.sampling import DrawRule, SeededDraws, draw


def _frequencies(logits, rule, *, draws=40_000):
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    ids = draw(torch.tensor([logits]).expand(draws, -1), rule=rule, uniform_B=uniform)
    return torch.bincount(ids, minlength=len(logits)).double().div(draws).tolist()


def test_evenly_spread_numbers_give_each_id_its_probability():
    logits = [0.3, -1.0, 2.0, 0.0]
    expected = torch.tensor(logits).double().div(0.5).softmax(-1).tolist()
    assert _frequencies(logits, DrawRule(ids=4, temperature=0.5)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (DrawRule(ids=4, top_k=2), [0, 2]),
        (DrawRule(ids=4, top_p=0.5), [2]),
        (DrawRule(ids=4, top_p=0.9), [0, 2, 3]),
        (DrawRule(ids=4, top_k=3, top_p=0.99), [0, 2, 3]),
        (DrawRule(ids=2), [0, 1]),
    ],
)
def test_what_is_left_is_drawn_in_proportion(rule, kept):
    logits = [0.3, -1.0, 2.0, 0.0]
    expected = torch.full((4,), float("-inf")).double()
    expected[kept] = torch.tensor(logits).double()[kept]
    assert _frequencies(logits, rule) == pytest.approx(expected.softmax(-1).tolist(), abs=1e-4)


def test_temperature_zero_takes_the_likeliest_usable_id():
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    assert draw(logits, rule=DrawRule(ids=2, temperature=0.0), uniform_B=torch.zeros(1)).tolist() == [1]


def test_the_extremes_of_a_uniform_number_have_mass():
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    for rule in (DrawRule(ids=4), DrawRule(ids=4, top_p=0.9), DrawRule(ids=4, top_k=2)):
        assert set(draw(logits, rule=rule, uniform_B=uniform).tolist()) <= {1, 2}


def test_a_sample_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 11, generator=generator)  # tokens, sequences, vocabulary
    seeds = [(7, place) for place in range(5)]

    def drawn(places):
        draws = SeededDraws(
            DrawRule(ids=11), seeds=[seeds[p] for p in places], max_new_tokens=3, device=torch.device("cpu")
        )
        ids = [draws(torch.empty(0), scores[token, places]).argmax(-1) for token in range(3)]
        return torch.stack(ids, dim=1), draws.log_probabilities

    ids, logq = drawn([0, 1, 2, 3, 4])
    some, some_logq = drawn([3, 1])
    assert torch.equal(some, ids[[3, 1]]) and torch.equal(some_logq, logq[[3, 1]])
    expected = scores.transpose(0, 1).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(logq, expected)
    assert len(np.unique(ids.numpy(), axis=0)) > 1
