import json
from pathlib import Path

import pytest

from largekd.planner.errors import PlanUnavailableError
from largekd.planner.locate import read_model_config


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf" / "hub"


def store(folder: Path, **config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_folder_and_a_file(cache: Path, tmp_path: Path) -> None:
    store(tmp_path / "model", model_type="a")
    assert read_model_config("model") == {"model_type": "a"}
    assert read_model_config(str(tmp_path / "model" / "config.json")) == {"model_type": "a"}


def test_a_cached_hub_model_and_its_revisions(cache: Path) -> None:
    repository = cache / "models--owner--name"
    store(repository / "snapshots" / "c0ffee", hidden_size=1)
    store(repository / "snapshots" / "beef", hidden_size=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    (repository / "refs" / "v2").write_text("beef\n", encoding="utf-8")
    assert read_model_config("owner/name") == {"hidden_size": 1}
    assert read_model_config("owner/name", revision="v2") == {"hidden_size": 2}
    assert read_model_config("owner/name", revision="beef") == {"hidden_size": 2}
    with pytest.raises(PlanUnavailableError):
        read_model_config("owner/name", revision="v3")


def test_the_cache_is_the_one_that_the_hub_library_uses(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "elsewhere" / "models--owner--name" / "snapshots" / "main", hidden_size=3)
    with pytest.raises(PlanUnavailableError):
        read_model_config("owner/name")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert read_model_config("owner/name") == {"hidden_size": 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("assets/smollm2-135m-instruct", r"run `python tools/fetch_assets\.py smollm2-135m-instruct`"),
        ("owner/name", "owner/name not fetched, run `hf download owner/name`"),
        ("gpt2", "run `hf download gpt2`"),
        ("./owner/name", "is not a folder with a config.json"),
        ("/no/such/place", "is not a folder with a config.json"),
    ],
)
def test_an_absent_model_is_told_with_the_command_that_fetches_it(cache: Path, name: str, expected: str) -> None:
    with pytest.raises(PlanUnavailableError, match=expected):
        read_model_config(name)


def test_a_broken_config(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(PlanUnavailableError, match="cannot be read"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(PlanUnavailableError, match="not a JSON object"):
        read_model_config(str(tmp_path))
