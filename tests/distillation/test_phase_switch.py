"""What goes from one phase to the next, what is refused before the first one, and runs of another length."""

import json

import pytest
from placements import offload
from stage_jobs import passed_on
from tiny_run import cache, distil, distil_until, from_cache, metrics, settings
from transformers import LlamaConfig

from largekd.config.load import parse_config
from largekd.config.staging import stages_of
from largekd.distillation.folder import CHECKPOINT_FOLDER, mark_done, open_folder
from largekd.distillation.groups import check_phases
from largekd.distillation.phases import plan_phases
from largekd.errors import ConfigError
from largekd.monitoring.summary import SUMMARY_FILE
from largekd.runtime.ranks import Ranks

QUICK = {"optim__warmup_steps": 0, "eval__before": False, "eval__max_rows": 2, "log__tensorboard": False}
FROZEN = {"name": "mlp", "pattern": r"\.mlp\.", "lr_multiplier": 0}
TINY = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
    tie_word_embeddings=False,
)  # fmt: skip


def test_what_is_gathered_goes_on_within_a_stage(tiny_assets, one_rank, tmp_path):
    tree = settings(
        tiny_assets, tmp_path / "run", train__max_steps=4, freezing={"parts": 2},
        objective__selection={"by": "teacher_entropy", "share": 0.3},
        rollouts={"share": 0.5, "prompt_tokens": 8, "max_new_tokens": 8, "batch_size": 4, "reuse": 3,
                  "max_staleness": 4}, **QUICK,
    )  # fmt: skip
    (answer,) = one_rank.run(passed_on, tree=tree)
    (first, end), (begun, _) = answer["phases"]
    assert begun == end != first
    assert begun["selection"]["expected_share"] == 0.3 and begun["rollouts"]


def test_a_stage_opens_its_cache_once(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=4, **QUICK)
    tree["cache"] = {"path": str(tmp_path / "cache"), "codec": {"kind": "top_k", "k": 64}, "shard_samples": 40}
    tree["objective"]["signal"] = {"kind": "top_k", "k": 64}
    one_rank.run(cache, tree=tree)
    tree = from_cache(tree, freezing={"parts": 2})
    (answer,) = one_rank.run(passed_on, tree=tree)
    assert (len(answer["phases"]), answer["teachers"]) == (2, 1)


def test_a_group_may_be_frozen_whole_for_a_phase(tiny_assets, one_rank, tmp_path):
    groups = [{"name": "low", "pattern": r"layers\.0\.", "lr_multiplier": 0.5}]
    tree = settings(
        tiny_assets, tmp_path / "run", train__max_steps=4, freezing={"parts": 2}, optim__groups=groups, **QUICK
    )
    one_rank.run(distil, tree=tree)
    assert [("optim/lr/low" in record) for record in metrics(tmp_path / "run")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("freezes", "key"),
    [({"optim__groups": [FROZEN]}, r"optim\.groups\.0"), ({"student__lora": {"rank": 2}}, r"student\.lora")],
)
def test_frozen_weights_on_nvme_are_refused_before_anything_is_read(tiny_assets, one_rank, tmp_path, freezes, key):
    placement = tmp_path / "nvme.json"
    placement.write_text(json.dumps(offload("nvme", folder=tmp_path / "swap", optimizer=False)))
    tree = settings(
        tiny_assets, tmp_path / "run", student__deepspeed=str(placement), teacher__model="/nowhere", **QUICK, **freezes
    )
    with pytest.raises(AssertionError, match=rf"{key}: freezes weights of the student, which student\.deepspeed = "):
        one_rank.run(distil, tree=tree)


def test_a_shorter_run_that_is_past_its_end_is_finished(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=6, **QUICK)
    assert one_rank.run(distil_until, tree=tree, step=4, rank=0) == [None]
    tree["train"]["max_steps"] = 3
    (summary,) = one_rank.run(distil, tree=tree)
    assert summary["steps"] == 4 and (tmp_path / "run/export/model.safetensors").is_file()


