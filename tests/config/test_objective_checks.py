"""Combinations of the objective's keys that cannot be run are refused with key, value and rule; the others pass."""

import copy
from typing import Any

import pytest

from largekd.config.load import parse_config
from largekd.config.run import RunConfig
from largekd.errors import ConfigError

KL = {"name": "forward_kl"}
Tree = dict[str, Any]


@pytest.fixture
def build(minimal: Tree) -> Any:
    def parse(objective: Tree, *, student: Tree | None = None, plugins: list[str] | None = None) -> RunConfig:
        tree = copy.deepcopy(minimal)
        tree["objective"] = objective
        tree["plugins"] = plugins or []
        tree["student"] |= student or {}
        return parse_config(tree)

    return parse


def lines(build: Any, objective: Tree, **others: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(objective, **others)
    text = str(caught.value)
    return text.splitlines()[1:] if "\n" in text else [text.removeprefix("configuration: ")]


def weighted(**curve: Any) -> Tree:
    return {"divergences": [KL | {"weight": curve}]}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # Curves.
        (
            {"temperature": {"start": 2, "warmup_frac": 0.7, "warmup_from": 1, "cooldown_frac": 0.4, "cooldown_to": 1}},
            "objective.temperature.warmup_frac = 0.7: with objective.temperature.cooldown_frac = 0.4 it is 1.1 of the",
        ),
        (
            weighted(start=1, end=0, shape="exponential"),
            "divergences.0.weight.end = 0.0: must be greater than 0 for the",
        ),
        (
            {"alpha": {"start": 0, "end": 0.5, "shape": "exponential"}},
            "objective.alpha.start = 0.0: must be greater than 0 for the shape exponential",
        ),
        (
            weighted(start=1, end=2, shape="constant"),
            "divergences.0.weight.end = 2.0: the shape constant stays at start",
        ),
        # Ranges, at every corner of a curve.
        ({"alpha": 1.5}, "objective.alpha = 1.5: must be at least 0 and at most 1"),
        ({"alpha": -0.1}, "objective.alpha = -0.1: must be at least 0 and at most 1"),
        (
            {"alpha": {"start": 0.2, "end": 1.2}},
            "objective.alpha: runs from 0.2 to 1.2 over its curve; every value must",
        ),
        (
            {"alpha": {"start": 0.2, "cooldown_frac": 0.1, "cooldown_to": -0.2}},
            "objective.alpha: runs from -0.2 to 0.2",
        ),
        ({"temperature": 0}, "objective.temperature = 0.0: must be greater than 0"),
        (
            {"temperature": {"start": 2, "warmup_frac": 0.1}},
            "objective.temperature: runs from 0.0 to 2.0 over its curve",
        ),
        ({"divergences": [KL | {"weight": -1}, {"name": "jsd"}]}, "divergences.0.weight = -1.0: must be at least 0"),
        ({"features": [{"weight": -1}]}, "objective.features.0.weight = -1.0: must be at least 0"),
        ({"attention": [{"weight": {"start": 1, "end": -1}}]}, "objective.attention.0.weight: runs from -1.0 to 1.0"),
        # Divergences.
        (
            {"alpha": {"start": 0, "end": 0.5}, "divergences": []},
            "objective.alpha = 0.5 at its largest needs one with a",
        ),
        ({"divergences": [KL | {"weight": {"start": 0, "end": 0}}]}, "objective.alpha = 0.5 needs one with a positive"),
        ({"divergences": [KL, KL]}, "forward_kl appears 2 times; give it once"),
        (
            {"divergences": [{"name": "bidirectional_kl", "forward_weight": 0, "reverse_weight": 0}]},
            "objective.divergences.0.forward_weight = 0: it or objective.divergences.0.reverse_weight must be greater",
        ),
        ({"divergences": [{"name": "plugin", "term": "mine"}]}, "divergences.0.term = 'mine': no module is named"),
        ({"divergences": [{"name": "plugin", "term": "a b"}]}, "divergences.0.term = 'a b': must match the regular"),
        # Signals.
        ({"signal": {"kind": "sampled"}, "divergences": [{"name": "jsd"}]}, "divergences.0.name = 'jsd': cannot use"),
        (
            {"signal": {"kind": "sampled"}, "divergences": [KL, {"name": "logit_mse"}]},
            "divergences.1.name = 'logit_mse': cannot use objective.signal.kind = 'sampled', which is unbiased for",
        ),
        *(
            (
                {"signal": {"kind": "top_k", "tail": tail}, "divergences": [{"name": name}]},
                f"divergences.0.name = '{name}': needs the teacher's whole distribution; objective.signal.kind = 'top",
            )
            for name in ("sorted_distance", "logit_mse", "ranking_hinge")
            for tail in ("tail", "renormalise")
        ),
        # Translations.
        *(
            (
                {"translation": {}, "divergences": [{"name": name}]},
                f"divergences.0.name = '{name}': needs the teacher's whole distribution, which objective.translation",
            )
            for name in ("sorted_distance", "logit_mse", "ranking_hinge")
        ),
        (
            {"translation": {}, "signal": {"kind": "top_k"}},
            "objective.signal.kind = 'top_k': objective.translation.method = 'spans' chooses its own ids",
        ),
        (
            {"translation": {}, "signal": {"kind": "sampled"}},
            "objective.signal.kind = 'sampled': objective.translation.method = 'spans' chooses its own ids",
        ),
        (
            {"translation": {"method": "sorted"}},
            "divergences.0.name = 'forward_kl': compares ids, which objective.trans",
        ),
        (
            {"divergences": [{"name": "span_likelihood"}]},
            "'span_likelihood': needs objective.translation.method = 'spans'",
        ),
        (
            {
                "translation": {"method": "sorted"},
                "divergences": [{"name": "sorted_distance"}, {"name": "span_likelihood"}],
            },
            "divergences.1.name = 'span_likelihood': needs objective.translation.method = 'spans'",
        ),
        ({"translation": {}, "features": [{"loss": "cka"}]}, "objective.features.0.loss = 'cka': is not defined with"),
        (
            {"translation": {}, "attention": [{}, {"name": "b", "loss": "relation"}]},
            "objective.attention.1.loss = 'relation': is not defined with objective.translation",
        ),
        # Selections.
        ({"selection": {"by": "gap"}}, "objective.selection.threshold: neither is set; set exactly one of it and"),
        ({"selection": {"by": "gap", "share": 0.5, "threshold": 1}}, "objective.selection.threshold: both are set"),
        (
            {"selection": {"by": "gap", "share": 0.5}, "signal": {"kind": "sampled"}},
            "objective.selection.by = 'gap': draws (objective.signal.kind = 'sampled') do not tell it",
        ),
        (
            {"selection": {"by": "teacher_entropy", "share": 0.5}, "signal": {"kind": "sampled"}},
            "objective.selection.by = 'teacher_entropy': draws",
        ),
        (
            {
                "selection": {"by": "gap", "share": 0.5},
                "translation": {"method": "sorted"},
                "divergences": [{"name": "sorted_distance"}],
            },
            "objective.selection.by = 'gap': objective.translation.method = 'sorted' does not translate ids",
        ),
        # Names.
        ({"features": [{}, {}]}, "objective.features.1.name = 'hidden': objective.features.0 is called so; names must"),
        (
            {"features": [{"name": "x"}], "attention": [{"name": "x"}]},
            "objective.attention.0.name = 'x': objective.features.0 is called so",
        ),
        ({"features": [{"name": "forward_kl"}]}, "features.0.name = 'forward_kl': a term of objective.divergences is"),
        ({"features": [{"name": "cross_entropy"}]}, "objective.features.0.name = 'cross_entropy': the name is taken"),
        (
            {"features": [{"name": "a.b"}, {"name": "a_b"}]},
            "features.1.name = 'a_b': objective.features.0 is called so",
        ),
        # Keys that nothing reads.
        ({"features": [{"predictor_hidden": 8}]}, "features.0.predictor_hidden: only the loss 'predictive' has"),
        ({"attention": [{"relation_heads": 4}]}, "attention.0.relation_heads: the loss 'kl' does not read it"),
        (
            {"attention": [{"loss": "relation", "match_heads": "pool"}]},
            "attention.0.match_heads: the loss 'relation' does not read it",
        ),
        (
            {"attention": [{"loss": "relation", "relations": ["qq", "qq"]}]},
            "attention.0.relations = ['qq', 'qq']: names one twice",
        ),
        # Layers.
        (
            {"features": [{"layers": {"map": "closest_non_pruned"}}]},
            "features.0.layers.map = 'closest_non_pruned': needs to know which layers the student kept; set student",
        ),
    ],
)
def test_one_broken_rule_is_told_in_one_line(build: Any, objective: Tree, expected: str) -> None:
    found = lines(build, objective)
    assert len(found) == 1
    assert expected in found[0]


