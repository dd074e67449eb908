from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largekd.config.load import load_config, parse_config
from largekd.config.render import config_differences, config_to_mapping, render_config

Changed = Callable[[str, object], dict[str, Any]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 0),
        ("run.dir", "${train.seed}"),
        ("run.dir", "a\\${b} and \\\\${c}"),
        ("run.dir", "1e-4"),
        ("run.dir", "null"),
        ("run.dir", "on"),
        ("run.dir", "2024-01-01"),
        ("run.dir", "ünïcode: #x"),
        ("optim.eps", 1e-30),
        ("optim.groups", [{"name": "a", "pattern": r"^layers\.\d+\.(q|k)$"}]),
        ("objective.divergences", [{"name": "jsd", "mix": 0.3}, {"name": "reverse_kl"}]),
        ("data.eval", {"path": "x", "max_samples": 3}),
    ],
)
def test_rendered_yaml_loads_to_an_equal_config(tmp_path: Path, with_key: Changed, key: str, value: object) -> None:
    # A mapping has its interpolations resolved already, so this text is meant literally.
    config = parse_config(with_key(key, value))
    path = tmp_path / "config.yaml"
    path.write_text(render_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert parse_config(config_to_mapping(config)) == config


def test_differences_name_key_and_both_values(minimal: dict[str, Any], with_key: Changed) -> None:
    old = parse_config(minimal)
    new = with_key("train.seed", 4)
    new["data"]["eval"] = "e.jsonl"
    new["student"]["teacher_layers"] = [1]
    found = config_differences(old, parse_config(new))
    assert "train.seed: 0 -> 4" in found
    assert "student.teacher_layers: null -> [1]" in found
    assert "data.eval.path: not set -> 'e.jsonl'" in found
    assert all(line.startswith(("train.seed", "student.teacher_layers", "data.eval")) for line in found)


def test_keys_that_may_differ(minimal: dict[str, Any], with_key: Changed) -> None:
    old = parse_config(minimal)
    for key, value in [
        ("run.dir", "elsewhere"),
        ("log.every_steps", 9),
        ("checkpoint.every_steps", 1),
        ("eval.max_rows", 4),
        ("export.dtype", "bf16"),
        ("train.collective_timeout_s", 60),
    ]:
        new = parse_config(with_key(key, value))
        assert config_differences(old, new) == ()
        assert len(config_differences(old, new, may_differ=())) == 1
    # A prefix frees the keys below it, not those that merely begin alike.
    new = parse_config(with_key("train.max_steps", 11))
    assert config_differences(old, new, may_differ=("train.max",)) == ("train.max_steps: 10 -> 11",)