def test_a_run_in_stages_may_become_longer(tiny_assets, one_rank, tmp_path):
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=None, **QUICK)
    tree["stages"] = [{"name": "one", "steps": 2}, {"name": "two", "steps": 1, "set": {"optim.lr": 2e-3}}]
    one_rank.run(distil, tree=tree)
    tree["stages"][1]["steps"] = 3
    (summary,) = one_rank.run(distil, tree=tree)
    assert summary["steps"] == 5
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def described(tmp_path, **changes):
    return parse_config(settings(tmp_path, tmp_path / "run", **changes))


def phases_of(config, *, steps=8):
    stages = stages_of(config)
    return plan_phases(stages, steps=[steps] * len(stages), depth=TINY.num_hidden_layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__groups": [{"name": "top", "pattern": r"layers\.[23]\.|norm|head|embed", "lr_multiplier": 0}]},
        {"student": {"model": "x", "deepspeed": "x", "lora": {"rank": 2, "pattern": r"layers\.[01]\..*q_proj$"}}},
    ],
)
def test_a_phase_in_which_nothing_learns_is_refused(tmp_path, changes):
    config = described(tmp_path, freezing={"parts": 2}, **changes)
    with pytest.raises(ConfigError, match=r"freezing: nothing of the student would learn in run, phase 2 of 2"):
        check_phases(phases_of(config), model_config=TINY)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__groups": [{"name": "low", "pattern": r"layers\.[01]\."}]},
        {"student": {"model": "x", "deepspeed": "x", "lora": {"rank": 2, "pattern": r"q_proj$"}}},
    ],
)
def test_a_phase_in_which_something_learns_is_not(tmp_path, changes):
    check_phases(phases_of(described(tmp_path, freezing={"parts": 2}, **changes)), model_config=TINY)


def finished(tmp_path, stages, **changes):
    """The folder of a run with these stages that has come to its end."""
    config = described(tmp_path, train__max_steps=None, optim__warmup_steps=0, stages=stages, **changes)
    folder = tmp_path / "run"
    (folder / CHECKPOINT_FOLDER / "step_00000004").mkdir(parents=True)
    open_folder(folder, config=config, ranks=Ranks())
    (folder / SUMMARY_FILE).write_text("{}")
    mark_done(folder, step=4, config=config, ranks=Ranks())
    return folder


STAGES = [{"name": "one", "steps": 2}, {"name": "two", "steps": 2, "set": {"objective": {"alpha": 0.5}}}]


def reopened(tmp_path, stages, **changes):
    config = described(tmp_path, train__max_steps=None, optim__warmup_steps=0, stages=stages, **changes)
    return open_folder(tmp_path / "run", config=config, ranks=Ranks())


def test_only_the_last_stage_may_change_its_length(tmp_path):
    finished(tmp_path, STAGES)
    first, last = STAGES
    assert reopened(tmp_path, STAGES) == {}
    with pytest.raises(ConfigError, match=r"stage one: train\.max_steps: 2 -> 3\n"):
        reopened(tmp_path, [{**first, "steps": 3}, last])
    assert reopened(tmp_path, [first, {**last, "steps": 5}]) is None, "it goes on"


def test_a_stage_may_be_evaluated_differently_and_nothing_else(tmp_path):
    finished(tmp_path, STAGES)
    first, last = STAGES
    changed = {**last, "set": {"objective": {"alpha": 0.7}, "eval": {"every_steps": 1}}}
    with pytest.raises(ConfigError) as caught:
        reopened(tmp_path, [first, changed])
    assert "\n  stage two: objective.alpha: 0.5 -> 0.7\n" in str(caught.value) and "every_steps" not in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"\n  optim\.lr: 0\.001 -> 0\.002\n"):
        reopened(tmp_path, STAGES, optim__lr=2e-3)
    with pytest.raises(ConfigError, match=r"stages: one, two -> one"):
        reopened(tmp_path, STAGES[:1])
    assert reopened(tmp_path, [first, {**last, "set": {**last["set"], "eval": {"every_steps": 1}}}]) == {}