CURVE = {"start": 0.5, "end": 0.9, "shape": "cosine", "warmup_frac": 0.6, "cooldown_frac": 0.4, "cooldown_to": 0.1}


@pytest.mark.parametrize(
    "objective",
    [
        {"alpha": CURVE},
        {"temperature": {"start": 4, "end": 0.5, "shape": "exponential"}},
        weighted(start=1, shape="exponential", warmup_frac=0.1),
        weighted(start=1, end=1, shape="constant"),
        {"alpha": 0, "divergences": []},
        {"alpha": 0, "divergences": [], "features": [{}], "attention": [{}]},
        {"divergences": [{"name": "bidirectional_kl", "forward_weight": 0}]},
        {"signal": {"kind": "sampled"}, "divergences": [KL, {"name": "jsd", "weight": 0}]},
        {"signal": {"kind": "sampled"}, "selection": {"by": "student_entropy", "share": 0.5}},
        {"signal": {"kind": "top_k"}, "divergences": [{"name": "adaptive_kl"}, {"name": "jsd"}]},
        {"divergences": [{"name": "sorted_distance"}, {"name": "logit_mse"}, {"name": "ranking_hinge"}]},
        {"translation": {}, "divergences": [KL, {"name": "span_likelihood"}], "features": [{}], "attention": [{}]},
        {"translation": {"method": "sorted"}, "divergences": [KL | {"weight": 0}, {"name": "sorted_distance"}]},
        {"selection": {"by": "gap", "threshold": 0}},
        {"selection": {"by": "teacher_entropy", "keep": "below", "share": 0.3}},
        {"features": [{}, {"name": "cosine", "loss": "cosine"}], "attention": [{"loss": "relation"}]},
    ],
)
def test_what_can_be_run_passes(build: Any, objective: Tree) -> None:
    config = build(objective)
    assert parse_config(config.model_dump(mode="json")) == config


