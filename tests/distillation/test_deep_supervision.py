"""Losses of intermediate layers against plain transformers in float64, under every split of the work."""

from typing import Any

import pytest
import torch
from ema_jobs import deep_figures
from step_jobs import gradient_of_step
from tiny import make_rows, save_tiny_llama
from transformers import AutoModelForCausalLM

ROWS, ALPHA, TEMPERATURE, WEIGHT, LAYERS = 8, 0.7, 2.0, 0.3, (0, 1)
OBJECTIVE: dict[str, Any] = {
    "alpha": ALPHA,
    "temperature": TEMPERATURE,
    "divergences": [{"name": "forward_kl"}, {"name": "reverse_kl", "weight": 0.5}],
    "chunk_tokens": 7,
    "deep_supervision": {"layers": list(LAYERS), "weight": WEIGHT},
}
EVERYTHING_WHOLE = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=2, hidden=48)
    student = save_tiny_llama(folder / "student", seed=2, layers=3)
    untied = save_tiny_llama(folder / "untied", seed=3, layers=3, tied=False)
    return {"teacher": str(teacher), "student": str(student), "untied": str(untied)}


def reference_gradient(*, teacher: str, student: str, weight: float = WEIGHT) -> dict[str, Any]:
    """Loss and gradient with full logits: the last layer, and each of LAYERS through the final norm and the head."""
    theirs, ours = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in (teacher, student))
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for row in make_rows(count=ROWS, packed=True):
        with torch.no_grad():
            z = theirs(**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        outputs = ours(**row.model_inputs, use_cache=False, output_hidden_states=True)
        logits = [(1.0, outputs.logits)]
        # hidden_states[0] is the embedding.
        logits += [(weight, ours.lm_head(ours.model.norm(outputs.hidden_states[layer + 1]))) for layer in LAYERS]
        w = row.token_weight_BS.flatten()[row.counted_T].double()
        label = row.labels_BS.flatten()[row.counted_T]
        logp = z.div(TEMPERATURE).log_softmax(-1)
        for factor, own in logits:
            s = own.flatten(0, 1)[row.counted_T]
            logq = s.div(TEMPERATURE).log_softmax(-1)
            kl = (logp.exp() * (logp - logq)).sum(-1) + 0.5 * (logq.exp() * (logq - logp)).sum(-1)
            hard = -s.log_softmax(-1).gather(-1, label[:, None]).squeeze(-1)
            total = total + factor * (w * ((1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * kl)).sum()
        count += float(w.sum())
    (total / count).backward()
    named = {name: parameter.grad.float() for name, parameter in ours.named_parameters()}
    return {"gradients": named, "loss": float(total / count)}


def assert_same_gradient(mine, reference, *, relative=1e-5):
    assert mine["loss"] == pytest.approx(reference["loss"], rel=relative)
    norm = torch.stack([g.double().norm() for g in reference["gradients"].values()]).norm()
    assert mine["gradients"].keys() == reference["gradients"].keys()
    for name, gradient in reference["gradients"].items():
        difference = (mine["gradients"][name].double() - gradient.double()).norm()
        assert difference <= relative * norm, f"{name}: {difference / norm:.2e}"


def test_gradient_is_the_same_under_every_split(models, one_rank, two_ranks):
    pair = {"teacher": models["teacher"], "student": models["student"]}
    reference = reference_gradient(**pair)
    for pool, micro in ((one_rank, 2), (two_ranks, 1), (two_ranks, 4)):
        for result in pool.run(
            gradient_of_step, rows=ROWS, packed=True, micro_batch_size=micro, objective=OBJECTIVE, **pair
        ):
            assert_same_gradient(result, reference)
    wrong = reference_gradient(**pair, weight=WEIGHT * 1.01)
    with pytest.raises(AssertionError):
        assert_same_gradient(result, wrong)


@pytest.mark.parametrize("student", ["student", "untied"])
def test_gradient_with_checkpointing_and_weights_kept_whole(models, two_ranks, student):
    pair = {"teacher": models["teacher"], "student": models[student]}
    reference = reference_gradient(**pair)
    for options in ({"checkpointing": True}, {"student_zero": EVERYTHING_WHOLE}):
        for result in two_ranks.run(
            gradient_of_step, rows=ROWS, packed=True, micro_batch_size=2, objective=OBJECTIVE, **pair, **options
        ):
            assert_same_gradient(result, reference)


def test_figures_of_every_layer_and_none_in_evaluation(models, two_ranks):
    pair = {"teacher": models["teacher"], "student": models["student"]}
    for result in two_ranks.run(deep_figures, rows=ROWS, objective=OBJECTIVE, **pair):
        names = ["cross_entropy", "forward_kl", "reverse_kl"]
        assert result["names"] == names + [f"deep_supervision.{layer}.{name}" for layer in LAYERS for name in names]
        assert len(result["sums"]) == len(result["squares"]) == 9
        assert min(result["sums"]) > 0 and min(result["squares"]) > 0
        # The intermediate layers of a random model say something else than the last one.
        assert len(set(result["sums"])) == 9
        assert result["evaluation"][3:] == [0.0] * 6
        assert result["evaluation"][:3] == pytest.approx(result["sums"][:3], rel=1e-5)
