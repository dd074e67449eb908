"""One optimizer step of mixtures of experts against plain transformers in float64, under every split of the work."""

import pytest
import torch
from moe_jobs import router_steps, squares_of_step
from placements import offload
from step_jobs import gradient_of_step, weights_after
from test_step import assert_same_gradient
from tiny import make_rows, save_tiny_llama
from tiny_moe import EXPERTS, save_tiny_moe

from largekd.config.objective import ObjectiveConfig

ROWS = 8
ROUTER = {"balance": 0.3, "z": 0.05, "distil": {"weight": 0.7, "pairs": [[0, 2], [1, 0]]}}
OBJECTIVE = {"alpha": 0.6, "chunk_tokens": 7, "router": ROUTER}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny_moe(tmp_path_factory.mktemp("moe") / "teacher", "mixtral", seed=1, layers=3, hidden=48))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return {name: str(save_tiny_moe(folder / name, name, seed=2)) for name in ("mixtral", "olmoe", "qwen3_moe")}


def load(folder):
    """The model of a folder in float64 and plain eager arithmetic; its weights as they are in the file."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return model.double()


def routed(model, row):
    """Final logits and every router's logits of one row, fill cut off."""
    found = model(**row.model_inputs, use_cache=False, output_router_logits=True)
    used = row.segments[0][0].length
    return found.logits.flatten(0, 1), [logits.view(-1, EXPERTS)[:used] for logits in found.router_logits]


def reference_gradient(*, rows, packed, teacher, student, objective=OBJECTIVE, seed=0):
    """Gradient of the whole loss with full logits; loads are equal, as in a run's first step."""
    config = ObjectiveConfig.model_validate(objective)
    models = [load(teacher), load(student)]
    kd, count, terms, used = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros(3, dtype=torch.float64), 0
    for row in make_rows(count=rows, packed=packed, seed=seed):
        with torch.no_grad():
            z, taught = routed(models[0], row)
        s, own = routed(models[1], row)
        logp, logq = (x[row.counted_T].log_softmax(-1) for x in (z, s))
        label = row.labels_BS.flatten()[row.counted_T]
        w = row.token_weight_BS.flatten()[row.counted_T].double()
        hard = -logq.gather(-1, label[:, None]).squeeze(-1)
        forward = (logp.exp() * (logp - logq)).sum(-1)
        kd = kd + (w * ((1 - config.alpha) * hard + config.alpha * forward)).sum()
        count += float(w.sum())
        used += row.segments[0][0].length
        balance = sum(x.softmax(-1).sum() for x in own) / len(own)
        square = sum(x.logsumexp(-1).square().sum() for x in own) / len(own)
        follow = sum(
            (taught[t].softmax(-1) * (taught[t].log_softmax(-1) - own[s].log_softmax(-1))).sum()
            for s, t in config.router.distil.pairs
        ) / len(config.router.distil.pairs)
        terms = terms + torch.stack([balance, square, follow])
    weights = torch.tensor([config.router.balance, config.router.z, config.router.distil.weight], dtype=torch.float64)
    loss = kd / count + (weights * terms).sum() / used
    loss.backward()
    named = {name: parameter.grad.float() for name, parameter in models[1].named_parameters()}
    return {"gradients": named, "loss": float(loss.detach()), "count": count}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradient_is_the_same_under_every_split(teacher, students, one_rank, two_ranks, packed):
    models = {"teacher": teacher, "student": students["mixtral"]}
    reference = reference_gradient(rows=ROWS, packed=packed, **models)
    for pool, micro in ((one_rank, 8), (one_rank, 1), (two_ranks, 1), (two_ranks, 4)):
        arguments = {"rows": ROWS, "packed": packed, "micro_batch_size": micro, "objective": OBJECTIVE}
        for result in pool.run(gradient_of_step, **arguments, **models):
            assert_same_gradient(result, reference)
    router = [g for name, g in reference["gradients"].items() if name.endswith("mlp.gate.weight")]
    assert len(router) == 2 and all(gradient.abs().max() > 1e-3 for gradient in router)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_families_with_checkpointing_and_offload(teacher, students, two_ranks, tmp_path, family):
    models = {"teacher": teacher, "student": students[family]}
    reference = reference_gradient(rows=ROWS, packed=True, **models)
    cpu = offload("cpu", folder=tmp_path, optimizer=True)
    for options in ({}, {"checkpointing": True}, {"checkpointing": True, "student_zero": cpu, "teacher_zero": cpu}):
        arguments = {"rows": ROWS, "packed": True, "micro_batch_size": 2, "objective": OBJECTIVE, **options}
        for result in two_ranks.run(gradient_of_step, **arguments, **models):
            assert_same_gradient(result, reference)


def test_a_dense_student_learns_from_a_mixture(teacher, two_ranks, tmp_path):
    student = str(save_tiny_llama(tmp_path / "dense", seed=3))
    arguments = {"rows": ROWS, "packed": True, "micro_batch_size": 2, "teacher": teacher, "student": student}
    for signal in ({"kind": "full"}, {"kind": "top_k", "k": 8}, {"kind": "sampled", "draws": 8}):
        objective = {"alpha": 1.0, "chunk_tokens": 7, "signal": signal}
        (result, _) = two_ranks.run(weights_after, steps=6, lr=1e-2, watch=False, objective=objective, **arguments)
        assert result["losses"][-1] < result["losses"][0], signal


def test_term_gradients_are_recorded_for_routers(teacher, students, two_ranks):
    arguments = {"rows": ROWS, "micro_batch_size": 2, "teacher": teacher, "student": students["mixtral"]}
    results = two_ranks.run(squares_of_step, objective=OBJECTIVE, **arguments)
    for names, squares in results:
        assert names[-3:] == ["load_balance", "router_z", "router_kl"]
        assert len(names) == len(squares)
        # Equal loads: the balance has no gradient yet.
        assert squares[-3] < 1e-9 < min(squares[-2], squares[-1])


def test_loads_are_global_and_do_not_depend_on_the_split(teacher, students, one_rank, two_ranks):
    arguments = {"steps": 3, "rows": ROWS, "lr": 1e-12, "teacher": teacher, "student": students["mixtral"]}
    arguments["objective"] = OBJECTIVE
    (alone,) = one_rank.run(router_steps, micro_batch_size=8, **arguments)
    results = two_ranks.run(router_steps, micro_batch_size=1, **arguments)
    for result in results:
        assert torch.equal(result["loads"], alone["loads"])
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
            assert {"router/overlap", "router/max_load/layer_1"} <= mine.keys()
    assert not torch.equal(results[0]["own"], results[1]["own"])
    assert (alone["loads"].sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.slow
def test_balance_evens_a_skewed_router_and_only_it_does(teacher, tmp_path, two_ranks):
    student = str(save_tiny_moe(tmp_path / "skewed", "mixtral", seed=3, num_local_experts=8, skew=1.5))
    highest = {}
    for weight in (1.0, 0.0):
        results = two_ranks.run(
            router_steps,
            steps=50,
            rows=ROWS,
            micro_batch_size=4,
            lr=1e-2,
            teacher=teacher,
            student=student,
            checkpointing=True,
            objective={"alpha": 1.0, "chunk_tokens": 64, "router": {"balance": weight, "z": 0.0}},
        )
        loads = results[0]["loads"]
        assert (loads[0].max(-1).values * loads.shape[-1]).min() > 3.0
        highest[weight] = (loads[-5:].mean(0).max(-1).values * loads.shape[-1]).max().item()
    assert highest[1.0] <= 2.0 < 3.0 < highest[0.0], highest