def test_terms_of_plugins_are_told_apart_by_their_own_name(build: Any) -> None:
    def plugin(term: str) -> Tree:
        return {"name": "plugin", "term": term, "options": {"power": 2, "names": ["a"]}}

    for objective in ({"signal": {"kind": "top_k"}}, {"translation": {}}):
        with pytest.raises(ConfigError, match="needs the teacher's whole distribution"):
            build({"divergences": [KL, plugin("mine")]} | objective, plugins=["terms.mine"])
    config = build({"divergences": [KL, plugin("mine"), plugin("other")]}, plugins=["terms.mine", "my/terms.py"])
    assert config.plugins == ("terms.mine", "my/terms.py")
    assert config.objective.divergences[1].options == {"power": 2, "names": ["a"]}
    for broken, expected in (
        ({"divergences": [plugin("mine"), plugin("mine")]}, "mine appears 2 times"),
        ({"divergences": [KL, plugin("forward_kl")]}, "forward_kl appears 2 times"),
        (
            {"divergences": [plugin("mine")], "attention": [{"name": "mine"}]},
            "objective.attention.0.name = 'mine': a term",
        ),
    ):
        (line,) = lines(build, broken, plugins=["terms.mine"])
        assert expected in line


def test_names_of_plugin_modules(build: Any) -> None:
    assert lines(build, {}, plugins=["a.b", " ", "a.b"]) == [
        "  plugins.1 = ' ': must be a module's dotted name or the path of a .py file",
        "  plugins.2 = 'a.b': is named twice",
    ]


def test_closest_layers_need_the_student_to_be_made_of_the_teachers(build: Any) -> None:
    objective = {"attention": [{"layers": {"map": "closest_non_pruned"}}]}
    kept = {"teacher_layers": [0, 3]}
    assert build(objective, student=kept | {"model": None}).student.teacher_layers == (0, 3)
    (line,) = lines(build, objective, student=kept)
    assert "student.model = 's' replaces student.teacher_layers: set only one of them" in line
    (line,) = lines(build, objective, student=kept | {"model": None, "config": "c.json"})
    assert "student.config = 'c.json' replaces student.teacher_layers" in line


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("alpha", "high", "objective.alpha = 'high': must be a number"),
        ("alpha", None, "objective.alpha = null: must be a number"),
        ("temperature", {"start": "x"}, "objective.temperature.start = 'x': must be a number"),
        ("temperature", {"end": 1}, "objective.temperature.start: required, but not set"),
        (
            "temperature",
            {"start": 1, "ends": 2},
            "objective.temperature.ends: unknown key; did you mean objective.temp",
        ),
        (
            "features",
            [{"weight": {"start": 1, "stairs": 0}}],
            "objective.features.0.weight.stairs = 0: must be at least 1",
        ),
    ],
)
def test_a_mistake_in_a_number_or_curve_is_told_once(build: Any, key: str, value: object, expected: str) -> None:
    (line,) = lines(build, {key: value})
    assert expected in line
