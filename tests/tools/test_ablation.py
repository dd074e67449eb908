"""The comparison goes on where it stopped, keeps a row per finished run, and tells means and deviations."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ablation
import pytest
from filelock import FileLock

from largekd.config.load import load_config
from largekd.config.render import render_config
from largekd.config.run import RunConfig
from largekd.errors import ConfigError
from largekd.monitoring.json_records import encode_record
from largekd.monitoring.summary import EvalFigures, RunSummary

BASE = "recipes/quickstart.yaml"
TWO = ablation.VARIANTS[:2]


class Trainings:
    """Stands for launch/train.py: leaves a run folder as that does, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.breaks_at: dict[str, str] = {}  # run -> last file that it writes
        self.interrupted_at: str | None = None

    def __call__(self, recipe: Path, ranks: int, log: Path) -> int:
        config = load_config(recipe)
        folder = Path(config.run.dir)
        self.started.append(folder.name)
        if folder.name == self.interrupted_at:
            raise KeyboardInterrupt
        with log.open("a") as output:
            output.write(f"a line\nthe reason\n{'resumed' if folder.exists() else 'fresh'}\n")
        (folder / "checkpoints" / "step_00000008").mkdir(parents=True, exist_ok=True)
        (folder / "export").mkdir(exist_ok=True)
        for name, text in self._files(config, ranks=ranks).items():
            (folder / name).write_text(text)
            if self.breaks_at.get(folder.name) == name:
                return 3
        return 0

    def _files(self, config: RunConfig, *, ranks: int) -> dict[str, str]:
        steps, seed = config.train.max_steps, config.train.seed
        assert steps is not None
        place = Path(config.run.dir) / "summary.json"
        summary = RunSummary(
            steps=steps,
            tokens=15_000,
            skipped_steps=0,
            wall_s=1.0,
            tokens_per_s=2.0,
            peak_rss_bytes=[2_000_000_000, 3_000_000_000],
            before=EvalFigures(perplexity=9.0, kl=9.0),
            after=EvalFigures(perplexity=20.0 + 2 * seed, kl=1.0 + seed),
        )
        summary.write(place)
        written = place.read_text()
        place.unlink()
        # Medians are not means: the first step is slow.
        seconds = [100.0, *(2.0 + seed for _ in range(steps - 1))]
        return {
            "config.yaml": render_config(config),
            "environment.json": json.dumps({"ranks": ranks, "packages": {"torch": "2.13.0"}}),
            "metrics.jsonl": "".join(
                encode_record(step=step, values={"loss": 1.0, "perf/step_s": value}) + "\n"
                for step, value in enumerate(seconds, start=1)
            ),
            "evaluation.jsonl": "".join(
                encode_record(step=step, values={"eval/top1_agreement": share}) + "\n"
                for step, share in ((0, 0.1), (steps, 0.5 + seed / 100))
            ),
            "summary.json": written,
            "DONE": "{}",
        }


@pytest.fixture
def trainings() -> Trainings:
    return Trainings()


Compare = Callable[..., list[str]]


@pytest.fixture
def compare(tmp_path: Path, trainings: Trainings) -> Compare:
    """compare(seeds=...): does the two first variants; names of the runs that were started."""

    def run(*, seeds: tuple[int, ...] = (0,), ranks: int = 2, overrides: tuple[str, ...] = ()) -> list[str]:
        trainings.started.clear()
        runs = ablation.plan(tmp_path, base=BASE, variants=TWO, seeds=seeds, ranks=ranks, overrides=overrides)
        ablation.run_all(runs, folder=tmp_path, runner=trainings)
        return list(trainings.started)

    return run


def rows_in(folder: Path) -> list[dict[str, object]]:
    return ablation.read_rows(folder / "rows.jsonl")


def test_the_names_are_the_issue_of_the_comparison() -> None:
    assert [variant.name for variant in ablation.VARIANTS] == [
        *("ce_only", "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl"),
        *("forward_kl+hidden", "forward_kl+attention", "forward_kl+both"),
    ]


