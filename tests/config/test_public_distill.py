import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import largekd
from largekd.config.load import parse_config
from largekd.errors import ConfigError


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the run was given; the run itself is left out."""
    room, calls = ModuleType("largekd.distillation.run"), []

    def distill(config: Any) -> str:
        calls.append(config)
        return "summary"

    room.distill = distill
    monkeypatch.setitem(sys.modules, "largekd.distillation.run", room)
    return calls


def test_a_mapping_a_file_and_a_record_are_the_same(
    received: list[Any], minimal: dict[str, Any], tmp_path: Path
) -> None:
    config = parse_config(minimal)
    path = tmp_path / "run.yaml"
    path.write_text(str(minimal), encoding="utf-8")
    for given in (minimal, path, str(path), config):
        assert largekd.distill(given) == "summary"
    assert received == [config] * 4


def test_errors_come_before_anything_is_loaded(
    received: list[Any], minimal: dict[str, Any], with_key: Callable[[str, object], dict[str, Any]]
) -> None:
    config = parse_config(minimal)
    endless = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})
    for given in (with_key("train.seed", "x"), "absent.yaml", endless):
        with pytest.raises(ConfigError):
            largekd.distill(given)
    assert received == []


@pytest.mark.parametrize("first", ["pass", "import largekd.distillation", "import largekd.config.run"])
def test_the_call_survives_the_import_of_any_room(first: str) -> None:
    code = f"{first}; import largekd, largekd.distillation, inspect; assert inspect.isfunction(largekd.distill)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(largekd.__file__).parents[1])


def test_no_room_hides_the_call() -> None:
    assert not (Path(largekd.__file__).parent / "distill").joinpath("__init__.py").exists(), (
        "a sub-package largekd.distill would replace the function largekd.distill once imported"
    )


def test_importing_the_package_is_light() -> None:
    code = "import largekd, sys; assert not {'torch', 'pydantic', 'omegaconf'} & set(sys.modules); largekd.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(largekd.__file__).parents[1])
