"""Whole runs of a student with adapters: taught by its own base or by another model, stopped, resumed, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT, changed, distil, distil_until, metrics, settings

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 8.0}
EXACT = ("loss", "tokens", "optim/grad_norm", "optim/lr/default", "kd/forward_kl", "health/kl_t1")


def with_base(assets, run_dir, **changes):
    """A run of the tiny teacher's adapters, taught by the tiny teacher."""
    tree = settings(assets, run_dir)
    tree["teacher"] = {"kind": "base"}
    tree["student"] = {"model": str(assets / "teacher"), "lora": LORA, "deepspeed": tree["student"]["deepspeed"]}
    return changed(tree, objective__alpha=0.5, export={"adapter": True}, **changes)


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("lora") / "straight"
    summary, _ = two_ranks.run(distil, tree=with_base(tiny_assets, run_dir, train__activation_checkpointing=True))
    return run_dir, summary


def test_the_student_starts_as_its_teacher_and_moves_away(straight):
    run_dir, summary = straight
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert abs(before["kl"]) < 1e-6 and before["perplexity"] == pytest.approx(summary["eval"]["teacher"]["perplexity"])
    assert after["kl"] > 1e-4 and after["perplexity"] < before["perplexity"]
    first, *_, last = metrics(run_dir)
    assert abs(first["kd/forward_kl"]) < 1e-6 < last["kd/forward_kl"]


def test_the_export_is_a_plain_model_and_the_adapter_gives_the_same(straight, tiny_assets):
    from check_export import check
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, expected, _ = check(straight[0])
    assert found == pytest.approx(expected, rel=1e-4)
    teacher, export = tiny_assets / "teacher", straight[0] / "export"
    weights, before = load_file(export / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert weights.keys() == before.keys()
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher), export / "adapter").eval()
        merged = adapted.merge_and_unload()(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(export)(ids).logits, merged, atol=1e-5, rtol=0)


def test_only_adapters_have_optimizer_state(straight):
    groups = {group["group"]: group for group in json.loads((straight[0] / "groups.json").read_text())["0"]}
    assert groups["(frozen)"]["optimizer_bytes"] == 0 and groups["(frozen)"]["share"] > 0.5
    assert "model.layers.0.self_attn.q_proj.weight" in groups["(frozen)"]["parameters"]
    assert all(".lora_" in name for name in groups["default"]["parameters"])


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path, dora):
    changes = {"train__activation_checkpointing": True, "student__lora__dora": dora}
    folder = straight[0]
    if dora:
        folder = tmp_path / "straight"
        two_ranks.run(distil, tree=with_base(tiny_assets, folder, **changes))
    tree = with_base(tiny_assets, tmp_path / "run", **changes)
    assert two_ranks.run(distil_until, tree=tree, step=4, rank=1) == [None, None]
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert {name: mine[name] for name in EXACT} == {name: theirs[name] for name in EXACT}
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        weights, expected = (load_file(run / "export" / file) for run in (tmp_path / "run", folder))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), file


def test_another_model_teaches_adapters_on_some_layers_in_bf16(tiny_assets, two_ranks, tmp_path):
    tree = settings(
        tiny_assets,
        tmp_path / "run",
        student={"teacher_layers": [0, 1], "lora": LORA, "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json")},
        train__precision="bf16",
        optim__lr=2e-3,
        objective__features=[{"name": "hidden", "loss": "cosine", "weight": 0.01, "layers": {"map": "last"}}],
    )
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["eval"]["after"]["kl"] < summary["eval"]["before"]["kl"]


@pytest.mark.parametrize("gather", ["whole", "streamed"])
def test_a_student_with_adapters_writes_its_own_rows(tiny_assets, two_ranks, tmp_path, gather):
    rollouts = {"share": 1.0, "prompt_tokens": 16, "max_new_tokens": 8, "gather": gather}
    tree = with_base(tiny_assets, tmp_path / "run", rollouts=rollouts, train__max_steps=2, optim__warmup_steps=0)
    summary, _ = two_ranks.run(distil, tree=tree)
    assert summary["steps"] == 2 and all("kd/forward_kl" in record for record in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__lora__pattern": "no_such"}, "student.lora.pattern = 'no_such': finds no linear layer"),
        ({"student__lora__rank": 1000}, "student.lora.rank = 1000: model.layers.0.* is .* wide"),
        ({"optim__groups": [{"name": "e", "pattern": "embed"}]}, "'e' claims parameters that are frozen"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(tiny_assets, one_rank, tmp_path, changes, message):
    from shutil import copytree

    broken = copytree(tiny_assets / "teacher", tmp_path / "teacher")
    (broken / "model.safetensors").write_bytes(b"nothing")
    tree = with_base(tiny_assets, tmp_path / "run", **changes)
    tree["student"]["model"] = str(broken)
    with pytest.raises(AssertionError, match=message):
        one_rank.run(distil, tree=tree)
