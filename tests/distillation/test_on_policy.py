"""Whole tiny runs with rollouts: what they log, that they repeat themselves, and what is refused."""

import json

import pytest
import torch
from rollout_jobs import distil_given_up
from safetensors.torch import load_file
from tiny_run import distil, distil_until, metrics, settings

from largekd.config.load import parse_config
from largekd.errors import ConfigError

ROLLOUTS = {"share": 0.5, "prompt_tokens": 12, "max_new_tokens": 8, "reuse": 2, "batch_size": 4}
REVERSE = {"alpha": 0.7, "divergences": [{"name": "reverse_kl"}]}
POLICY = {**ROLLOUTS, "samples_per_prompt": 2, "policy_gradient": {"weight": 0.1}}
EXACT = ("loss", "tokens", "optim/grad_norm", "rollout/length", "rollout/staleness", "rollout/rows")


def _settings(assets, folder, *, rollouts=ROLLOUTS, **changes):
    return settings(assets, folder, **{"objective": REVERSE, "rollouts": rollouts, "eval__before": False, **changes})


def _mixture(weighting):
    members = [{"name": name, "teacher": {"model": name, "deepspeed": "d.json"}} for name in ("a", "b")]
    return {"kind": "mixture", "members": members, "weighting": {"kind": weighting}}


def _weights(folder):
    return load_file(folder / "export/model.safetensors")


