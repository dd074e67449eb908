"""Runs, and the launcher's work, with a student made by rules that look at the teacher's activations."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from initialisation_jobs import write_student_folder
from pool import RankPool
from safetensors.torch import load_file
from tiny_run import cache, distil, from_cache, settings

from largekd.config.load import parse_config
from largekd.distillation.models import find_sources
from largekd.errors import ConfigError

Tree = Callable[..., dict[str, Any]]
NARROW = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
ONE_STEP = {"train__max_steps": 1, "optim__warmup_steps": 0}


@pytest.fixture
def tree(tiny_assets: Path, tmp_path: Path) -> Tree:
    """A run whose student has another shape than the tiny teacher."""

    def make(name: str = "run", *, shape: dict[str, Any] = NARROW, **changes: Any) -> dict[str, Any]:
        config = json.loads((tiny_assets / "teacher/config.json").read_text())
        path = tmp_path / name / "student.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config | shape))
        made = settings(tiny_assets, tmp_path / name / "run", **changes)
        del made["student"]["teacher_layers"]
        made["student"]["config"] = str(path)
        return made

    return make


@pytest.mark.parametrize("width", ["importance", "pca"])
def test_a_run_and_the_launcher_make_the_same_student(
    two_ranks: RankPool, one_rank: RankPool, tree: Tree, tmp_path: Path, width: str
) -> None:
    rules = {"width": width, "layers": "block_influence", "calibration_rows": 5}
    made = tree(student__initialise=rules, **ONE_STEP)
    summary = two_ranks.run(distil, tree=made)[0]
    report = json.loads(Path(made["run"]["dir"], "initialisation.json").read_text())
    layers = report["plan"]["layers"]
    assert len(layers) == 3
    assert layers[0] == 0
    assert layers == sorted(set(layers))
    written = []
    for name, pool in (("two", two_ranks), ("one", one_rank)):
        pool.run(write_student_folder, tree=made, output=str(tmp_path / name))
        written.append(load_file(tmp_path / name / "model.safetensors"))
    for name, value in written[0].items():
        difference = float((value - written[1][name]).abs().max())
        assert difference <= 1e-4 * float(value.abs().max()), name
    loaded = tree("loaded", **ONE_STEP)
    loaded["student"] = {"model": str(tmp_path / "two"), "deepspeed": made["student"]["deepspeed"]}
    through = two_ranks.run(distil, tree=loaded)[0]
    assert summary is not None
    assert through is not None
    assert through["eval"]["before"]["kl"] == pytest.approx(summary["eval"]["before"]["kl"], rel=1e-4)


def test_a_teacher_of_the_same_shape_is_taken_over_whole(two_ranks: RankPool, tree: Tree) -> None:
    for width, shape in (("importance", {}), ("pca", {"tie_word_embeddings": False})):
        made = tree(width, shape=shape, student__initialise={"width": width, "layers": "block_influence"}, **ONE_STEP)
        summary = two_ranks.run(distil, tree=made)[0]
        assert summary is not None
        assert summary["eval"]["before"]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_cached_teacher_is_loaded_to_be_measured(two_ranks: RankPool, tree: Tree, tmp_path: Path) -> None:
    online = tree(student__initialise={"calibration_rows": 5}, cache={"path": str(tmp_path / "cache")}, **ONE_STEP)
    online["cache"] = {"path": str(tmp_path / "cache"), "codec": {"kind": "top_k", "k": 16}}
    online["objective"]["signal"] = {"kind": "top_k", "k": 16}
    two_ranks.run(cache, tree=online)
    two_ranks.run(distil, tree=online)
    cached = from_cache(online, run__dir=str(tmp_path / "from_cache"))
    del cached["cache"]
    two_ranks.run(distil, tree=cached)
    reports = [
        json.loads(Path(tree["run"]["dir"], "initialisation.json").read_text())["plan"] for tree in (online, cached)
    ]
    for report in reports:
        # What the shapes choose: the student has fewer layers, and fewer of everything in them.
        assert (report["layer_rule"], report["width"]) == ("block_influence", "importance")
    assert reports[0]["layers"] == reports[1]["layers"]
    assert reports[0]["gains"]["width"] == pytest.approx(reports[1]["gains"]["width"], rel=1e-6)


def test_a_tied_student_is_refused_before_anything_is_loaded(tree: Tree) -> None:
    made = tree(shape={**NARROW, "tie_word_embeddings": True}, student__initialise={"width": "pca"})
    config = parse_config(made)
    with pytest.raises(ConfigError, match="set tie_word_embeddings to false"):
        find_sources(config, first=nullcontext)
