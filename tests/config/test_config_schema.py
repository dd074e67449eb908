import json
from pathlib import Path
from typing import Any

import pytest

from largekd.config.generate import EmbeddedBackendConfig, GenerateConfig
from largekd.config.load import load_config, load_record
from largekd.config.placement import read_placement, read_placements
from largekd.config.run import RunConfig
from largekd.config.schema import json_schema_text, key_reference, record_schema_text, run_keys

CHECKOUT = Path(__file__).resolve().parents[2]
GENERATING = sorted((CHECKOUT / "recipes").glob("generate_*.yaml"))
RECIPES = sorted(set((CHECKOUT / "recipes").glob("*.yaml")) - set(GENERATING))


def test_the_schema_for_editors_is_current() -> None:
    stored = (CHECKOUT / "recipes" / "schema.json").read_text(encoding="utf-8")
    assert stored == json_schema_text(), "run `python tools/schema.py`"


def test_the_schema_accepts_a_path_as_a_source_and_refuses_unknown_keys() -> None:
    source = json.loads(json_schema_text())["$defs"]["SourceConfig"]
    assert source["anyOf"][0] == {"type": "string"}
    assert source["anyOf"][1]["additionalProperties"] is False


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_resolve_with_their_placements(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert recipe.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    config = load_config(recipe)
    assert read_placements(config).student


@pytest.mark.parametrize("recipe", GENERATING, ids=lambda path: path.name)
def test_recipes_of_generation_resolve(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert recipe.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=generate_schema.json\n")
    config = load_record(GenerateConfig, path=recipe)
    if isinstance(config.backend, EmbeddedBackendConfig):
        assert read_placement(config.backend.deepspeed, key="backend.deepspeed")


def test_the_schema_of_generation_is_current() -> None:
    stored = (CHECKOUT / "recipes" / "generate_schema.json").read_text(encoding="utf-8")
    assert stored == record_schema_text(GenerateConfig), "run `python tools/schema.py`"


def test_the_keys_of_generation_are_explained() -> None:
    text = key_reference(GenerateConfig)
    assert "backend, kind embedded: " in text and "source, kind seeds: " in text
    assert "  sampling.max_new_tokens  (whole number; default 512)" in text


def test_there_are_recipes() -> None:
    assert GENERATING
    assert {"quickstart.yaml", "smoke.yaml"} <= {path.name for path in RECIPES}


def test_every_key_is_listed_once_with_a_default_or_required() -> None:
    keys = {key.name: key for key in run_keys()}
    assert len(keys) == len(list(run_keys()))
    assert keys["train.max_steps"].default == "null"
    assert keys["train.global_batch_size"].default is None
    assert keys["optim.betas"].kind == "list of 2 numbers"
    assert keys["objective.divergences.*.name"].kind.startswith("forward_kl | reverse_kl | bidirectional_kl | jsd | ")
    assert (keys["objective.alpha"].kind, keys["objective.alpha"].default) == ("number | mapping", "0.5")
    assert keys["objective.features.*.layers.pairs"].kind == "list of lists of 2 whole numbers"
    assert keys["objective.attention.*.relations"].kind == "list of (qq | kk | vv | qk)"
    assert keys["plugins"].kind == "list of texts"
    assert keys["data.eval.path"].description
    for group in RunConfig.model_fields:
        assert any(name == group or name.startswith(f"{group}.") for name in keys)


def test_the_reference_describes_every_key_of_a_minimal_file(minimal: dict[str, Any]) -> None:
    text = key_reference()
    for group, section in minimal.items():
        for name in section:
            assert f"  {group}.{name}" in text
    assert "data.eval  (as data.train; default null)" in text
    assert "objective.alpha  (number | mapping; default 0.5)" in text
    assert "objective.temperature  (as objective.alpha; default 1.0)" in text
    assert "objective.attention.*.layers  (as objective.features.*.layers)" in text
    assert "\n  plugins  (list of texts; default [])" in text
    assert text.count("warmup_frac") == 2, "a curve's keys are explained once in each of the two blocks that have some"
    assert max(len(line) for line in text.splitlines()) <= 110
