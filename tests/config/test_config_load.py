from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largekd.config.load import load_config, parse_config
from largekd.config.output import RunFolderConfig
from largekd.errors import ConfigError

YAML = """
run: {dir: runs/x}
teacher: {model: t, deepspeed: a.json}
student: {model: s, deepspeed: b.json}
data: {train: train.jsonl}
train: {max_steps: 10, global_batch_size: 8, micro_batch_size: 2, sequence_length: 16, seed: 3}
optim: {lr: 1e-4, groups: [{name: a, pattern: 'x'}, {name: b, pattern: '^h\\.(0|1)\\.'}]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML, encoding="utf-8")
    return path


Changed = Callable[[str, object], dict[str, Any]]


def message(mapping: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(mapping)
    return str(caught.value)


def test_values_arrive(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.train.max_steps == 10
    assert config.optim.lr == 1e-4
    assert config.data.train.path == "train.jsonl"
    assert config.data.eval is None
    assert config.optim.groups[1].pattern == r"^h\.(0|1)\."


def test_overrides_are_yaml_and_apply_in_order(recipe: Path) -> None:
    config = load_config(
        recipe,
        overrides=[
            "train.max_steps=7",
            "train.max_steps=null",
            "train.max_epochs=2",
            "student.model=null",
            "student.teacher_layers=[0, 2]",
            "optim.lr=3e-5",
            "optim.groups.1.lr_multiplier=0.5",
            "data.train=*.jsonl",
            "run.dir='007'",
            "objective.divergences=[{name: jsd, mix: 0.1}]",
        ],
    )
    assert (config.train.max_steps, config.train.max_epochs) == (None, 2)
    assert config.student.teacher_layers == (0, 2)
    assert config.optim.lr == 3e-5
    assert config.optim.groups[0].lr_multiplier == 1.0
    assert config.optim.groups[1].lr_multiplier == 0.5
    assert config.data.train.path == "*.jsonl"
    assert config.run.dir == "007"
    assert [(term.name, term.mix) for term in config.objective.divergences] == [("jsd", 0.1)]


def test_a_path_replaces_a_whole_source_and_a_key_extends_a_path(recipe: Path) -> None:
    config = load_config(
        recipe, overrides=["data.train.max_samples=5", "data.eval={path: e.jsonl, max_samples: 3}", "data.eval=f.jsonl"]
    )
    assert (config.data.train.path, config.data.train.max_samples) == ("train.jsonl", 5)
    assert (config.data.eval.path, config.data.eval.max_samples) == ("f.jsonl", None)


def test_interpolations_see_overrides(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_DIR", "/scratch")
    config = load_config(recipe, overrides=["run.dir=${oc.env:SCRATCH_DIR}/${train.seed}", "train.seed=9"])
    assert config.run.dir == "/scratch/9"
    with pytest.raises(ConfigError, match=r"run\.dir: .*nothing_here"):
        load_config(recipe, overrides=["run.dir=${nothing_here}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps", "must be key=value"),
        ("=3", "must be key=value"),
        ("train..seed=3", "must be key=value"),
        ("train.seed=[1", "not valid YAML"),
        ("train.seed.x=1", "train.seed is 3, which has no keys below it"),
        ("optim.groups.2.name=c", "not an index of a list with 2 entries"),
        ("optim.groups.b.name=c", "not an index of a list with 2 entries"),
        ("train.max_stepz=3", r"train\.max_stepz: unknown key; did you mean train\.max_steps\?"),
        ("train.x.y=3", r"train\.x: unknown key"),
    ],
)
def test_bad_overrides(recipe: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(recipe, overrides=[override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run:\n  dir: [a\nteacher: {}\n", r"recipe\.yaml, line 3, column 8: not valid YAML"),
        ("run: {dir: a}\nrun: {dir: b}\n", r"recipe\.yaml, line 2, column 1: not valid YAML \(found duplicate key run"),
        ("- a\n- b\n", "a mapping of keys, not a list"),
        ("just text\n", "recipe.yaml"),
        ("\x00", "recipe.yaml"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_absent_folder_and_foreign_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.seed", "3", "train.seed = '3': must be a whole number"),
        ("train.seed", 1.5, "train.seed = 1.5: must be a whole number"),
        ("train.micro_batch_size", True, "train.micro_batch_size = true: must be a whole number"),
        ("train.micro_batch_size", 0, "train.micro_batch_size = 0: must be at least 1"),
        ("train.precision", "fp8", "train.precision = 'fp8': must be one of 'fp32' or 'bf16'"),
        ("train", 3, "train = 3: must be a mapping of keys"),
        ("optim.lr", float("nan"), "optim.lr = nan: must be a finite number"),
        ("optim.betas", [0.9], "optim.betas.1: required, but not set"),
        ("run.dir", 7, "run.dir = 7: must be text; put quotes around it"),
        ("run.dir", None, "run.dir = null: must be text"),
        ("data.train", 5, "data.train = 5: must be a path or a mapping of keys"),
        ("data.train", {"split": "x"}, "data.train.path: required, but not set (File, folder or glob"),
        ("objective.divergences", [{"name": "kl"}], "objective.divergences.0.name = 'kl': must be one of 'forward_kl'"),
        ("objective.divergences", [{"weight": 1}], "objective.divergences.0.name: required, but not set"),
        (
            "objective.divergences",
            [{"name": "jsd", "mix": 2}],
            "objective.divergences.0.mix = 2: must be less than 1",
        ),
        (
            "objective.divergences",
            [{"name": "jsd", "mixx": 0.2}],
            "objective.divergences.0.mixx: unknown key; did you mean objective.divergences.0.mix?",
        ),
        ("seed", 1, "seed: unknown key; did you mean train.seed?"),
        ("zebra", 1, "zebra: unknown key"),
        ("optim.groups", [{"name": "a b", "pattern": "x"}], "optim.groups.0.name = 'a b': must match the regular"),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_rule(
    with_key: Changed, key: str, value: object, expected: str
) -> None:
    text = message(with_key(key, value))
    assert expected in text
    assert "\n" not in text
    assert "pydantic" not in text


def test_all_problems_are_told_at_once(with_key: Changed) -> None:
    tree = with_key("train.seed", "x")
    del tree["run"]["dir"]
    tree["optim"] = {"lrr": 1}
    lines = message(tree).splitlines()
    assert lines[0] == "configuration: 3 problems"
    assert [line.split()[0] for line in lines[1:]] == ["run.dir:", "train.seed", "optim.lrr:"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.max_steps", None, "train.max_steps: set it or train.max_epochs"),
        ("student.model", None, "student.model: set it, or student.config, student.teacher_layers or student.design"),
        ("student.teacher_layers", [], "name at least one layer"),
        ("student.teacher_layers", [0, -1], "-1 is not a layer"),
        ("objective.divergences", [], "objective.alpha = 0.5 needs one with a positive weight"),
        ("objective.divergences", [{"name": "jsd", "weight": 0}], "needs one with a positive weight"),
        (
            "objective.divergences",
            [{"name": "jsd", "mix": 0.1}, {"name": "jsd"}],
            "jsd appears 2 times",
        ),
        ("optim.warmup_steps", 10, "optim.warmup_steps = 10: must be less than train.max_steps = 10"),
        ("optim.betas", [0.9, 1.0], "optim.betas.1 = 1.0: must be at least 0 and less than 1"),
        ("optim.groups", [{"name": "a", "pattern": "("}], "optim.groups.0.pattern = '(': not a regular expression"),
        (
            "optim.groups",
            [{"name": "a", "pattern": "x"}, {"name": "a", "pattern": "y"}],
            "the name 'a' is used 2 times",
        ),
        ("eval.every_steps", 5, "there is nothing to evaluate on; set data.eval"),
    ],
)
def test_rules_over_several_keys(with_key: Changed, key: str, value: object, expected: str) -> None:
    assert expected in message(with_key(key, value))


def test_rules_let_good_configurations_pass(minimal: dict[str, Any], with_key: Changed) -> None:
    parse_config(minimal)
    parse_config(with_key("optim.warmup_steps", 9))
    without_kd = with_key("objective.divergences", [])
    without_kd["objective"]["alpha"] = 0
    assert parse_config(without_kd).objective.divergences == ()
    both = with_key("student.teacher_layers", [0])
    assert parse_config(both).student.model == "s"


def test_python_values_that_are_not_yaml(with_key: Changed) -> None:
    tree = with_key("run", RunFolderConfig(dir="a"))
    tree["data"]["train"] = Path("b.jsonl")
    config = parse_config(tree)
    assert (config.run.dir, config.data.train.path) == ("a", "b.jsonl")
    assert "is a set; numbers, text, lists and mappings are expected" in message(with_key("run.dir", {1}))
