"""Draws of single rows: their frequencies, their cuts, and margins that tell how near another choice was."""

import numpy as np
import pytest
import torch

from largekd.generation.row_draws import RowRule, draw_cut, draw_rows
from largekd.generation.sampling import DrawRule, draw

VOCABULARY = 400


def _logits(rows: int, *, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _uniforms(rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(rows))


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (RowRule(0.0), DrawRule(VOCABULARY, temperature=0.0)),
        (RowRule(0.8), DrawRule(VOCABULARY, temperature=0.8)),
        (RowRule(1.0, top_p=0.7), DrawRule(VOCABULARY, top_p=0.7)),
        (RowRule(1.0, top_p=0.999), DrawRule(VOCABULARY, top_p=0.999)),
    ],
)
def test_the_tokens_are_those_of_rollouts(rule, same):
    logits, uniform = _logits(200), _uniforms(200)
    found = draw_rows(logits, rules=[rule] * 200, uniform_B=uniform, ids=VOCABULARY)
    assert torch.equal(found.ids_B, draw(logits, rule=same, uniform_B=uniform))
    expected = logits.log_softmax(-1).gather(-1, found.ids_B[:, None]).squeeze(-1)
    torch.testing.assert_close(found.logp_B, expected)


@pytest.mark.parametrize(
    "rule",
    [
        RowRule(1.2),
        RowRule(1.2, top_p=0.6),
        RowRule(1.2, top_k=5),
        RowRule(1.2, min_p=0.1),
        RowRule(1.2, 0.9, 20, 0.02),
    ],
)
def test_frequencies_are_those_of_the_cut_distribution(rule):
    count = 4_000
    logits = _logits(1)
    p = torch.softmax(logits[0].double() / rule.temperature, -1)
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p)
    mass = 0.0
    total_k = p[order[: rule.top_k]].sum()
    for place, token in enumerate(order.tolist()):
        inside_k = rule.top_k is None or place < rule.top_k
        if inside_k and mass < rule.top_p and p[token] >= rule.min_p * p[order[0]]:
            kept[token] = p[token]
        mass += float(p[token] / total_k)
    kept = kept / kept.sum()
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = draw_rows(logits.expand(count, -1), rules=[rule] * count, uniform_B=uniform, ids=VOCABULARY).ids_B
    frequencies = torch.bincount(found, minlength=VOCABULARY) / count
    assert (frequencies - kept).abs().max() < 2 / count
    assert set(found.tolist()) <= set(kept.nonzero().flatten().tolist())


def test_a_row_does_not_depend_on_the_rules_of_the_others():
    logits, uniform = _logits(5, seed=4), _uniforms(5)
    rules = [RowRule(0.0), RowRule(1.0), RowRule(1.0, top_k=3), RowRule(1.5, top_p=0.9), RowRule(0.7, min_p=0.2)]
    together = draw_rows(logits, rules=rules, uniform_B=uniform, ids=VOCABULARY)
    for row, rule in enumerate(rules):
        one = slice(row, row + 1)
        alone = draw_rows(logits[one], rules=[rule], uniform_B=uniform[one], ids=VOCABULARY)
        assert (alone.ids_B, alone.margin_B) == (together.ids_B[one], together.margin_B[one])


@pytest.mark.parametrize("rule", [RowRule(0.0), RowRule(1.0), RowRule(1.0, top_p=0.8), RowRule(1.0, top_k=9)])
def test_noise_below_the_margin_changes_no_token(rule):
    rows = 3000
    logits, uniform = _logits(rows, seed=2), _uniforms(rows)
    noisy = logits + 1e-5 * (2 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(9)) - 1)
    before, after = (draw_rows(x, rules=[rule] * rows, uniform_B=uniform, ids=VOCABULARY) for x in (logits, noisy))
    changed = before.ids_B != after.ids_B
    assert not (changed & (before.margin_B > 1e-4)).any()
    assert (before.margin_B > 1e-4).float().mean() > 0.9


def test_the_margin_of_the_likeliest_is_the_gap_of_the_two_largest_logits():
    logits = torch.tensor([[1.0, 3.5, 3.0, -1.0]])
    found = draw_rows(logits, rules=[RowRule(0.0)], uniform_B=torch.zeros(1, dtype=torch.float64), ids=4)
    assert (int(found.ids_B), float(found.margin_B)) == (1, 0.5)


def test_columns_beyond_the_tokens_are_never_drawn():
    logits = torch.zeros(50, VOCABULARY)
    logits[:, 300:] = 50.0
    found = draw_rows(logits, rules=[RowRule(1.0)] * 50, uniform_B=_uniforms(50), ids=300)
    assert int(found.ids_B.max()) < 300


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize(
    "rule",
    [
        RowRule(1.0, top_p=0.5),
        RowRule(1.0, top_p=0.99),
        RowRule(1.5, top_k=300, top_p=0.9),
        RowRule(1.0, top_k=70),
        RowRule(3.0, min_p=0.01),
        RowRule(1.0, top_k=900, top_p=0.3),
    ],
)
def test_how_many_are_sorted_at_first_changes_nothing(rule, decimals):
    rows, generator = 30, torch.Generator().manual_seed(7)
    spread = 0.3 + 6 * torch.rand(rows, 1, generator=generator)
    # Few decimals: many ids with the same probability.
    logits = (spread * torch.randn(rows, 2000, generator=generator)).round(decimals=decimals)
    p = torch.softmax(logits.double() / rule.temperature, -1)
    all_ids, all_margins = draw_cut(p, [rule] * rows, _uniforms(rows), count=2000)
    for count in (4, 60, 256):
        ids, margins = draw_cut(p, [rule] * rows, _uniforms(rows), count=count)
        assert torch.equal(ids, all_ids)
        torch.testing.assert_close(margins, all_margins, rtol=0, atol=1e-12)
