"""The monitor: records, names, ranks, resumes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largekd.config.output import LogConfig
from largekd.monitoring.monitor import Monitor
from largekd.monitoring.names import METRICS, check_name

VALUES = {
    "optim/grad_norm": 1.5,
    "tokens": 640,
    "optim/lr/body": 1e-3,
    "perf/tokens_per_s": 1234.5,
    "loss": 2.0,
    "kd/forward_kl": 1.25,
}


def open_monitor(folder: Path, **changes: object) -> Monitor:
    settings = {
        "config": LogConfig.model_validate({}),
        "folder": folder,
        "resume_step": 0,
        "is_main": True,
        "total_steps": 4,
    }
    return Monitor(**(settings | changes))  # type: ignore[arg-type]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_record_reaches_json_tensorboard_and_console(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="largekd")
    with open_monitor(tmp_path) as monitor:
        monitor.log(step=1, values=VALUES)
        monitor.log(step=4, values=VALUES)
    first, last = records(tmp_path / "metrics.jsonl")
    assert list(first)[:3] == ["step", "loss", "tokens"]
    assert first == {"step": 1, **VALUES} and last["step"] == 4
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["scalars"]) == sorted(VALUES)
    assert accumulator.Scalars("optim/lr/body")[1].value == pytest.approx(1e-3)
    assert "step 1/4  loss 2.0000  tokens/s 1,234" in caplog.text


def test_other_ranks_write_nothing(tmp_path: Path):
    with open_monitor(tmp_path / "run", is_main=False) as monitor:
        monitor.log(step=1, values=VALUES)
        monitor.log_evaluation(step=1, values={"eval/kl": 1.0})
    assert not (tmp_path / "run").exists()


def test_switches_of_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="largekd")
    with open_monitor(tmp_path, config=LogConfig.model_validate({"tensorboard": False, "progress": False})) as monitor:
        monitor.log(step=1, values=VALUES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.jsonl", "metrics.jsonl"]
    assert not caplog.records


def test_resume_continues_records_and_evaluations(tmp_path: Path):
    with open_monitor(tmp_path) as monitor:
        monitor.log_evaluation(step=0, values={"eval/kl": 9.0})
        for step in (1, 2, 3):
            monitor.log(step=step, values=VALUES | {"loss": 1.0})
        monitor.log_evaluation(step=3, values={"eval/kl": 3.0})
    with open_monitor(tmp_path, resume_step=2) as monitor:
        monitor.log(step=3, values=VALUES | {"loss": 5.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 5.0),
    ]
    assert records(tmp_path / "evaluation.jsonl") == [{"step": 0, "eval/kl": 9.0}]
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert [event.step for event in accumulator.Scalars("eval/kl")] == [0]


def test_one_record_per_step_in_order_with_loss_and_tokens(tmp_path: Path):
    with open_monitor(tmp_path, resume_step=1) as monitor:
        monitor.log(step=2, values=VALUES)
        for step in (1, 2):
            with pytest.raises(AssertionError, match=f"step {step} is not after 2"):
                monitor.log(step=step, values=VALUES)
        with pytest.raises(AssertionError, match=r"lacks \['loss', 'tokens'\]"):
            monitor.log(step=3, values={"eval/kl": 1.0})
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [2]


def test_tensors_and_bad_names_are_refused(tmp_path: Path):
    with open_monitor(tmp_path) as monitor:
        with pytest.raises(AssertionError, match="number of the host"):
            monitor.log(step=1, values=VALUES | {"a/b": torch.tensor(1.0)})  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="must be called area/name"):
            monitor.log(step=1, values=VALUES | {"grad_norm": 1.0})
    assert records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("name", ["step", "nonfinite", "/a", "a/", "a//b", "A/b", "a b/c", "", "a/ b"])
def test_names_that_do_not_fit(name: str):
    with pytest.raises(AssertionError):
        check_name(name)


def test_documented_names_fit_and_are_in_the_readme():
    readme = (Path(__file__).parents[2] / "largekd/monitoring/README.md").read_text()
    for name, meaning in METRICS.items():
        check_name(name.replace("<", "").replace(">", ""))
        assert f"| `{name}` | {meaning} |" in readme


def test_steps_to_log(tmp_path: Path):
    config = LogConfig.model_validate({"every_steps": 3, "health_every_steps": 2})
    monitor = open_monitor(tmp_path, config=config, is_main=False, total_steps=7)
    assert [step for step in range(1, 8) if monitor.is_log_step(step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if monitor.is_health_step(step)] == [2, 4, 6]
    never = open_monitor(tmp_path, config=LogConfig.model_validate({"health_every_steps": 0}), is_main=False)
    assert not any(never.is_health_step(step) for step in range(1, 8))


def test_texts_go_to_tensorboard_alone_and_are_cut_on_resume(tmp_path: Path):
    with open_monitor(tmp_path) as monitor:
        for step in (1, 2):
            monitor.log(step=step, values=VALUES)
            monitor.log_texts(step=step, texts={"rollout/sample_0": f"answer {step}"})
    assert "answer" not in (tmp_path / "metrics.jsonl").read_text()
    with open_monitor(tmp_path, resume_step=1) as monitor:
        monitor.log_texts(step=2, texts={"rollout/sample_0": "another answer"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["tensors"]
    found = sorted((event.step, event.tensor_proto.string_val[0]) for event in events.Tensors(tag))
    assert found == [(1, b"answer 1"), (2, b"another answer")]


def test_texts_are_nobodys_without_tensorboard(tmp_path: Path):
    quiet = LogConfig.model_validate({"tensorboard": False})
    with open_monitor(tmp_path, config=quiet) as monitor:
        monitor.log_texts(step=1, texts={"rollout/sample_0": "answer"})
    assert not (tmp_path / "tensorboard").exists()
