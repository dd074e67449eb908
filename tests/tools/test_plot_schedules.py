"""The tool shows the values that the run will use; its table needs neither torch nor matplotlib."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import plot_schedules
import pytest

from largekd.config.load import load_config
from largekd.config.run import RunConfig

RECIPE = """
run: {dir: runs/x}
teacher: {model: t, deepspeed: a.json}
student: {model: s, deepspeed: b.json}
data: {train: train.jsonl}
train: {max_steps: 5, global_batch_size: 8, micro_batch_size: 2, sequence_length: 16}
optim: {lr: 1.0e-3, schedule: linear, min_lr_frac: 0.0}
plugins: [mine.py]
objective:
  alpha: {start: 0, end: 1}
  temperature: {start: 4, end: 1, shape: exponential}
  divergences: [{name: jsd, weight: 0.5}, {name: plugin, term: own, weight: {start: 0, end: 2}}]
  features: [{weight: {start: 3, end: 1}}]
  attention: [{name: maps, weight: 0.25}]
"""
STEPS = range(5)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def config(recipe: Path) -> RunConfig:
    return load_config(recipe)


def test_columns_are_the_factors_of_the_loss(config: RunConfig) -> None:
    found = plot_schedules.columns(config, steps=STEPS, max_steps=5)
    degrees = [4 ** (1 - step / 4) for step in STEPS]
    expected = {
        "temperature": degrees,
        "alpha": [0, 0.25, 0.5, 0.75, 1],
        "1-alpha": [1, 0.75, 0.5, 0.25, 0],
        "weight/jsd": [0.5] * 5,
        "factor/jsd": [step / 4 * degree**2 * 0.5 for step, degree in enumerate(degrees)],
        "weight/own": [0, 0.5, 1, 1.5, 2],
        "factor/own": [step / 4 * degree**2 * step / 2 for step, degree in enumerate(degrees)],
        "weight/hidden": [3, 2.5, 2, 1.5, 1],
        "weight/maps": [0.25] * 5,
        "learning rate": [1e-3 * (1 - step / 4) for step in STEPS],
    }
    assert list(found) == list(expected)
    for name, column in expected.items():
        assert found[name] == pytest.approx(column), name


def test_the_table_counts_steps_from_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_schedules.main([str(recipe), "--table", "objective.attention=[]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("step", "temperature", "alpha", "1-alpha", "weight/jsd", "factor/jsd", "weight/own", "factor/own"),
        *("weight/hidden", "learning", "rate"),
    ]
    assert lines[3].split() == ["3", "2", "0.5", "0.5", "0.5", "1", "1", "2", "2", "0.0005"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("max_steps", [1, 2, 20, 21, 22, 100_000])
def test_chosen_steps_hold_both_ends_and_are_spread_evenly(max_steps: int) -> None:
    steps = plot_schedules.some_steps(max_steps, at_most=21)
    assert (steps[0], steps[-1]) == (0, max_steps - 1)
    assert len(steps) == min(max_steps, 21)
    gaps = {after - before for before, after in itertools.pairwise(steps)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_run_without_a_length_needs_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_ended = [str(recipe), "train.max_steps=null", "train.max_epochs=1", "--table"]
    assert plot_schedules.main(open_ended) == 2
    assert "train.max_steps is not set" in capsys.readouterr().err
    assert plot_schedules.main([*open_ended, "--steps", "0"]) == 2
    assert "--steps 0: must be at least 1" in capsys.readouterr().err
    assert plot_schedules.main([*open_ended, "--steps", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_wrong_recipe_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_schedules.main([str(recipe), "objective.alpha=2", "--table"]) == 2
    assert "objective.alpha = 2.0: must be at least 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize("max_steps", ["1", "5", "4000"])
def test_the_picture_has_a_panel_per_column(recipe: Path, tmp_path: Path, max_steps: str) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "new" / "picture.png"
    assert plot_schedules.main([str(recipe), "--steps", max_steps, "--out", str(target)]) == 0
    image = target.read_bytes()
    assert image.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width / height == pytest.approx((4 * 3.2) / (3 * 2.2), rel=0.01), "ten panels: four across, three down"


def test_a_picture_that_cannot_be_written_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plot_schedules.main([str(recipe), "--out", str(recipe / "x.png")]) == 2
    assert "x.png: cannot be written" in capsys.readouterr().err


def test_without_matplotlib_the_message_says_how_to_get_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec: Callable[[str], object] = plot_schedules.importlib.util.find_spec
    monkeypatch.setattr(
        plot_schedules.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    assert plot_schedules.main([str(recipe)]) == 2
    assert "pip install -c constraints.txt '.[plots]'" in capsys.readouterr().err
    assert plot_schedules.main([str(recipe), "--table"]) == 0


def test_neither_torch_nor_matplotlib_is_imported_for_a_table(recipe: Path, repository: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(repository / 'tools')!r}, {str(repository)!r}]\n"
        f"import plot_schedules; assert plot_schedules.main([{str(recipe)!r}, '--table']) == 0\n"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_stage_has_its_own_table(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "[{name: one, steps: 2}, {name: two, steps: 3, set: {objective.alpha: 0.25}}]"
    given = [str(recipe), "train.max_steps=null", f"stages={stages}", "--table"]
    lengths = []
    for more in ([], ["--stage", "two"]):
        assert plot_schedules.main([*given, *more]) == 0
        lengths.append(len(capsys.readouterr().out.splitlines()))
    assert lengths[1] == lengths[0] + 1
    assert plot_schedules.main([*given, "--stage", "three"]) == 2
    assert "--stage 'three': the stages of this run are 'one', 'two'" in capsys.readouterr().err
