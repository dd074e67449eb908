"""Runs in stages: schedules, frozen weights, what is left of an old engine, and resuming anywhere."""

import json
import shutil
from itertools import pairwise

import pytest
from safetensors.torch import load_file
from stage_jobs import STEPS, observed, staged
from tiny_run import distil, metrics, settings

from largekd.config.load import parse_config
from largekd.config.staging import stages_of
from largekd.optim.schedule import learning_rate


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    """The run that nobody stops: its folder, and what each rank saw in each of the four phases."""
    run_dir = tmp_path_factory.mktemp("stages") / "run"
    return run_dir, two_ranks.run(observed, tree=staged(tiny_assets, run_dir))


def test_every_groups_rate_is_the_closed_form_of_its_stage(straight, tiny_assets):
    stages = stages_of(parse_config(staged(tiny_assets, straight[0])))
    records = iter(metrics(straight[0]))
    for stage, steps in zip(stages, STEPS, strict=True):
        optim = stage.config.optim
        multipliers = {"default": 1.0} | {group.name: group.lr_multiplier for group in optim.groups}
        for step in range(steps):
            record = next(records)
            rate = learning_rate(step=step, max_steps=steps, config=optim)
            seen = {n.removeprefix("optim/lr/"): v for n, v in record.items() if n.startswith("optim/lr/")}
            assert seen, record
            for group, value in seen.items():
                assert value == rate * multipliers[group.partition(".")[0]], (record["step"], group)
            assert record["stage/index"] == stage.index
            assert ("optim/lr/attention" in record) == (stage.index == 1)
            assert "optim/lr/embeddings" not in record
    assert next(records, None) is None


def test_stages_have_their_own_objective_rows_and_folder(straight):
    run_dir, (answer, _) = straight
    assert answer["summary"]["steps"] == sum(STEPS)
    records = metrics(run_dir)
    assert [("align/hidden" in record) for record in records] == [step < STEPS[0] for step in range(sum(STEPS))]
    tokens = [after["tokens"] - before["tokens"] for before, after in pairwise(records)]
    assert min(tokens[STEPS[0] + STEPS[1] :]) > max(tokens[: STEPS[0]]), "longer rows hold more"
    steps = [json.loads(line)["step"] for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]
    assert steps == [0, STEPS[0], STEPS[0] + STEPS[1], sum(STEPS)]
    names = ["00_hidden", "01_logits", "02_long"]
    assert sorted(path.name for path in (run_dir / "stages").iterdir()) == names
    assert (run_dir / "stages/00_hidden/layer_pairs.json").is_file()
    assert [json.loads((run_dir / f"stages/{name}/deepspeed.json").read_text())["student"]["optimizer"]["params"]["lr"]
            for name in names] == [1e-3, 1e-3, 5e-4]  # fmt: skip


def test_a_frozen_weight_stays_to_the_bit_and_the_others_move(straight):
    for answer in straight[1]:
        first, logits, whole, half = answer["phases"]
        everything = set(first["moved"])
        assert "model.embed_tokens.weight" in everything
        assert everything - set(logits["moved"]) == {"model.embed_tokens.weight"}
        assert set(whole["moved"]) == everything
        assert {name for name in everything if name.startswith("model.layers.0.")} == everything - set(half["moved"])


def test_frozen_layers_have_no_optimizer_state_and_no_backward(straight):
    for answer in straight[1]:
        _, _, whole, half = answer["phases"]
        assert min(whole["backward"]) > 0
        assert half["backward"][0] == 0 < half["backward"][1], "the tied look-up ends the backward pass"
    states = [sum(answer["phases"][phase]["state"] for answer in straight[1]) for phase in (2, 3)]
    weights = load_file(straight[0] / "export/model.safetensors")
    frozen = sum(w.numel() for name, w in weights.items() if name.startswith("model.layers.0."))
    total = sum(w.numel() for w in weights.values())
    assert states[0] == pytest.approx(2 * total, rel=0.01)
    assert states[0] - states[1] == pytest.approx(2 * frozen, rel=0.01)


def test_nothing_is_left_of_an_engine_that_was_replaced(straight):
    for answer in straight[1]:
        phases = answer["phases"]
        assert [phase["alive"] for phase in phases] == [[1, 1, 0]] * 4
        # The look-up of the last phase has one hook more: the tied embedding's, which ends the backward pass.
        assert phases[0]["hooks"] == phases[1]["hooks"] == phases[2]["hooks"] == phases[3]["hooks"] - 1
        assert len({phase["teacher"] for phase in phases}) == 1, "the same teacher is not loaded again"


@pytest.mark.parametrize(
    ("order", "mode"), [("top_down", "freeze"), ("bottom_up", "unfreeze"), ("top_down", "unfreeze")]
)
def test_blocks_freeze_and_thaw_in_either_order(tiny_assets, two_ranks, tmp_path, order, mode):
    tree = settings(
        tiny_assets, tmp_path / "run", freezing={"order": order, "mode": mode, "parts": 2, "at": [0.25]},
        train__max_steps=8,
    )  # fmt: skip
    answer, _ = two_ranks.run(observed, tree=tree)
    layers = [{int(n.split(".")[2]) for n in phase["moved"] if ".layers." in n} for phase in answer["phases"]]
    first = 0 if order == "bottom_up" else 1
    assert layers == ([{0, 1}, {1 - first}] if mode == "freeze" else [{first}, {0, 1}])
    assert all("model.norm.weight" in phase["moved"] for phase in answer["phases"])
    rates = [record["optim/lr/default"] for record in metrics(tmp_path / "run")]
    optim = parse_config(tree).optim
    assert rates == [learning_rate(step=step, max_steps=8, config=optim) for step in range(8)]
    assert [record["stage/phase"] for record in metrics(tmp_path / "run")] == [0.0] * 2 + [1.0] * 6


def test_an_average_goes_on_through_the_stages(tiny_assets, two_ranks, tmp_path):
    student = str(tiny_assets / "teacher")
    tree = settings(tiny_assets, tmp_path / "run", train__max_steps=None, optim__warmup_steps=0, student__model=student)
    placement = tree["teacher"]["deepspeed"]
    tree["student"].pop("teacher_layers")
    tree |= {
        "teacher": {"kind": "ema", "decay": 0.9, "warmup": True, "deepspeed": placement},
        "stages": [{"name": "one", "steps": 3}, {"name": "two", "steps": 3, "set": {"optim.lr": 2e-3}}],
    }
    two_ranks.run(distil, tree=tree)
    decays = [record["teacher/decay"] for record in metrics(tmp_path / "run")]
    assert decays == sorted(decays) and len(set(decays)) == 6, "its warm-up does not begin anew"


def test_a_teacher_that_was_replaced_is_freed(tiny_assets, two_ranks, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_assets / "teacher", other)
    student = str(tiny_assets / "teacher")
    tree = settings(
        tiny_assets, tmp_path / "run", train__max_steps=None, optim__warmup_steps=0, student__model=student,
        eval__before=False,
    )  # fmt: skip
    tree["student"].pop("teacher_layers")
    tree["stages"] = [
        {"name": "one", "steps": 1},
        {"name": "two", "steps": 1, "set": {"teacher.model": str(other)}},
        {"name": "three", "steps": 1},
    ]
    for answer in two_ranks.run(observed, tree=tree):
        assert [phase["decoders"] for phase in answer["phases"]] == [1, 1, 1]