@pytest.mark.parametrize("variant", ablation.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_a_configuration_of_the_quick_start(variant: ablation.Variant, tmp_path: Path) -> None:
    base = load_config(ablation.ROOT / BASE)
    (run,) = ablation.plan(tmp_path, base=BASE, variants=[variant], seeds=[3], ranks=2)
    config = run.config()
    assert (config.train.seed, config.run.dir) == (3, str(tmp_path / f"{variant.name}-seed3"))
    assert config.objective.alpha == (0.0 if variant.name == "ce_only" else base.objective.alpha)
    divergence = variant.name.split("+")[0]
    assert [term.name for term in config.objective.divergences] == [divergence.replace("ce_only", "forward_kl")]
    assert bool(config.objective.features) == variant.name.endswith(("+hidden", "+both"))
    assert bool(config.objective.attention) == variant.name.endswith(("+attention", "+both"))
    # Apart from the objective, all variants are the same run.
    assert config.train.model_copy(update={"seed": 0}) == base.train.model_copy(update={"max_steps": 8})
    assert config.data == base.data


def test_a_run_leaves_a_row_and_no_weights(compare: Compare, tmp_path: Path) -> None:
    assert compare(seeds=(0, 1)) == ["ce_only-seed0", "forward_kl-seed0", "ce_only-seed1", "forward_kl-seed1"]
    rows = rows_in(tmp_path)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        *(("ce_only", 0), ("forward_kl", 0)),
        *(("ce_only", 1), ("forward_kl", 1)),
    ]
    last = dict(rows[-1])
    overrides = last.pop("overrides")
    assert last == {
        "variant": "forward_kl",
        "seed": 1,
        "perplexity": 22.0,
        "kl": 2.0,
        "top1_agreement": 0.51,
        "tokens": 15_000,
        "skipped_steps": 0,
        "step_s": 3.0,
        "peak_rss_bytes": 3_000_000_000,
        "base": BASE,
        "ranks": 2,
        "versions": {"torch": "2.13.0"},
    }
    assert "train.seed=1" in overrides and ablation.FORWARD_KL in overrides
    assert {path.name for path in (tmp_path / "forward_kl-seed1").iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "evaluation.jsonl", "summary.json", "DONE")
    }


def test_runs_with_a_row_are_skipped(compare: Compare, tmp_path: Path) -> None:
    assert len(compare()) == 2
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert compare() == []
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert compare(seeds=(0, 5)) == ["ce_only-seed5", "forward_kl-seed5"]
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(before)


def test_a_finished_run_without_a_row_is_not_repeated(compare: Compare, tmp_path: Path) -> None:
    compare()
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.splitlines(keepends=True)[0])
    (tmp_path / "ce_only-seed0" / "export").mkdir()
    assert compare() == []
    assert (tmp_path / "rows.jsonl").read_text() == rows
    assert not (tmp_path / "ce_only-seed0" / "export").exists(), "left by a stop between row and tidying up"


@pytest.mark.parametrize("last_file", ["environment.json", "metrics.jsonl", "summary.json"])
def test_an_unfinished_run_has_no_row_and_goes_on(
    compare: Compare, trainings: Trainings, tmp_path: Path, last_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.breaks_at = {"ce_only-seed0": last_file}
    assert compare() == ["ce_only-seed0", "forward_kl-seed0"], "the others are done all the same"
    assert [row["variant"] for row in rows_in(tmp_path)] == ["forward_kl"]
    told = capsys.readouterr().err
    assert "ce_only, seed 0: not finished (exit status 3); see" in told and "the reason" in told
    assert (tmp_path / "ce_only-seed0" / "checkpoints").is_dir()
    trainings.breaks_at = {}
    assert compare() == ["ce_only-seed0"]
    assert (tmp_path / "ce_only-seed0.log").read_text().splitlines()[2::3] == ["fresh", "resumed"]
    assert [row["variant"] for row in rows_in(tmp_path)] == ["forward_kl", "ce_only"]


@pytest.mark.parametrize(
    "change", [{"overrides": ("optim.lr=0.5",)}, {"ranks": 1}, "config.yaml", "environment.json"], ids=str
)
def test_the_beginning_of_another_run_is_not_gone_on_with(
    compare: Compare, trainings: Trainings, tmp_path: Path, change: dict[str, object] | str
) -> None:
    trainings.breaks_at = {"ce_only-seed0": "metrics.jsonl", "forward_kl-seed0": "metrics.jsonl"}
    compare()
    trainings.breaks_at = {}
    if isinstance(change, str):
        (tmp_path / "ce_only-seed0" / change).unlink()
        compare()
    else:
        compare(**change)
    assert "resumed" not in (tmp_path / "ce_only-seed0.log").read_text()
    assert len(rows_in(tmp_path)) == 2


def test_a_finished_run_of_other_settings_is_done_again(compare: Compare, tmp_path: Path) -> None:
    compare()
    (tmp_path / "rows.jsonl").unlink()
    assert compare(overrides=("optim.lr=0.5",)) == ["ce_only-seed0", "forward_kl-seed0"]
    assert "optim.lr=0.5" in rows_in(tmp_path)[0]["overrides"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"overrides": ("optim.lr=0.5",)}, "with other overrides"), ({"ranks": 1}, "with other ranks: 2 there, 1 now")],
)
def test_rows_of_other_settings_are_not_mixed(compare: Compare, change: dict[str, object], expected: str) -> None:
    compare()
    with pytest.raises(ConfigError, match=expected):
        compare(**change)


