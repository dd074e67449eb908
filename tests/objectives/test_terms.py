"""From the objective's configuration to terms, their factors over a run, and what the teacher must deliver."""

import pytest

from largekd.config.objective import ObjectiveConfig
from largekd.contracts import SampledRequest, SignalRequest, TapRequest, TopKRequest
from largekd.errors import ConfigError
from largekd.objectives import divergences
from largekd.objectives.plugins import PluginTerm
from largekd.objectives.terms import Objective, SpanLikelihood, build_objective

THREE = ({"name": "forward_kl", "weight": 2.0}, {"name": "reverse_kl"}, {"name": "jsd", "weight": 0.5, "mix": 0.1})
NO_TAPS = TapRequest()


def objective(**values) -> Objective:
    return build_objective(ObjectiveConfig.model_validate(values), plugins={"mine": max})


def names(built: Objective) -> list[str]:
    return [summand.name for summand in built.summands]


def test_factors_and_order() -> None:
    built = objective(alpha=0.25, temperature=2.0, divergences=THREE)
    assert names(built) == [term.name for term in built.vocabulary]
    assert names(built) == ["cross_entropy", "forward_kl", "reverse_kl", "jsd"]
    assert built.factors(step=0, max_steps=5) == (0.75, 0.25 * 4 * 2.0, 0.25 * 4, 0.25 * 4 * 0.5)
    found = [term.divergence for term in built.vocabulary]
    assert found == [None, divergences.forward_kl, divergences.reverse_kl, divergences.JSD(mix=0.1)]
    assert [summand.count for summand in built.summands] == ["task_tokens"] + ["signal_tokens"] * 3


def test_every_divergence_has_its_function() -> None:
    entries = [
        ({"name": "bidirectional_kl", "forward_weight": 0.3}, divergences.BidirectionalKL(0.3, 0.5)),
        ({"name": "skewed_forward_kl", "skew": 0.2}, divergences.SkewedForwardKL(skew=0.2)),
        ({"name": "skewed_reverse_kl"}, divergences.SkewedReverseKL(skew=0.1)),
        ({"name": "adaptive_kl", "head_mass": 0.4}, divergences.AdaptiveKL(head_mass=0.4)),
        ({"name": "total_variation"}, divergences.total_variation),
        ({"name": "alpha_beta", "alpha": 0.2, "beta": 0.7}, divergences.AlphaBeta(alpha=0.2, beta=0.7)),
        ({"name": "logit_mse"}, divergences.logit_mse),
        ({"name": "ranking_hinge", "top_k": 4}, divergences.RankingHinge(top_k=4, margin=1.0)),
        ({"name": "sorted_distance"}, divergences.sorted_distance),
        ({"name": "span_likelihood"}, SpanLikelihood()),
        ({"name": "plugin", "term": "mine", "options": {"b": 1, "a": 2}}, PluginTerm(max, (("a", 2), ("b", 1)))),
    ]
    built = objective(alpha=1.0, divergences=[entry for entry, _ in entries])
    assert [term.divergence for term in built.vocabulary] == [wanted for _, wanted in entries]
    assert names(built)[-1] == "mine" and built.summands[-2].count == "spans"


def test_curves_move_factors_and_the_request() -> None:
    line = {"shape": "linear", "start": 0.0, "end": 1.0}
    built = objective(
        alpha=line, temperature={"shape": "linear", "start": 4.0, "end": 2.0}, signal={"kind": "top_k", "k": 8}
    )
    assert built.factors(step=0, max_steps=5) == (1.0, 0.0)
    assert built.factors(step=2, max_steps=5) == pytest.approx((0.5, 0.5 * 9.0))
    assert built.factors(step=4, max_steps=5) == (0.0, 4.0)
    assert built.request(step=2, max_steps=5, taps=NO_TAPS) == SignalRequest(TopKRequest(k=8, temperature=3.0))
    assert built.evaluation_request == SignalRequest("full")


def test_alpha_zero_needs_no_teacher() -> None:
    built = objective(alpha=0.0, divergences=THREE)
    assert names(built) == ["cross_entropy"]
    assert built.request(step=0, max_steps=1, taps=NO_TAPS) == SignalRequest()
    taps = TapRequest(hidden=(1,))
    assert built.request(step=0, max_steps=1, taps=taps) == SignalRequest(None, taps)


def test_draws_differ_from_step_to_step_and_from_seed_to_seed() -> None:
    built = objective(signal={"kind": "sampled", "draws": 3})
    wanted = [
        built.request(step=step, max_steps=9, taps=NO_TAPS, seed=seed).distribution
        for step in (0, 1)
        for seed in (0, 1)
    ]
    assert all(isinstance(request, SampledRequest) and request.draws == 3 for request in wanted)
    assert len({request.seed for request in wanted}) == 4


def test_a_translation_reads_the_likeliest_ids() -> None:
    built = objective(translation={"method": "spans", "top_k": 5}, temperature=2.0)
    assert built.request(step=0, max_steps=1, taps=NO_TAPS).distribution == TopKRequest(k=5, temperature=2.0)
    assert built.evaluation_request.distribution == TopKRequest(k=5, temperature=1.0)
    built = objective(translation={"method": "sorted"}, divergences=[{"name": "sorted_distance"}])
    assert built.request(step=0, max_steps=1, taps=NO_TAPS).distribution == "full"


def test_alignment_follows_the_vocabulary() -> None:
    built = objective(
        attention=[{"weight": 3.0}],
        features=[{"weight": 2.0}, {"name": "shape", "loss": "cka"}, {"name": "off", "weight": 0.0}],
    )
    assert names(built)[2:] == ["hidden", "shape", "attention"]
    assert built.factors(step=0, max_steps=1)[2:] == (2.0, 1.0, 3.0)
    assert [summand.count for summand in built.summands[2:]] == ["positions", "samples", "positions"]
    assert [summand.metric for summand in built.summands[1:3]] == ["kd/forward_kl", "align/hidden"]


def test_alpha_one_has_no_cross_entropy() -> None:
    assert names(objective(alpha=1.0)) == ["forward_kl"]


def test_weight_zero_is_dropped() -> None:
    assert names(objective(divergences=[{"name": "forward_kl", "weight": 0.0}, {"name": "jsd"}])) == [
        "cross_entropy",
        "jsd",
    ]


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1\.0 and no term .* objective\.divergences"):
        objective(alpha=1.0, divergences=())
    with pytest.raises(ConfigError, match=r"'other' is in none of the modules of `plugins`; they have mine"):
        objective(divergences=[{"name": "plugin", "term": "other"}])