@pytest.fixture(scope="module")
def straight(tiny_assets, two_ranks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    two_ranks.run(distil, tree=_settings(tiny_assets, run_dir, rollouts={**POLICY, "log_samples": 2}))
    return run_dir


def test_a_run_logs_its_rollouts(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = metrics(straight)
    assert len(records) == 6 and any(record["rollout/rows"] > 0 for record in records)
    used = [record for record in records if record["rollout/rows"]]
    assert all(1 <= record["rollout/length"] <= 8 and record["rollout/reward"] != 0 for record in used)
    assert any(record["rollout/staleness"] > 0 for record in used) and any("rollout/tokens_per_s" in r for r in used)
    assert all(record["kd/policy_gradient"] is not None for record in used)
    assert max(record["rollout/generate_s"] for record in used) > 0
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    texts = [event for tag in events.Tags()["tensors"] if "sample_" in tag for event in events.Tensors(tag)]
    assert texts and all(b"**answer**" in event.tensor_proto.string_val[0] for event in texts)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path, stop):
    tree = _settings(tiny_assets, tmp_path / "run", rollouts={**POLICY, "log_samples": 2})
    assert two_ranks.run(distil_until, tree=tree, step=stop, rank=1) == [None, None]
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert {name: mine.get(name) for name in EXACT} == {name: theirs.get(name) for name in EXACT}
    weights, expected = _weights(tmp_path / "run"), _weights(straight)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_step_that_waited_in_vain_is_made_again_bit_for_bit(straight, tiny_assets, two_ranks, tmp_path):
    # Step 3 uses rollouts of step 2 again: they must not count as used.
    tree = _settings(tiny_assets, tmp_path / "run", rollouts={**POLICY, "log_samples": 2})
    assert two_ranks.run(distil_given_up, tree=tree, step=3) == [None, None]
    two_ranks.run(distil, tree=tree)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert {name: mine.get(name) for name in EXACT} == {name: theirs.get(name) for name in EXACT}
    weights, expected = _weights(tmp_path / "run"), _weights(straight)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("gather", ["whole", "streamed"])
@pytest.mark.parametrize("packing", [True, False])
def test_one_rank_and_two_run_alike(tiny_assets, one_rank, two_ranks, tmp_path, gather, packing):
    rollouts = {**POLICY, "share": 1.0, "gather": gather}
    changes = {"rollouts": rollouts, "data__packing": packing, "train__max_steps": 3, "log__tensorboard": False}
    for name, pool in (("one", one_rank), ("two", two_ranks)):
        pool.run(distil, tree=_settings(tiny_assets, tmp_path / name, **changes))
    records = [metrics(tmp_path / name) for name in ("one", "two")]
    for mine, theirs in zip(*records, strict=True):
        assert mine["tokens"] == theirs["tokens"] and mine["rollout/rows"] == 8.0
        for name in ("loss", "kd/policy_gradient", "kd/reverse_kl", "rollout/reward", "rollout/length"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
    # Before weights drift apart by rounding, the two differ by rounding alone.
    for name in ("loss", "optim/grad_norm", "rollout/reward"):
        assert records[0][0][name] == pytest.approx(records[1][0][name], rel=1e-5), name


@pytest.mark.parametrize("packing", [True, False])
def test_the_size_of_micro_batches_changes_nothing(tiny_assets, one_rank, tmp_path, packing):
    changes = {"rollouts": POLICY, "data__packing": packing, "train__max_steps": 2, "log__tensorboard": False}
    for size in (1, 8):
        tree = _settings(tiny_assets, tmp_path / str(size), **changes, train__micro_batch_size=size)
        one_rank.run(distil, tree={**tree, "optim": {"lr": 1e-3}})
    one, eight = (metrics(tmp_path / str(size)) for size in (1, 8))
    assert 0 < one[0]["rollout/rows"] < 8
    for name in ("loss", "kd/policy_gradient", "kd/cross_entropy", "optim/grad_norm"):
        assert one[0][name] == pytest.approx(eight[0][name], rel=1e-5, abs=1e-7), name


def test_without_a_share_the_run_is_the_same_bit_for_bit(tiny_assets, one_rank, tmp_path):
    for name, rollouts in (("without", None), ("none", {**ROLLOUTS, "share": 0.0})):
        one_rank.run(distil, tree=_settings(tiny_assets, tmp_path / name, rollouts=rollouts, train__max_steps=3))
    without, none = (metrics(tmp_path / name) for name in ("without", "none"))
    assert [record["loss"] for record in without] == [record["loss"] for record in none]
    assert not any(name.startswith("rollout/") for record in none for name in record)
    weights, expected = _weights(tmp_path / "none"), _weights(tmp_path / "without")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_own_samples_carry_no_cross_entropy_and_the_teachers_do(tiny_assets, one_rank, tmp_path):
    records = {}
    for source in ("student", "teacher"):
        tree = _settings(
            tiny_assets,
            tmp_path / source,
            rollouts={**ROLLOUTS, "share": 1.0, "source": source},
            train__max_steps=1,
            optim__warmup_steps=0,
        )
        one_rank.run(distil, tree=tree)
        (records[source],) = metrics(tmp_path / source)
    assert records["student"]["kd_weighted/cross_entropy"] is None
    assert records["student"]["loss"] == pytest.approx(records["student"]["kd_weighted/reverse_kl"])
    assert records["teacher"]["kd/cross_entropy"] > 0 and records["teacher"]["tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"kind": "cached", "path": "cache"}}, "cached teacher"),
        ({"teacher": _mixture("learned")}, r"teacher\.weighting\.kind = 'learned'"),
        ({"teacher": _mixture("routed")}, r"teacher\.weighting\.kind = 'routed'"),
        ({"rollouts": {**ROLLOUTS, "prompt_tokens": 60}}, r"rollouts\.max_new_tokens = 8"),
        ({"rollouts": {**POLICY, "samples_per_prompt": 1}}, r"rollouts\.samples_per_prompt"),
        ({"rollouts": {**POLICY, "source": "teacher"}}, r"rollouts\.source must be 'student'"),
        ({"rollouts": {**POLICY, "temperature": 0.0}}, r"rollouts\.temperature = 0"),
        ({"objective": {"alpha": 0.0}}, r"objective\.alpha = 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(tmp_path, changes, message):
    tree = settings(tmp_path, tmp_path / "run", **{"rollouts": ROLLOUTS, **changes})
    with pytest.raises(ConfigError, match=message):
        parse_config(json.loads(json.dumps(tree)))


def test_a_share_of_zero_leaves_any_teacher_alone(tmp_path):
    cached = {"kind": "cached", "path": "cache"}
    tree = settings(tmp_path, tmp_path / "run", teacher=cached, student={"model": "m", "deepspeed": "d.json"})
    assert parse_config({**tree, "rollouts": {**ROLLOUTS, "share": 0.0}}).rollouts.share == 0.0