def test_a_stop_keeps_the_rows_so_far(compare: Compare, trainings: Trainings, tmp_path: Path) -> None:
    trainings.interrupted_at = "forward_kl-seed0"
    with pytest.raises(KeyboardInterrupt):
        compare()
    assert [row["variant"] for row in rows_in(tmp_path)] == ["ce_only"]
    trainings.interrupted_at = None
    assert compare() == ["forward_kl-seed0"]


def test_two_at_once_are_refused(compare: Compare, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another ablation is at work here"):
        compare()


def test_a_recipe_without_held_out_text_is_refused_before_any_run(compare: Compare, trainings: Trainings) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval is null"):
        compare(overrides=("data.eval=null",))
    assert trainings.started == []


def figures(variant: str, *, seed: int, perplexity: float | None, kl: float = 1.0) -> dict[str, object]:
    return {
        "variant": variant,
        "seed": seed,
        "perplexity": perplexity,
        "kl": kl,
        "top1_agreement": 0.5,
        "tokens": 15_000 + seed,
        "step_s": 2.0,
        "peak_rss_bytes": 3e9,
    }


def test_the_table_has_means_and_sample_deviations() -> None:
    text = ablation.table(
        [
            figures("jsd", seed=0, perplexity=1000.0, kl=2.0),
            figures("ce_only", seed=0, perplexity=1.0, kl=1.0),
            figures("ce_only", seed=1, perplexity=2.0, kl=1.0),
            figures("ce_only", seed=2, perplexity=6.0, kl=4.0),
            figures("reverse_kl", seed=0, perplexity=None),
        ]
    )
    assert text.splitlines()[2:] == [
        # Deviations of (1, 2, 6) and (1, 1, 4): the square roots of 14 / 2 and 6 / 2.
        "| ce_only | 3 | 3.00 ± 2.65 | 2.0000 ± 1.7321 | 50.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 |",
        "| reverse_kl | 1 | not finite | 1.0000 | 50.00 | 2.00 | 3.00 |",
        "| jsd | 1 | 1,000.00 | 2.0000 | 50.00 | 2.00 | 3.00 |",
        "",
        "Each run saw 15,000 to 15,002 training tokens. So few tokens rank early learning only: "
        "a longer run may order the objectives differently.",
    ]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainings = Trainings()
    monkeypatch.setattr(ablation, "RUNS", tmp_path)
    monkeypatch.setattr(ablation, "launch", trainings)
    monkeypatch.setattr(ablation.signal, "signal", lambda *_: None)
    assert ablation.main(["--table"]) == 0
    assert capsys.readouterr().out == "no rows yet\n"
    arguments = ["--variants", "jsd", "--ranks", "1", "--name", "mine", "--seeds", "0,1", "train.max_steps=4"]
    assert ablation.main(arguments) == 0
    assert "| jsd | 2 | 21.00 ± 1.41 |" in capsys.readouterr().out
    assert trainings.started == ["jsd-seed0", "jsd-seed1"]
    assert load_config(tmp_path / "mine" / "jsd-seed0.yaml").train.max_steps == 4
    assert ablation.main(["--table", "--name", "mine"]) == 0
    assert "| jsd | 2 |" in capsys.readouterr().out
    trainings.breaks_at = {"jsd-seed7": "config.yaml"}
    assert ablation.main(["--variants", "jsd", "--seeds", "7", "--name", "other"]) == 1
    capsys.readouterr()
    for wrong, expected in (
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--variants", "jsd,kl"], "--variants: there is no 'kl'; known are ce_only, forward_kl, "),
        (["--seeds", "0,x"], "--seeds: 'x' is not a whole number"),
        (["objective.alpha=2"], "objective.alpha = 2.0: must be at least 0 and at most 1"),
    ):
        assert ablation.main(wrong) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_started_as_the_documents_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        started.append(command)
        assert options["cwd"] == ablation.ROOT
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(ablation.subprocess, "run", run)
    recipe = tmp_path / "recipe.yaml"
    assert ablation.launch(recipe, ranks, tmp_path / "x.log") == 7
    (command,) = started
    assert command[-3:] == [str(ablation.ROOT / "launch" / "train.py"), "--config", str(recipe)]
    if ranks == 1:
        assert command[:-3] == [sys.executable]
    else:
        assert Path(command[0]).name == "deepspeed"
        assert command[command.index("--num_accelerators") + 1] == "2"


def test_no_torch_is_imported(repository: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(repository / 'tools')!r}, {str(repository)!r}]\n"
        "import ablation; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
