"""A student's frozen base as its teacher: one engine does what two separate models do."""

import lora_jobs as jobs
import pytest
import torch
from tiny import make_rows, save_tiny_llama

pytest.importorskip("peft")

ALIGNED = jobs.OBJECTIVE | {
    "features": [
        {"name": "hidden", "loss": "mse", "layers": {"map": "last", "count": 2}, "projector": {"kind": "none"}}
    ]
}
ROWS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("backbone") / "base", seed=0, layers=3))


def two_models(base, *, weights, lora):
    """Loss and gradients with a plain teacher beside a peft student, full logits, float64, one process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    teacher, student = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in range(2))
    targets = sorted({name.split(".lora_")[0] for name in weights if ".lora_" in name})
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_dora=lora.dora, target_modules=targets)
    student = get_peft_model(student, config)
    named = dict(student.base_model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name].double())
    total, count, alpha = torch.zeros((), dtype=torch.float64), 0.0, jobs.OBJECTIVE["alpha"]
    for row in make_rows(count=ROWS, packed=True):
        with torch.no_grad():
            z = teacher(**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        s = student(**row.model_inputs, use_cache=False).logits.flatten(0, 1)[row.counted_T]
        w = row.token_weight_BS.flatten()[row.counted_T].double()
        hard = -s.log_softmax(-1).gather(-1, row.labels_BS.flatten()[row.counted_T][:, None]).squeeze(-1)
        logp, logq = z.log_softmax(-1), s.log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        total = total + (w * ((1 - alpha) * hard + alpha * kl)).sum()
        count += float(w.sum())
    (total / count).backward()
    return {name: parameter.grad.float() for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [{}, {"dora": True}])
def test_gradients_are_those_of_two_separate_models(base, two_ranks, checkpointing, kind):
    found, _ = two_ranks.run(jobs.gradients, folder=base, checkpointing=checkpointing, **kind)
    expected = two_models(base, weights=found["weights"], lora=jobs.LoraConfig.model_validate(jobs.LORA | kind))
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def test_before_the_first_step_student_and_teacher_are_one(base, one_rank):
    (found,) = one_rank.run(jobs.gradients, folder=base, noise=0.0)
    cross_entropy, kl = found["sums"].tolist()
    assert cross_entropy > 1 and abs(kl) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_aligned_layers_see_the_base_and_the_adapters_apart(base, one_rank, two_ranks, checkpointing):
    (same,) = one_rank.run(jobs.gradients, folder=base, objective=ALIGNED, noise=0.0)
    assert abs(same["sums"][-1]) < 1e-8
    (alone,) = one_rank.run(jobs.gradients, folder=base, objective=ALIGNED)
    assert alone["sums"][-1] > 1e-3
    first, _ = two_ranks.run(jobs.gradients, folder=base, objective=ALIGNED, checkpointing=checkpointing)
    torch.testing.assert_close(first["sums"], alone["sums"], rtol=1e-4, atol=1e-6)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("objective", "passes"), [({"alpha": 0.0}, 1), ({"alpha": 0.5}, 2), (ALIGNED | {"alpha": 0.0}, 2)]
)
def test_the_base_runs_only_when_a_term_needs_it(base, one_rank, objective, passes):
    (found,) = one_rank.run(jobs.gradients, folder=base, objective=objective)
    assert found["passes"] == passes * ROWS
    assert all(gradient.isfinite().all() for gradient in found["gradients"].values())
