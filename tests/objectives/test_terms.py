"""From the objective's configuration to weighted terms."""

import pytest

from largekd.config.objective import ObjectiveConfig
from largekd.contracts import SignalRequest
from largekd.errors import ConfigError
from largekd.objectives.divergences import JSD, forward_kl, reverse_kl
from largekd.objectives.terms import build_terms, request_of

THREE = ({"name": "forward_kl", "weight": 2.0}, {"name": "reverse_kl"}, {"name": "jsd", "weight": 0.5, "mix": 0.1})


def test_weights_and_order() -> None:
    terms = build_terms(ObjectiveConfig(alpha=0.25, temperature=2.0, divergences=THREE))
    assert [term.name for term in terms] == ["cross_entropy", "forward_kl", "reverse_kl", "jsd"]
    assert [term.weight for term in terms] == [0.75, 0.25 * 4 * 2.0, 0.25 * 4, 0.25 * 4 * 0.5]
    assert [term.divergence for term in terms] == [None, forward_kl, reverse_kl, JSD(mix=0.1)]
    assert {term.count_key for term in terms} == {"label_tokens"}
    assert request_of(terms) == SignalRequest(distribution=True)


def test_alpha_zero_needs_no_teacher() -> None:
    terms = build_terms(ObjectiveConfig(alpha=0.0, divergences=THREE))
    assert [term.name for term in terms] == ["cross_entropy"]
    assert request_of(terms) == SignalRequest(distribution=False)


def test_alpha_one_has_no_cross_entropy() -> None:
    assert [term.name for term in build_terms(ObjectiveConfig(alpha=1.0))] == ["forward_kl"]


def test_weight_zero_is_dropped() -> None:
    config = ObjectiveConfig(divergences=({"name": "forward_kl", "weight": 0.0}, {"name": "jsd"}))
    assert [term.name for term in build_terms(config)] == ["cross_entropy", "jsd"]


def test_a_divergence_named_twice() -> None:
    config = ObjectiveConfig(divergences=({"name": "jsd", "mix": 0.1}, {"name": "jsd", "mix": 0.9}))
    with pytest.raises(ConfigError, match=r"objective\.divergences names 'jsd' more than once"):
        build_terms(config)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1\.0 and no divergence .* objective\.divergences"):
        build_terms(ObjectiveConfig(alpha=1.0, divergences=()))
