"""Placement changes nothing but the place: offload, ZeRO-3 against plain AdamW, groups, precision."""

import math

import pytest
import torch
from placements import needs_libaio, offload
from step_jobs import weights_after
from tiny import join_rows, make_rows, save_tiny_llama

RUN = {"steps": 10, "rows": 8, "packed": True, "micro_batch_size": 2, "lr": 1e-3, "clipping": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    teacher = save_tiny_llama(folder / "teacher", seed=1, layers=3, hidden=48)
    student = save_tiny_llama(folder / "student", seed=2)
    return {"teacher": str(teacher), "student": str(student)}


@pytest.fixture(scope="module")
def plain(models, two_ranks):
    return two_ranks.run(weights_after, **RUN, **models)[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("nvme", marks=needs_libaio)])
def test_teacher_offload_gives_identical_losses(models, two_ranks, plain, tmp_path, device):
    zero = offload(device, folder=tmp_path)
    (result, _) = two_ranks.run(weights_after, **RUN, **models, teacher_zero=zero)
    assert result["losses"] == plain["losses"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("nvme", marks=needs_libaio)])
def test_student_offload_trains_the_same(models, two_ranks, plain, tmp_path, device):
    zero = offload(device, folder=tmp_path, optimizer=True)
    (result, _) = two_ranks.run(weights_after, **RUN, **models, student_zero=zero)
    assert result["losses"][0] == plain["losses"][0]
    assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_zero3_is_plain_adamw(models, two_ranks):
    steps = 20
    objective = {"alpha": 0.0, "chunk_tokens": 16}
    arguments = {**RUN, "steps": steps, "objective": objective}
    (result, _) = two_ranks.run(weights_after, **arguments, **models)
    expected = plain_adamw(models["student"], steps=steps, lr=RUN["lr"], clipping=RUN["clipping"])
    for name, weight in expected.items():
        assert float((result["weights"][name] - weight).abs().max()) <= 1e-6, name


def plain_adamw(student, *, steps, lr, clipping):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(steps):
        batch = join_rows(make_rows(count=RUN["rows"], packed=True, seed=step))
        logits = model(**batch.model_inputs, use_cache=False).logits.flatten(0, 1)[batch.counted_T]
        weight = batch.token_weight_BS.flatten()[batch.counted_T]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels_BS.flatten()[batch.counted_T], reduction="none")
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_divergence_in_bf16_follows_fp32(models, two_ranks):
    divergence = {"alpha": 1.0, "divergences": [{"name": "forward_kl"}]}
    fp32, bf16 = (
        two_ranks.run(weights_after, **RUN, **models, objective=divergence, precision=precision)[0]["losses"]
        for precision in ("fp32", "bf16")
    )
    assert bf16 == pytest.approx(fp32, rel=0.01)


def test_groups_have_their_own_rates_and_frozen_ones_stay(models, two_ranks):
    groups = [
        {"name": "frozen", "pattern": r"layers\.0\.", "lr_multiplier": 0.0},
        {"name": "fast", "pattern": r"mlp", "lr_multiplier": 3.0},
    ]
    arguments = {**RUN, "steps": 2, "clipping": 0.0}
    before = two_ranks.run(weights_after, **{**arguments, "steps": 0}, **models)[0]["weights"]
    after = two_ranks.run(weights_after, **arguments, **models, optim={"groups": groups})[0]["weights"]
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(move == 0 for name, move in moved.items() if ".layers.0." in name)
    # Adam's first steps are lr in size, whatever the gradient.
    assert moved["model.layers.1.mlp.up_proj.weight"] == pytest.approx(2 * 3 * RUN["lr"], rel=0.2)
    assert moved["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(2 * RUN["lr"], rel=0.2)
    assert math.isfinite(sum(moved.values()))
