"""What the models of a later stage must have in common with those of the first."""

import json
import shutil
from contextlib import nullcontext

import pytest
from draw_jobs import drawn
from tiny_run import cache, changed, distil, distil_until, metrics, settings

from largekd.config.load import parse_config
from largekd.config.staging import stages_of
from largekd.distillation.models import find_sources
from largekd.distillation.stages import row_seed
from largekd.distillation.succession import check_succession
from largekd.errors import ConfigError, TeacherError

CURVE = {"shape": "linear", "start": 0.5, "end": 0.75}


def two_stages(assets, run_dir, *, changes, **options):
    tree = settings(assets, run_dir, train__max_steps=None, optim__warmup_steps=0, **options)
    tree["stages"] = [{"name": "one", "steps": 3}, {"name": "two", "steps": 3, "set": changes}]
    return tree


@pytest.fixture
def student_config(tiny_assets, tmp_path):
    """A shape that names no teacher."""
    path = tmp_path / "student.json"
    described = json.loads((tiny_assets / "teacher/config.json").read_text()) | {"num_hidden_layers": 1}
    path.write_text(json.dumps(described))
    return str(path)


def sources_of(tree):
    stages = stages_of(parse_config(tree))
    return stages, [find_sources(s.config, first=nullcontext, begins=s.index == 0) for s in stages]


def test_stages_whose_teachers_have_unlike_tokenizers_are_refused(tiny_assets, tmp_path, student_config):
    other = tmp_path / "other"
    shutil.copytree(tiny_assets / "teacher", other)
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[60:62]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(described))
    tree = two_stages(tiny_assets, tmp_path / "run", changes={"teacher.model": str(other)})
    tree["student"] = {"config": student_config, "deepspeed": tree["student"]["deepspeed"]}
    stages, (one, two) = sources_of(tree)
    check_succession(one, first=one, stage=stages[0])
    with pytest.raises(TeacherError, match=r"stages\.1 \('two'\): its teacher has another tokenizer .*2 ids mean"):
        check_succession(two, first=one, stage=stages[1])


def test_a_students_shape_is_that_of_the_first_stage(tiny_assets, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_assets / "teacher", other)
    described = json.loads((other / "config.json").read_text()) | {"rope_theta": 5.0, "rms_norm_eps": 0.25}
    (other / "config.json").write_text(json.dumps(described))
    tree = two_stages(tiny_assets, tmp_path / "run", changes={})
    stages, (one, two) = sources_of(tree)
    check_succession(two, first=one, stage=stages[1])
    tree["teacher"]["model"] = str(other)
    _, (_, changed) = sources_of(tree)
    with pytest.raises(ConfigError, match=r"stages\.1 \('two'\): .* another shape .*rms_norm_eps"):
        check_succession(changed, first=one, stage=stages[1])


def test_only_the_first_teacher_must_fit_an_initialisation(tiny_assets, tmp_path, student_config):
    other = tmp_path / "other"
    shutil.copytree(tiny_assets / "teacher", other)
    described = json.loads((other / "config.json").read_text())
    described |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (other / "config.json").write_text(json.dumps(described))
    tree = two_stages(tiny_assets, tmp_path / "run", changes={"teacher.model": str(other)})
    tree["student"] = {"config": student_config, "initialise": {}, "deepspeed": tree["student"]["deepspeed"]}
    stages, (one, two) = sources_of(tree)
    check_succession(two, first=one, stage=stages[1])
    with pytest.raises(ConfigError, match="cannot be made of a 'granite' teacher"):
        find_sources(stages[1].config, first=nullcontext)


def test_rates_and_draws_are_a_stages_own(tiny_assets, two_ranks, tmp_path):
    tree = two_stages(tiny_assets, tmp_path / "run", changes={"optim.lr": 5e-4})
    tree["student"] |= {"teacher_layers": [0, 1, 2], "layer_drop": {"rate": CURVE, "protect": [1]}}
    features = {"name": "hidden", "loss": "mse", "layers": {"map": "uniform"}, "sample_pairs": 1}
    tree["objective"] |= {"features": [features]}
    for stage in tree["stages"]:
        stage["steps"] = 5
    stages = stages_of(parse_config(tree))
    assert row_seed(stages[0]) == stages[0].config.train.seed != row_seed(stages[1])
    draws, other = two_ranks.run(drawn, tree=tree)
    assert draws == other
    assert len(draws[0]) == len(draws[1]) == 5
    for kind in range(2):
        assert [step[kind] for step in draws[0]] != [step[kind] for step in draws[1]]
    rates = [record["schedule/layer_drop"] for record in metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.5, 0.5625, 0.625, 0.6875, 0.75] * 2)


def test_a_student_of_the_teachers_layers_goes_on_from_a_cache_without_weights(tiny_assets, one_rank, tmp_path):
    tree = two_stages(tiny_assets, tmp_path / "run", changes={})
    tree["cache"] = {"path": str(tmp_path / "cache"), "codec": {"kind": "hidden"}}
    one_rank.run(cache, tree=tree)
    tree["stages"][1]["set"] = {"teacher": {"kind": "cached", "path": str(tmp_path / "cache")}}
    assert one_rank.run(distil_until, tree=tree, step=5, rank=0) == [None]
    (resumed,) = one_rank.run(distil, tree=tree)
    (straight,) = one_rank.run(distil, tree=changed(tree, run__dir=str(tmp_path / "straight")))
    assert resumed["steps"] == 6 and resumed["eval"] == straight["eval"]
