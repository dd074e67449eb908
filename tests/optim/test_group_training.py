"""Groups under ZeRO-3 on two ranks: Adam with each group's betas, what is frozen, and rates across a resumed run."""

import json

import pytest
import torch
from step_jobs import weights_after
from tiny import join_rows, make_rows, save_tiny_llama
from tiny_run import distil, distil_until, metrics, settings

from largekd.config.train import OptimConfig
from largekd.optim.schedule import learning_rate

RUN = {"rows": 8, "packed": True, "micro_batch_size": 2, "lr": 1e-2, "objective": {"alpha": 0.0, "chunk_tokens": 16}}
GROUPS = [
    {"name": "frozen", "pattern": r"layers\.0\.", "lr_multiplier": 0.0},
    {"name": "mlp", "pattern": r"mlp", "lr_multiplier": 3.0, "betas": [0.5, 0.7], "eps": 1e-3, "weight_decay": 0.2},
    {"name": "attention", "pattern": r"self_attn", "lr_multiplier": 0.5, "betas": [0.0, 0.99]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    teacher = save_tiny_llama(folder / "teacher", seed=1, hidden=48)
    return {"teacher": str(teacher), "student": str(save_tiny_llama(folder / "student", seed=2))}


def test_each_group_is_adam_with_its_own_betas_and_eps(models, two_ranks):
    steps = 3
    found, _ = two_ranks.run(weights_after, **RUN, **models, steps=steps, optim={"groups": GROUPS})
    expected, before = plain_adamw(models["student"], steps=steps)
    for name, weight in expected.items():
        assert (found["weights"][name] - weight).abs().max() <= 2e-6, name
        assert torch.equal(found["weights"][name], before[name]) == (".layers.0." in name), name


def plain_adamw(student, *, steps):
    """float64, one process, full logits; the groups written out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    settings_of = {
        "mlp": {"lr": 3e-2, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.2},
        "self_attn": {"lr": 5e-3, "betas": (0.0, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        "": {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    }
    groups = {key: {"params": [], **setting} for key, setting in settings_of.items()}
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
            continue
        groups[next(key for key in groups if key in name)]["params"].append(parameter)
    optimizer = torch.optim.AdamW(list(groups.values()))
    for step in range(steps):
        batch = join_rows(make_rows(count=RUN["rows"], packed=True, seed=step))
        logits = model(**batch.model_inputs, use_cache=False).logits.flatten(0, 1)[batch.counted_T]
        weight = batch.token_weight_BS.flatten()[batch.counted_T].double()
        loss = torch.nn.functional.cross_entropy(logits, batch.labels_BS.flatten()[batch.counted_T], reduction="none")
        ((loss * weight).sum() / weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}, before


OPTIM = {
    "lr": 1e-3,
    "warmup_steps": 3,
    "layer_decay": 0.5,
    "groups": [
        {"name": "frozen", "pattern": r"embed_tokens", "lr_multiplier": 0.0},
        {"name": "mlp", "pattern": r"\.mlp\.", "lr_multiplier": 4.0, "betas": [0.5, 0.8]},
    ],
}
FACTORS = {"mlp.layer_0": 2.0, "mlp.layer_1": 4.0, "default.layer_0": 0.5, "default.layer_1": 1.0}


def test_rates_follow_the_closed_form_across_warm_up_and_resume(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", optim=OPTIM)
    assert two_ranks.run(distil_until, tree=tree, step=2, rank=0) == [None, None]
    two_ranks.run(distil, tree=tree)
    optim = OptimConfig.model_validate(OPTIM)
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        peak = learning_rate(step=record["step"] - 1, max_steps=6, config=optim)
        for name, factor in FACTORS.items():
            assert record[f"optim/lr/{name}"] == pytest.approx(factor * peak, rel=1e-12), (name, record["step"])
        assert not any("frozen" in key for key in record)
    groups = {group["group"]: group for group in json.loads((tmp_path / "run/groups.json").read_text())["0"]}
    assert groups["frozen"]["optimizer_bytes"] == 0 and groups["frozen"]["parameters"] == ["model.embed_tokens.weight"]
    assert groups["mlp.layer_0"]["betas"] == [0.5, 0.8]


def test_a_run_that_goes_on_with_other_groups_is_refused(tiny_assets, two_ranks, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", optim=OPTIM)
    two_ranks.run(distil_until, tree=tree, step=2, rank=0)
    other = settings(tiny_assets, tmp_path / "run", optim=OPTIM | {"groups": [OPTIM["groups"][1]]})
    with pytest.raises(AssertionError, match=r"optim\.groups"):
        two_ranks.run(distil, tree=other)
    path = tmp_path / "run/groups.json"
    groups = json.loads(path.read_text())
    groups["0"][0]["betas"] = [0.1, 0.2]
    path.write_text(json.dumps(groups))
    with pytest.raises(AssertionError, match=r"began with other learning-rate groups:\s+\S+betas: \[0\.1, 0\.2\] -> "):
        two_ranks.run(distil, tree=tree)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"groups": [{"name": "x", "pattern": "no_such_layer"}]}, "group 'x' claims no parameter"),
        ({"strict": True, "groups": [{"name": "x", "pattern": "mlp"}]}, "optim.strict = true: .*embed_tokens"),
    ],
)
def test_patterns_are_checked_before_any_weight_is_read(tiny_assets, one_rank, tmp_path, optim, message):
    from shutil import copytree

    # Weights that cannot be read would be the error if they came first.
    broken = copytree(tiny_assets / "teacher", tmp_path / "teacher")
    (broken / "model.safetensors").write_bytes(b"nothing")
    tree = settings(tiny_assets, tmp_path / "run", optim=optim, teacher__model=str(broken))
    with pytest.raises(AssertionError, match=message):
        one_rank.run(distil, tree=tree)
