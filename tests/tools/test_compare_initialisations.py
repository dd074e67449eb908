"""Every method is a run of the quick start with another student, and the table tells which beat random weights."""

import json
from pathlib import Path

import ablation
import compare_initialisations as tool
import pytest

from largekd.errors import ConfigError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "tie_word_embeddings": True,
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ablation.Run]:
    """All runs of seed 1, planned for a teacher's configuration as the quick start's is."""
    monkeypatch.setattr(tool, "TEACHER", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    variants = tool.variants("depth,width", methods=None, folder=tmp_path / "work")
    return ablation.plan(
        tmp_path / "work", base=tool.BASE, variants=variants, seeds=[1], ranks=1, overrides=tool.SETTINGS
    )


def test_runs_differ_in_the_student_alone(runs: list[ablation.Run]) -> None:
    assert len(runs) == len({run.variant for run in runs}) == sum(map(len, tool.METHODS.values()))
    first = runs[0].config()
    for run in runs:
        config = run.config()
        assert (config.train, config.data, config.optim, config.objective, config.eval) == (
            *(first.train, first.data, first.optim, first.objective, first.eval),
        )
        assert (config.train.max_steps, config.train.global_batch_size, config.train.sequence_length) == (30, 4, 128)
        assert config.eval.before
        shape, method = run.variant.split("-", 1)
        rule = tool.METHODS[shape][method]
        assert (config.student.initialise is None) == (rule is None)
        if rule is not None:
            assert config.student.initialise.model_dump() == config.student.initialise.model_dump() | rule
        student = json.loads(Path(config.student.config).read_text())
        assert student == CONFIG | {"head_dim": 64, **tool.SHAPES[shape]} | {
            "tie_word_embeddings": method not in tool.UNTIED
        }


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shapes: there is no 'height'"):
        tool.variants("height", methods=None, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"--methods: there is no 'pca'"):
        tool.variants("depth", methods="random,pca", folder=tmp_path)


def row(variant: str, *, seed: int, before: float, after: float) -> dict[str, object]:
    return {
        "variant": variant, "seed": seed, "kl_before": before, "kl": after, "perplexity": 10.0, "top1_agreement": 0.5,
    }  # fmt: skip


def test_a_method_is_compared_with_random_seed_by_seed() -> None:
    rows = [
        row("depth-random", seed=0, before=9.0, after=6.0),
        row("depth-random", seed=1, before=9.5, after=5.0),
        row("depth-uniform", seed=0, before=12.0, after=5.5),
        row("depth-uniform", seed=1, before=12.0, after=5.1),
        row("depth-first", seed=0, before=11.0, after=5.9),
        row("width-truncate", seed=0, before=8.0, after=4.0),
    ]
    found = {(entry["shape"], entry["method"]): entry for entry in tool.means(rows)}
    assert found["depth", "uniform"]["kl"] == pytest.approx(5.3)
    assert found["depth", "uniform"]["kl_deviation"] == pytest.approx(0.2 * 2**0.5)
    assert found["depth", "uniform"]["beats_random"] is False
    assert found["depth", "first"]["beats_random"] is True and found["depth", "first"]["pairs"] == 1
    assert found["width", "truncate"]["beats_random"] is None
    lines = tool.table(list(found.values())).splitlines()
    assert "| uniform | 2 | 12.000 ± 0.000 | 5.300 ± 0.283 | 50.000 ± 0.000 | no |" in lines
    assert "| first | 1 | 11.000 | 5.900 | 50.000 | every seed |" in lines
    assert "| random | 2 | 9.250 ± 0.354 | 5.500 ± 0.707 | 50.000 ± 0.000 | – |" in lines
    assert tool.table([]) == "no rows yet"


def test_the_figure_before_training_is_the_summary_s(runs: list[ablation.Run]) -> None:
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "summary.json").write_text(json.dumps({"eval": {"before": {"kl": 8.75}, "after": {"kl": 1.0}}}))
    assert tool.kl_before(runs[0]) == {"kl_before": 8.75}
