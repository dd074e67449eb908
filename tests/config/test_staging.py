"""Stages and freezing in the configuration: what merges, and what is refused with the key that is wrong."""

import pytest

from largekd.config.load import parse_config
from largekd.config.staging import keeps_teacher, nested, same_held_out, stage_named, stages_of, stages_to_cache
from largekd.errors import ConfigError
from largekd.planner.memory import PLACES
from largekd.planner.report import plan_record, plan_text


def staged(minimal, *stages, **changes):
    minimal["train"].pop("max_steps")
    names = ("one", "two", "three")
    entries = [{"name": name, "steps": 4} | stage for name, stage in zip(names, stages, strict=False)]
    return {**minimal, "stages": entries, **changes}


def test_a_run_without_stages_is_one_stage(minimal):
    config = parse_config(minimal)
    (stage,) = stages_of(config)
    assert stage.config == config and stage.index == 0


def test_a_stage_merges_mappings_and_replaces_lists_and_kinds(minimal):
    minimal["objective"] = {"divergences": [{"name": "forward_kl"}, {"name": "reverse_kl"}], "alpha": 0.7}
    change = {
        "objective": {"divergences": [{"name": "jsd", "mix": 0.3}]},
        "data.train.max_samples": 5,
        "teacher": {"kind": "cached", "path": "c", "model": "t"},
    }
    first, second = stages_of(parse_config(staged(minimal, {}, {"set": change})))
    assert first.config.objective.alpha == second.config.objective.alpha == 0.7
    assert [term.name for term in second.config.objective.divergences] == ["jsd"]
    assert second.config.data.train.path == "train.jsonl" and second.config.data.train.max_samples == 5
    assert first.config.teacher.kind == "online" and second.config.teacher.kind == "cached"
    assert keeps_teacher(first.config, first.config) and not keeps_teacher(first.config, second.config)


MEMBERS = [
    {"name": "a", "teacher": {"model": "t", "deepspeed": "ds_configs/zero3.json"}},
    {"name": "b", "teacher": {"model": "u", "deepspeed": "ds_configs/zero3.json"}},
]
CACHED = [MEMBERS[0], {"name": "b", "teacher": {"kind": "cached", "path": "c", "model": "u"}}]


@pytest.mark.parametrize(
    ("teacher", "change", "kept"),
    [
        ({"members": MEMBERS, "weighting": {"kind": "learned"}}, {"data.train.max_samples": 5}, True),
        ({"members": MEMBERS, "weighting": {"kind": "routed"}},
         {"data.train.max_samples": 5}, False),
        ({"members": MEMBERS, "weighting": {"kind": "routed"}},
         {"optim.lr": 1e-5}, True),
        ({"members": CACHED}, {"data.train.max_samples": 5}, False),
        ({"members": CACHED}, {"train.sequence_length": 32}, False),
        ({"members": CACHED}, {"optim.lr": 1e-5}, True),
    ],
)  # fmt: skip
def test_several_teachers_go_on_unless_they_look_at_what_changed(minimal, teacher, change, kept):
    minimal["teacher"] = {"kind": "mixture", **teacher}
    minimal["student"] = {"model": "s", "deepspeed": "ds_configs/zero3.json"}
    first, second = stages_of(parse_config(staged(minimal, {}, {"set": change})))
    assert keeps_teacher(first.config, second.config) == kept


def test_durations_become_steps_or_epochs_of_the_stage(minimal):
    # 8 rows of 16 positions, then of 32.
    by_tokens = {"steps": None, "tokens": 8 * 32 * 3 + 1, "set": {"train.sequence_length": 32}}
    stages = stages_of(parse_config(staged(minimal, {}, by_tokens, {"steps": None, "epochs": 2})))
    lengths = [(stage.config.train.max_steps, stage.config.train.max_epochs) for stage in stages]
    assert lengths == [(4, None), (4, None), (None, 2)]


def test_dotted_and_nested_keys_are_the_same():
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}


