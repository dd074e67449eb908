"""Alignment terms in an optimizer step, against plain transformers with full hidden states and attention maps."""

from typing import Any

import pytest
import torch
from alignment_jobs import steps_with_alignment
from alignment_reference import aligned_rows, reference_step, term_square
from tiny import save_tiny_llama

ROWS = 8
LAYERS = {"map": "explicit", "pairs": [[0, 1], [2, 3]]}
KEPT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1_000_000}}


def feature(name: str, loss: str, kind: str, **options: Any) -> dict[str, Any]:
    projector = {"kind": kind} | options.pop("projector", {})
    return {"name": name, "loss": loss, "projector": projector, "layers": LAYERS, **options}


def attention(name: str, loss: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "loss": loss, "layers": LAYERS, **options}


FEATURES = {
    "alpha": 0.5,
    "features": [
        feature("linear", "mse", "linear", projector={"bias": True}, weight=0.5),
        feature("mlp", "mse", "mlp", projector={"hidden": 20}),
        feature("low_rank", "mse", "low_rank_identity", projector={"rank": 3}),
        feature("pool", "mse", "pool"),
        feature("shared", "normalised_mse", "linear", projector={"shared": True}),
        feature("cosine", "cosine", "linear", weight=2.0),
        feature("cka", "cka", "pool"),
        feature("predictive", "predictive", "linear", predictor_hidden=12),
    ],
}
ATTENTION = {
    "alpha": 0.5,
    "attention": [
        attention("kl", "kl", head_importance="learned", weight=0.5),
        attention("cosine", "cosine", match_heads="repeat"),
        attention("mse", "mse", query_block=5),
        attention("relation", "relation", relations=["qq", "kk", "vv"], relation_heads=8),
    ],
}
EQUAL_WIDTHS = {
    "alpha": 0.0,
    "features": [feature("none", "mse", "none"), feature("kept", "predictive", "none", weight=0.2)],
    "attention": [attention("kl", "kl")],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher that is wider and has twice the heads."""
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=4, hidden=48, heads=8, key_heads=4)
    student = save_tiny_llama(folder / "student", seed=2, layers=3)
    return {"teacher": str(teacher), "student": str(student)}


@pytest.fixture(scope="module")
def equal_models(models, tmp_path_factory):
    teacher = save_tiny_llama(tmp_path_factory.mktemp("models") / "teacher", seed=4, layers=4, heads=2, key_heads=1)
    return models | {"teacher": str(teacher)}


def assert_same_gradients(found, reference, *, step: int = 0, relative: float = 1e-5) -> None:
    """The student's together relative to their norm, and each alignment parameter relative to its own."""
    assert found["losses"][step] == pytest.approx(reference["loss"], rel=relative)
    mine, theirs = found["gradients"][step], reference["gradients"]
    assert mine.keys() == theirs.keys()
    student = [name for name in theirs if not name.startswith("alignment.")]
    norm = torch.stack([theirs[name].double().norm() for name in student]).norm()
    for name, gradient in theirs.items():
        scale = norm if name in student else gradient.double().norm()
        difference = (mine[name].double() - gradient.double()).norm()
        assert difference <= relative * scale, f"{name}: {difference / scale:.2e}"


def reference_of(models, objective, found, *, packed: bool, step: int = 0) -> dict[str, Any]:
    weights, rows = found["weights"][step], aligned_rows(count=ROWS, packed=packed, seed=step)
    return reference_step(
        **models,
        objective=objective,
        rows=rows,
        weights=weights,
        pairs=found["pairs"][step],
        all_pairs=found["all_pairs"],
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", [FEATURES, ATTENTION, EQUAL_WIDTHS], ids=["features", "attention", "equal"])
def test_gradients_are_those_of_plain_models(models, equal_models, two_ranks, objective, packed):
    both = equal_models if objective is EQUAL_WIDTHS else models
    run = {"objective": objective, "packed": packed, "alignment_noise": 0.1, **both}
    reference = None
    for options in ({"micro_batch_size": 1, "student_zero": KEPT}, {"micro_batch_size": 2, "checkpointing": True}):
        for found in two_ranks.run(steps_with_alignment, **run, **options):
            reference = reference or reference_of(both, objective, found, packed=packed)
            assert_same_gradients(found, reference)
    # The comparison is not blind to the alignment's own parameters.
    name = next(name for name in reference["gradients"] if name.startswith("alignment."))
    reference["gradients"][name] = reference["gradients"][name] * 1.001
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        assert_same_gradients(found, reference)


TRAINED = {
    "alpha": 0.5,
    "features": [
        feature("linear", "mse", "linear", projector={"bias": True}),
        feature("predictive", "predictive", "low_rank_identity", projector={"rank": 3}, predictor_hidden=12),
    ],
    "attention": [attention("kl", "kl", head_importance="learned")],
}


def test_projectors_learn_and_two_ranks_do_what_one_does(models, one_rank, two_ranks):
    run = {"steps": 3, "lr": 1e-2, "objective": TRAINED, "packed": True, **models}
    (alone,) = one_rank.run(steps_with_alignment, **run)
    for found in two_ranks.run(steps_with_alignment, **run):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, weight in alone["weights"][-1].items():
            torch.testing.assert_close(found["weights"][-1][name], weight, rtol=1e-4, atol=1e-4, msg=name)
    own = [name for name in alone["weights"][0] if name.startswith("alignment.")]
    assert {name.split(".")[2] for name in own} == {"linear", "predictive", "kl"}
    for name in own:
        assert not torch.equal(alone["weights"][0][name], alone["weights"][1][name]) or "down_RD" in name, name
        assert not torch.equal(alone["weights"][0][name], alone["weights"][-1][name]), name


def test_projectors_have_groups_of_their_own_and_can_be_frozen(models, two_ranks):
    groups = [
        {"name": "still", "pattern": r"^alignment\.terms\.linear\.projectors\.0_1\.", "lr_multiplier": 0.0},
        {"name": "quick", "pattern": r"^alignment\.terms\.", "lr_multiplier": 3.0},
    ]
    run = {"steps": 2, "lr": 1e-2, "objective": TRAINED, "optim": {"groups": groups}, **models}
    for found in two_ranks.run(steps_with_alignment, **run):
        assert found["rates"] == pytest.approx(
            {"default": 1e-2, "default.no_decay": 1e-2, "quick": 3e-2, "quick.no_decay": 3e-2}
        )
        first, last = found["weights"][0], found["weights"][-1]
        kept = {name for name in first if torch.equal(first[name], last[name])}
        assert kept == {f"alignment.terms.linear.projectors.0_1.map.{part}" for part in ("weight", "bias")}
        # Adam's first steps are about as long as the rate.
        moved = (found["weights"][1]["alignment.terms.kl.head_weights.logits_PH"]).abs().max()
        assert moved == pytest.approx(3e-2, rel=0.05)


SAMPLED = {
    "alpha": 0.0,
    "features": [
        feature("linear", "mse", "linear", layers={"map": "uniform"}, sample_pairs=1),
        feature("predictive", "predictive", "pool", layers={"map": "uniform"}, sample_pairs=2, predictor_hidden=12),
    ],
    "attention": [attention("kl", "kl", layers={"map": "uniform"}, sample_pairs=1, head_importance="learned")],
}


@pytest.mark.parametrize("zero", [None, KEPT], ids=["partitioned", "kept whole"])
def test_pairs_that_are_not_drawn_have_no_gradient_not_a_stale_one(models, two_ranks, zero):
    run = {"steps": 3, "lr": 1e-2, "objective": SAMPLED, "alignment_noise": 0.1, "student_zero": zero, **models}
    found, other = two_ranks.run(steps_with_alignment, **run)
    assert found["pairs"] == other["pairs"]
    assert len({pairs["linear"][0] for pairs in found["pairs"]}) > 1, "one draw in all steps would show nothing"
    for step, pairs in enumerate(found["pairs"]):
        reference = reference_of(models, SAMPLED, found, packed=False, step=step)
        # A pair that takes no part is in no graph of the reference.
        idle = {name for name, gradient in reference["gradients"].items() if gradient is None}
        drawn = {f"{kind}.{s}_{t}." for kind, n in DRAWN.items() for s, t in pairs[n]}
        assert idle == {n for n in found["gradients"][step] if any(k in n for k in DRAWN) and not _any(drawn, n)}
        assert len(idle) == 2 + 4
        for name in idle:
            assert float(found["gradients"][step][name].abs().max()) == 0.0, (step, name)
            reference["gradients"][name] = torch.zeros_like(found["gradients"][step][name])
        assert_same_gradients(found, reference, step=step)


DRAWN = {"projectors": "linear", "predictors": "predictive"}


def _any(parts: set[str], name: str) -> bool:
    return any(part in name for part in parts)


def test_term_gradients_and_evaluations_leave_the_training_alone(models, two_ranks):
    objective = TRAINED | {"divergences": [{"name": "forward_kl"}, {"name": "reverse_kl", "weight": 0.5}]}
    run = {"steps": 3, "lr": 1e-2, "objective": objective, "packed": True, **models}
    plain = two_ranks.run(steps_with_alignment, **run)
    watched = two_ranks.run(steps_with_alignment, term_gradients=True, evaluation_between=True, **run)
    for mine, theirs in zip(watched, plain, strict=True):
        for name in ("losses", "own_losses", "norms", "resident"):
            assert mine[name] == theirs[name], name
        for step, weights in enumerate(theirs["weights"]):
            assert all(torch.equal(mine["weights"][step][name], weight) for name, weight in weights.items())
        assert theirs["squares"] == [None] * 3
        assert all(len(squares) == 6 and min(squares) > 0 for squares in mine["squares"])
        perplexities = [figures["perplexity"] for figures in mine["figures"]]
        assert len(set(perplexities)) == 3 and min(perplexities) > 1
    assert watched[0]["figures"] == watched[1]["figures"]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_terms_gradient_norm_is_that_of_its_captured_activations(models, two_ranks, micro_batch_size):
    objective = {"alpha": 0.5, "features": [feature("cosine", "cosine", "linear", weight=2.0)]}
    for packed in (False, True):
        found, _ = two_ranks.run(
            steps_with_alignment,
            term_gradients=True,
            packed=packed,
            micro_batch_size=micro_batch_size,
            objective=objective,
            **models,
        )
        rows = aligned_rows(count=ROWS, packed=packed)
        entry, pairs = objective["features"][0], [(0, 1), (2, 3)]
        expected = term_square(entry, **models, rows=rows, weights=found["weights"][0], pairs=pairs)
        assert found["squares"][0][-1] == pytest.approx(expected, rel=1e-5)
