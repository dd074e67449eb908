"""Settings of the whole suite: the environment DeepSpeed reads at import, and the choice of slow tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import RankPool
from tiny_run import make_assets

_ROOT = Path(__file__).resolve().parent.parent


def _prepare_environment() -> None:
    # Before any test module imports torch or DeepSpeed; workers and launched jobs inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    prebuilt = Path(sys.prefix) / "torch_extensions"
    if prebuilt.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(prebuilt))
    # The suite also runs when the interpreter is called by its path, without activation.
    binaries = str(Path(sys.executable).parent)
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"


_prepare_environment()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    # A test that is named on the command line is meant.
    named = {argument.split("[")[0] for argument in config.invocation_params.args if "::" in str(argument)}
    left_out = [item for item in slow if item.nodeid.split("[")[0] not in named]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two rank processes shared by the whole suite."""
    pool = RankPool(world_size=2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A single rank process, for comparison."""
    pool = RankPool(world_size=1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and text for whole runs, see tiny_run."""
    return make_assets(tmp_path_factory.mktemp("assets"))
