import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from largekd.config.load import load_config

CHECKOUT = Path(__file__).resolve().parents[2]
TRAIN = CHECKOUT / "launch" / "train.py"
QUICKSTART = "recipes/quickstart.yaml"

# Reports what a launcher imported, as the last line on stderr.
SPY = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {launch!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {{"torch", "transformers", "deepspeed", "pydantic", "huggingface_hub"}} & set(sys.modules)
    sys.stderr.write("imported:" + ",".join(sorted(heavy)))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments],
        cwd=CHECKOUT,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def spied(*arguments: str) -> str:
    code = SPY.format(launch=str(TRAIN.parent))
    done = subprocess.run(
        [sys.executable, "-c", code, str(TRAIN), *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr.rsplit("imported:", 1)[1]


def test_help_shows_options_and_keys() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert "train.max_steps  (whole number; default null)" in done.stdout
    assert "local_rank" not in done.stdout


def test_dry_run_prints_a_configuration_that_loads_and_a_plan(tmp_path: Path) -> None:
    done = run("--config", QUICKSTART, "train.max_steps=77", "--dry-run", "--world-size", "2", "optim.lr=1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    rendered, plan = done.stdout.split("\n\n", 1)
    (tmp_path / "config.yaml").write_text(rendered, encoding="utf-8")
    expected = load_config(CHECKOUT / QUICKSTART, overrides=["train.max_steps=77", "optim.lr=0.001"])
    assert load_config(tmp_path / "config.yaml") == expected
    assert plan.startswith(("plan: ranks 2,", "no plan: "))


def test_dry_run_without_the_model_says_how_to_fetch_it(tmp_path: Path) -> None:
    done = run("--config", QUICKSTART, "--dry-run", "teacher.model=some-owner/some-model", HF_HOME=str(tmp_path))
    assert done.returncode == 0
    assert OmegaConf.create(done.stdout.split("\n\n")[0]).teacher.model == "some-owner/some-model"
    assert done.stdout.endswith("no plan: some-owner/some-model not fetched, run `hf download some-owner/some-model`\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "absent.yaml"], "train.py: absent.yaml: no such configuration file"),
        (["--config", QUICKSTART, "train.max_stepz=1"], "train.max_stepz: unknown key; did you mean train.max_steps?"),
        (["--config", QUICKSTART, "word"], "override 'word': must be key=value"),
        (["--config", QUICKSTART, "--dry-run", "--world-size", "3"], "must be a multiple of 3 ranks"),
        (["--config", QUICKSTART, "--dry-run", "--world-size", "-1"], "--world-size -1: must be at least 1"),
        (["--config", QUICKSTART, "--dry-run", "student.deepspeed=absent.json"], "student.deepspeed = 'absent.json'"),
        (["--config", QUICKSTART, "--dry", "x"], "unrecognized arguments: --dry; see --help"),
        (["train.seed=1"], "--config FILE is missing"),
    ],
)
def test_a_users_error_is_one_message_and_status_2(arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_only_rank_0_speaks() -> None:
    for arguments in (["--config", "absent.yaml"], ["--nonsense"]):
        done = run("--local_rank=1", *arguments, RANK="1", WORLD_SIZE="2")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = run("--local_rank=1", "--config", QUICKSTART, "--dry-run", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_heavy_packages_are_not_imported_for_help_errors_and_plans() -> None:
    assert spied("--nonsense") == ""
    assert spied("--help") == "pydantic"
    assert spied("--config", QUICKSTART, "--dry-run") == "pydantic"


@pytest.mark.parametrize(("arguments", "limit_s"), [(["--help"], 0.6), (["--config", QUICKSTART, "--dry-run"], 1.0)])
def test_start_up_is_quick(arguments: list[str], limit_s: float) -> None:
    def children_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        before = children_s()
        assert run(*arguments).returncode == 0
        return children_s() - before

    assert min(once() for _ in range(2)) < limit_s