EMA = {"kind": "ema", "deepspeed": "ds_configs/zero3.json"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{}, {"name": "one"}], r"stages: the name 'one' is used 2 times"),
        ([{"tokens": 5}], r"stages\.0 \('one'\): steps and tokens are set"),
        ([{"steps": None}], r"stages\.0 \('one'\): none of them is set"),
        ([{"set": {"run.dir": "x"}}], r"stages\.0\.set\.run\.dir: run may not differ"),
        ([{"set": {"student": {"model": "x"}}}], r"stages\.0\.set\.student\.model: student may not differ"),
        ([{"set": {"train.max_steps": 3}}], r"stages\.0\.set\.train\.max_steps: .*own `steps`"),
        ([{}, {"set": {"train": {"precision": "fp32"}}}], r"stages\.1\.set\.train\.precision"),
        ([{"set": {"optim": {"lrr": 1}}}], r"stages\.0\.set\.optim\.lrr: unknown key; did you mean optim\.lr\?"),
        ([{"set": {"optim.warmup_steps": 4}}], r"stages\.0\.set\.optim\.warmup_steps = 4: must be less"),
        ([{"set": {"optim.lr": "fast"}}], r"stages\.0\.set\.optim\.lr = 'fast': must be a number"),
        ([{"keep_optimizer": True}], r"stages\.0\.keep_optimizer"),
        ([{}, {"keep_optimizer": True, "set": {"optim.implementation": "deepspeed"}}], r"keep_optimizer needs"),
        ([{}, {"set": {"teacher": EMA}}], r"stages\.1 \('two'\): teacher\.kind = 'ema' begins as the weights"),
    ],
)
def test_what_is_wrong_with_a_stage_is_told_with_its_place(minimal, stages, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(staged(minimal, *stages))


def test_a_length_beside_stages_is_refused(minimal):
    tree = staged(minimal, {})
    tree["train"]["max_steps"] = 10
    with pytest.raises(ConfigError, match=r"train\.max_steps = 10: the stages say how long the run is"):
        parse_config(tree)


def test_a_student_of_the_teachers_layers_has_one_teacher(minimal):
    minimal["student"] = {"teacher_layers": [0, 1], "deepspeed": "ds_configs/zero3.json"}
    with pytest.raises(ConfigError, match=r"its teacher is 'u', but the student is made of the layers of 't'"):
        parse_config(staged(minimal, {}, {"set": {"teacher.model": "u"}}))


@pytest.mark.parametrize("made", [{"teacher_layers": [0]}, {"config": "c.json", "initialise": {}}])
def test_only_the_first_stage_needs_the_weights_that_the_student_is_made_of(minimal, made):
    minimal["student"] = {**made, "deepspeed": "ds_configs/zero3.json"}
    cached = {"teacher": {"kind": "cached", "path": "c"}}
    parse_config(staged(minimal, {}, {"set": cached}))
    minimal["train"]["max_steps"] = 4
    with pytest.raises(ConfigError, match="a cache has no weights"):
        parse_config(minimal | cached)


def test_the_first_of_several_teachers_is_what_a_student_is_made_of(minimal):
    placed = {"kind": "online", "deepspeed": "ds_configs/teacher_zero3.json"}
    members = [{"name": name, "teacher": placed | {"model": name}} for name in ("t", "u")]
    minimal["student"] = {"teacher_layers": [0, 1], "deepspeed": "ds_configs/zero3.json"}
    parse_config(staged(minimal, {}, {"set": {"teacher": {"kind": "mixture", "members": members}}}))
    minimal["train"]["max_steps"] = 4
    with pytest.raises(ConfigError, match=r"its teacher is 'u', but the student is made of the layers of 't'"):
        parse_config(staged(minimal, {}, {"set": {"teacher": {"kind": "mixture", "members": members[::-1]}}}))


@pytest.mark.parametrize(
    ("freezing", "message"),
    [
        ({"parts": 1}, r"freezing\.parts = 1"),
        ({"parts": 3, "at": [0.5]}, r"freezing\.at has 1 entries"),
        ({"parts": 3, "at": [0.5, 0.5]}, r"freezing\.at = \[0\.5, 0\.5\]: must rise"),
        ({"parts": 2, "at": [1.0]}, r"must rise, and lie between 0 and 1"),
    ],
)
def test_freezing_is_checked(minimal, freezing, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**minimal, "freezing": freezing})


