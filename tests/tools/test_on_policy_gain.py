"""The tool that measures what on-policy training gains: its measure by hand, its rows, and going on."""

import json

import on_policy_gain
import pytest
import torch
from tiny_run import settings

from largekd.config.checks import check_world
from largekd.config.load import load_config, parse_config


@pytest.fixture
def config(tiny_assets, tmp_path):
    rollouts = {"prompt_tokens": 10, "max_new_tokens": 5}
    return parse_config(settings(tiny_assets, tmp_path / "run", rollouts=rollouts))


def test_a_teacher_is_no_distance_from_itself_and_another_model_some(config, tiny_assets, tmp_path):
    from make_tiny_model import Shape, make_model

    assert on_policy_gain.reverse_kl_of_samples(config, student=tiny_assets / "teacher", prompts=3) == pytest.approx(0)
    make_model(tmp_path / "other", shape=Shape(), seed=4)
    found = on_policy_gain.reverse_kl_of_samples(config, student=tmp_path / "other", prompts=3)
    assert found > 1e-3
    torch.manual_seed(99)
    assert on_policy_gain.reverse_kl_of_samples(config, student=tmp_path / "other", prompts=3) == found


def test_rows_are_written_once_and_other_settings_are_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_policy_gain, "RUNS", tmp_path)
    launched = []

    def launch(recipe, ranks, log):
        launched.append(ranks)
        return 0

    monkeypatch.setattr(on_policy_gain, "launch", launch)
    monkeypatch.setattr(on_policy_gain, "is_finished", lambda run: bool(launched))
    monkeypatch.setattr(
        on_policy_gain,
        "reverse_kl_of_samples",
        lambda config, *, student, prompts: 0.5 if "export" in str(student) else 2.0,
    )
    command = ["--student", "some/model", "--seeds", "3"]
    assert on_policy_gain.main(command) == 0 and launched == [1]
    (row,) = [json.loads(line) for line in (tmp_path / "default/rows.jsonl").read_text().splitlines()]
    assert (row["seed"], row["before"], row["after"], row["ratio"]) == (3, 2.0, 0.5, 0.25)
    assert "| 3 | 2.0000 | 0.5000 | 0.250 |" in capsys.readouterr().out
    assert on_policy_gain.main(command) == 0 and launched == [1]
    assert on_policy_gain.main([*command, "optim.lr=1e-5"]) == 2
    assert "choose another --name" in capsys.readouterr().err


def test_a_run_that_does_not_finish_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy_gain, "RUNS", tmp_path)
    monkeypatch.setattr(on_policy_gain, "launch", lambda recipe, ranks, log: 1)
    assert on_policy_gain.main(["--student", "some/model", "--seeds", "0"]) == 1


def test_ranks_share_the_rows_of_a_step_and_one_rank_takes_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_policy_gain, "RUNS", tmp_path)
    micro_batches = {}

    def launch(recipe, ranks, log):
        config = load_config(recipe)
        assert check_world(config, world_size=ranks) == 1
        micro_batches[ranks] = config.train.micro_batch_size
        return 1

    monkeypatch.setattr(on_policy_gain, "launch", launch)
    for ranks in (1, 2, 4):
        command = ["--student", "some/model", "--seeds", "0", "--ranks", str(ranks), "--name", str(ranks)]
        assert on_policy_gain.main(command) == 1
    assert micro_batches == {1: 8, 2: 4, 4: 2}
    for wrong, message in ((3, "train.global_batch_size = 8"), (0, "--ranks 0")):
        assert on_policy_gain.main(["--student", "some/model", "--ranks", str(wrong)]) == 2
        assert message in capsys.readouterr().err
    assert set(micro_batches) == {1, 2, 4}
