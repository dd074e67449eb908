"""Whole tiny runs with a self-shared teacher: what they log, leave behind, and go on with."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import distil, distil_until, metrics, settings

EXACT = (
    "loss",
    "optim/grad_norm",
    "kd/forward_kl",
    "kd/teacher_cross_entropy",
    "align/layers",
    "prune/neurons_frac",
    "prune/layers_frac",
    "prune/mean_rank",
)
TEACHER = {
    "kind": "self_shared",
    "adapters": {"rank": 2, "max_rank": 4},
    "pruning": {"neurons": 0.4, "head_groups": 0.5, "layers": 0.25, "every_steps": 1},
}
OBJECTIVE = {
    "alpha": {"shape": "constant", "start": 1.0, "warmup_frac": 0.6, "warmup_from": 0.0},
    "divergences": [{"name": "forward_kl"}],
    "features": [
        {
            "name": "layers",
            "layers": {"map": "closest_non_pruned"},
            "projector": {"kind": "low_rank_identity"},
            "sample_pairs": 2,
        }
    ],
}


def tree_of(assets, run_dir, **changes):
    """Six steps of the tiny model as backbone."""
    tree = settings(assets, run_dir, objective=OBJECTIVE, **changes)
    tree["teacher"] = TEACHER
    tree["student"] = {"model": str(assets / "teacher"), "deepspeed": tree["student"]["deepspeed"]}
    groups = [{"name": name, "pattern": rf"\.{name}\.lora_"} for name in ("student", "teacher")]
    tree["optim"] = {"lr": 1e-2, "groups": groups}
    return tree


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("self_shared") / "straight"
    summary, _ = two_ranks.run(distil, tree=tree_of(tiny_assets, run_dir))
    return run_dir, summary


def test_the_records_show_schedule_pruning_and_both_losses(straight):
    records = metrics(straight[0])
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    alpha = [record["schedule/alpha"] for record in records]
    assert alpha == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    for record, mu in zip(records, alpha, strict=True):
        assert record["schedule/factor/forward_kl"] == record["schedule/factor/layers"] == mu
        assert record["schedule/factor/cross_entropy"] == 1 - mu
        assert record["schedule/factor/teacher_cross_entropy"] == 1
        parts = ("kd/cross_entropy", "kd/forward_kl", "align/layers", "kd/teacher_cross_entropy")
        area, name = zip(*(part.split("/") for part in parts), strict=True)
        total = sum(record[f"{a}_weighted/{n}"] for a, n in zip(area, name, strict=True))
        assert record["loss"] == pytest.approx(total)
    assert records[0]["kd/forward_kl"] == pytest.approx(0, abs=1e-6), "both models start as the backbone"
    assert records[0]["align/layers"] == pytest.approx(0, abs=1e-9), "Tr starts as the identity"
    assert records[-1]["kd/forward_kl"] > 1e-3
    assert records[-1]["kd/teacher_cross_entropy"] < records[0]["kd/teacher_cross_entropy"]
    last = records[-1]
    assert last["prune/neurons_frac"] == pytest.approx(0.4, abs=0.01)
    assert (last["prune/head_groups_frac"], last["prune/layers_frac"]) == (0.5, 0.25)
    assert 2 < last["prune/mean_rank"] <= 4 and 0 < last["prune/duplicated_frac"] < 0.05
    assert {"optim/lr/student", "optim/lr/teacher"} <= last.keys()


def test_the_export_is_a_smaller_plain_model_that_scores_the_same(straight, tiny_assets):
    from check_export import check
    from transformers import AutoModelForCausalLM

    found, expected, tokens = check(straight[0])
    assert tokens > 200 and found == pytest.approx(expected, rel=1e-4)
    small, whole = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (straight[0] / "export", tiny_assets / "teacher")
    )
    assert small.config.num_hidden_layers == 3 and small.config.num_key_value_heads == 1
    assert small.num_parameters() < 0.7 * whole.num_parameters()


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_resumes_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path, stop):
    tree = tree_of(tiny_assets, tmp_path / "run")
    assert two_ranks.run(distil_until, tree=tree, step=stop, rank=0) == [None, None]
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight[0]), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", straight[0]))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    states = [max((folder / "checkpoints").glob("step_*")) / "teacher" for folder in (tmp_path / "run", straight[0])]
    mine, theirs = (load_file(state / "self_shared.safetensors") for state in states)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items()) and len(theirs) == 9


def test_one_rank_and_checkpointing_come_to_the_same(straight, tiny_assets, one_rank, tmp_path):
    tree = tree_of(tiny_assets, tmp_path / "run", train__activation_checkpointing=True)
    one_rank.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight[0]), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["prune/neurons_frac"] == theirs["prune/neurons_frac"]


def test_half_precision_trains_and_exports(tiny_assets, two_ranks, tmp_path):
    tree = tree_of(tiny_assets, tmp_path / "run", train__precision="bf16")
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["steps"] == 6 and summary["eval"]["after"]["perplexity"] > 1
    weights = load_file(tmp_path / "run/export/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in weights)


def test_what_the_teacher_cannot_serve_is_refused_before_anything_is_built(tiny_assets, two_ranks, tmp_path):
    tree = tree_of(tiny_assets, tmp_path / "run")
    tree["objective"] = OBJECTIVE | {"signal": {"kind": "top_k", "k": 4}}
    with pytest.raises(AssertionError, match=r"objective\.signal\.kind"):
        two_ranks.run(distil, tree=tree)
    tree = tree_of(tiny_assets, tmp_path / "run")
    tree["teacher"] = TEACHER | {"adapters": {"pattern": "no_such_layer"}}
    with pytest.raises(AssertionError, match=r"teacher\.adapters\.pattern = 'no_such_layer'.*q_proj"):
        two_ranks.run(distil, tree=tree)
