"""The embedded writer: texts do not depend on ranks, batches or how the weights are held."""

import json
from pathlib import Path
from typing import Any

import pytest
from factory_jobs import job_settings
from tiny_run import ROOT, changed

from largekd.config.generate import GenerateConfig
from largekd.config.load import parse_record
from largekd.curation.answer_shards import read_answers
from largekd.errors import ConfigError, DataError
from largekd.factory.preview import preview

UNSURE = 1e-6
"""The tiny model's logits are near each other, and as much smaller is their rounding."""


def generate_here(*, tree: dict[str, Any]) -> dict[str, Any] | None:
    """For a rank pool: the whole job without curation."""
    from largekd.factory.run import generate

    return generate(parse_record(GenerateConfig, mapping=tree), curate=False)


def _settings(folder: Path, assets: Path, **changes: Any) -> dict[str, Any]:
    tree = job_settings(folder, rows=7)
    tree["backend"] = {
        "model": str(assets / "teacher"),
        "deepspeed": str(ROOT / "ds_configs/zero3_tiny.json"),
        "precision": "fp32",
        "batch_size": 3,
    }
    return changed(tree, **{"sampling__top_p": 0.9, **changes})


def _texts(folder: Path) -> dict[str, Any]:
    return {answer.written.key: answer.written for answer in read_answers(folder / "raw")}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_same_on_two_ranks_and_in_any_batch(tmp_path, tiny_assets, one_rank, two_ranks, temperature):
    tree = _settings(tmp_path, tiny_assets, sampling__temperature=temperature)
    (summary,) = one_rank.run(generate_here, tree=changed(tree, backend__batch_size=1))
    assert summary["answers"] == 28
    alone = _texts(tmp_path / "job")
    assert not [written.failure for written in alone.values() if written.finish == "failed"]
    for gather in ("whole", "streamed"):
        folder = tmp_path / gather
        two_ranks.run(generate_here, tree=changed(tree, output__dir=str(folder), backend__gather=gather))
        found = _texts(folder)
        assert found.keys() == alone.keys()
        sure = [key for key, written in alone.items() if (written.least_margin or 0.0) >= UNSURE]
        assert len(sure) >= 14
        assert [found[key].text for key in sure] == [alone[key].text for key in sure]
        assert [found[key].mean_logp for key in sure] == pytest.approx([alone[key].mean_logp for key in sure], abs=1e-4)
        # Nothing is left to write for another number of ranks.
        (again,) = one_rank.run(generate_here, tree=changed(tree, output__dir=str(folder)))
        assert again["answers"] == 28 and _texts(folder) == found


def test_a_prompt_that_is_too_long_is_a_failed_row_with_the_reason(tmp_path, tiny_assets, one_rank):
    tree = _settings(tmp_path, tiny_assets, sampling__max_prompt_tokens=2)
    one_rank.run(generate_here, tree=tree)
    found = _texts(tmp_path / "job").values()
    assert len(found) == 28 and {written.finish for written in found} == {"failed"}
    assert all("sampling.max_prompt_tokens" in written.failure for written in found)


def test_another_model_is_another_job(tmp_path, tiny_assets, one_rank):
    tree = _settings(tmp_path, tiny_assets)
    one_rank.run(generate_here, tree=tree)
    with pytest.raises(AssertionError, match=r"writer\.precision: 'fp32' -> 'bf16'"):
        one_rank.run(generate_here, tree=changed(tree, backend__precision="bf16"))


def test_the_preview_shows_prompts_and_counts_and_writes_nothing(tmp_path, tiny_assets):
    text = preview(parse_record(GenerateConfig, mapping=_settings(tmp_path, tiny_assets)))
    assert "asks: 28 of 7 rows" in text and "at most 224 written" in text
    assert "What is 0 and 0?" in text and "template step_by_step" in text and "template direct" in text
    assert not (tmp_path / "job").exists()


def test_a_priced_server_shows_what_the_job_may_cost(tmp_path):
    tree = job_settings(tmp_path)
    tree["backend"] = {"kind": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "m", "output_price": 1000.0}
    text = preview(parse_record(GenerateConfig, mapping=tree))
    assert "cost: at most about 0.1600" in text and "further asks" not in text
    tree["judge"] = {"samples": 3}
    text = preview(parse_record(GenerateConfig, mapping=tree))
    assert "judge: at most 60 further asks, for answers without a verdict of a rule" in text


def test_a_wrong_key_names_the_nearest(tmp_path):
    tree = job_settings(tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.sample: unknown key; did you mean sampling\.samples"):
        parse_record(GenerateConfig, mapping=changed(tree, sampling__sample=3))


@pytest.mark.parametrize(
    ("key", "value", "told"), [("stop", ["END", ""], r"sampling\.stop"), ("temperatures", [0.7, -0.1], "at least 0")]
)
def test_draws_that_cannot_be_meant_are_refused(tmp_path, key, value, told):
    with pytest.raises(ConfigError, match=told):
        parse_record(GenerateConfig, mapping=changed(job_settings(tmp_path), **{f"sampling__{key}": value}))


def test_a_judges_template_is_tried_before_anything_is_written(tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% block user %}{{ text }} {{ rubric }}{% endblock %}")
    tree = job_settings(tmp_path)
    tree["judge"] = {"template": str(template)}
    with pytest.raises(DataError, match="'rubric' is undefined"):
        preview(parse_record(GenerateConfig, mapping=tree))


def test_samples_that_will_be_alike_are_told(tmp_path, caplog):
    from largekd.factory.run import _warn_of_repeats

    tree = job_settings(tmp_path)
    tree["judge"] = {"samples": 3}
    _warn_of_repeats(parse_record(GenerateConfig, mapping=changed(tree, sampling__temperatures=[0.0, 0.7])))
    assert "judge.samples = 3" in caplog.text and "sampling.samples" not in caplog.text
    _warn_of_repeats(parse_record(GenerateConfig, mapping=changed(tree, sampling__temperature=0.0)))
    assert "sampling.samples = 2" in caplog.text


def test_settings_that_came_as_json_are_the_same_record(tmp_path):
    tree = job_settings(tmp_path)
    config = parse_record(GenerateConfig, mapping=tree)
    assert parse_record(GenerateConfig, mapping=json.loads(config.model_dump_json())) == config