def test_the_plan_of_stages_is_that_of_the_largest(tmp_path, repository):
    from make_tiny_model import Shape, make_model

    make_model(tmp_path / "teacher", shape=Shape(), seed=0)
    placement = str(repository / "ds_configs/zero3_tiny.json")
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"model": str(tmp_path / "teacher"), "deepspeed": placement},
        "student": {"teacher_layers": [0, 1], "deepspeed": placement},
        "data": {"train": "train.jsonl"},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32},
    }
    small = plan_text(parse_config({**tree, "stages": [{"name": "short", "steps": 2}]}), world_size=1)
    long = {"name": "long", "steps": 2, "set": {"train.sequence_length": 128}}
    both = plan_text(parse_config({**tree, "stages": [{"name": "short", "steps": 2}, long]}), world_size=1)
    assert "the largest is long:" in both and "the largest" not in small
    assert "tokens a step 1,024" in both and "tokens a step 256" in small
    placed = {
        "name": "placed",
        "steps": 2,
        "set": {"teacher.deepspeed": str(repository / "ds_configs/teacher_cpu.json")},
    }
    config = parse_config({**tree, "stages": [long, placed]})
    record = plan_record(config, world_size=1)
    accelerator, host = ({name: peaks[place] for name, peaks in record["stages"].items()} for place in PLACES[:2])
    assert accelerator["long"] > accelerator["placed"] and host["long"] != host["placed"]
    assert record["peak_bytes"]["accelerator"] == accelerator["long"]
    assert record["peak_bytes"]["host"] == max(host.values())
    assert plan_text(config, world_size=1).count("peak of any stage") == len(PLACES)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"optim.lr": 1e-5, "data.train.max_samples": 3}, True),
        ({"train.sequence_length": 32}, False),
        ({"data.eval.max_samples": 3}, False),
        ({"eval.max_rows": 3}, False),
    ],
)
def test_held_out_text_is_the_same_while_its_rows_are(minimal, changes, same):
    minimal["data"] = {"train": "train.jsonl", "eval": {"path": "eval.jsonl"}}
    first, second = stages_of(parse_config(staged(minimal, {}, {"set": changes})))
    assert same_held_out(first.config, second.config) == same


def test_a_cache_serves_all_stages_with_the_same_rows(minimal):
    longer = {"set": {"train.sequence_length": 32}}
    config = parse_config(staged(minimal, {}, {"set": {"optim.lr": 1e-5}}, longer))
    assert [stage.name for stage in stages_to_cache(config, name="two")] == ["two", "one"]
    assert [stage.name for stage in stages_to_cache(config, name="three")] == ["three"]
    with pytest.raises(ConfigError, match=r"stages: 'three' read other rows .* than 'one'.*--stage"):
        stages_to_cache(config, name=None)
    with pytest.raises(ConfigError, match=r"--stage 'four': the stages of this run are 'one', 'two', 'three'"):
        stage_named(config, name="four")


def test_a_run_without_stages_has_one_to_cache_and_none_to_name(minimal):
    config = parse_config(minimal)
    assert [stage.config for stage in stages_to_cache(config, name=None)] == [config]
    with pytest.raises(ConfigError, match=r"--stage 'run': the stages of this run are none"):
        stage_named(config, name="run")


def test_a_curve_of_another_shape_replaces_and_one_of_the_same_merges(minimal):
    minimal["objective"] = {"alpha": {"shape": "linear", "start": 0.25, "end": 1.0}}
    step = {"set": {"objective.alpha": {"shape": "cosine", "start": 0.5, "end": 0.75}}}
    same = {"set": {"objective.alpha": {"start": 0.5}}}
    _, second, third = stages_of(parse_config(staged(minimal, {}, step, same)))
    assert second.config.objective.alpha.end == 0.75
    assert (third.config.objective.alpha.start, third.config.objective.alpha.end) == (0.5, 1.0)
    constant = {"set": {"objective.alpha": {"shape": "constant", "start": 0.5}}}
    minimal["train"]["max_steps"] = 4
    _, flat = stages_of(parse_config(staged(minimal, {}, constant)))
    assert flat.config.objective.alpha.end is None
