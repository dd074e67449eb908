"""Pairs of layers: named, measured on two ranks, remembered; and the mistakes that are refused at build."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import layer_jobs
import pytest
import torch
from alignment_reference import aligned_rows
from tiny import save_tiny_llama

from largekd.contracts import Segment
from largekd.distillation import layers
from largekd.distillation.layers import LAYERS_FILE, decoder_shape, find_pairs
from largekd.errors import ConfigError
from largekd.models.decoder import Decoder
from largekd.objectives.alignment import Alignment
from largekd.objectives.terms import build_objective
from largekd.runtime.ranks import Ranks

KEPT = [0, 2, 4]
ADAPTIVE = {"map": "adaptive", "rows": 4}


def feature(**options: Any) -> dict[str, Any]:
    return {"alpha": 0.0, "features": [{"name": "hidden", **options}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A teacher of six layers of which 1, 3 and 5 do little, and a student that is a copy of the others."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "teacher", seed=1, layers=6, hidden=48)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            if index not in KEPT:
                layer.self_attn.o_proj.weight.mul_(0.3)
                layer.mlp.down_proj.weight.mul_(0.3)
    model.save_pretrained(folder / "teacher")
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in KEPT)
    model.config.num_hidden_layers = len(KEPT)
    model.save_pretrained(folder / "student")
    return {"teacher": str(folder / "teacher"), "student": str(folder / "student")}


def test_a_measured_map_finds_the_layers_that_a_student_was_copied_from(models, one_rank, two_ranks, tmp_path):
    objective = feature(layers=ADAPTIVE, projector={"kind": "none"})
    (alone,) = one_rank.run(layer_jobs.pairs_of, objective=objective, folder=str(tmp_path), **models)
    assert alone["pairs"] == {"hidden": list(enumerate(KEPT))}
    (tmp_path / LAYERS_FILE).unlink()
    for found in two_ranks.run(layer_jobs.pairs_of, objective=objective, folder=str(tmp_path), **models):
        assert found["pairs"] == alone["pairs"]
        torch.testing.assert_close(found["similarity"][0], alone["similarity"][0], rtol=1e-6, atol=1e-6)
        before, after = found["resident"]
        assert before == after and min(before) > 0
        assert found["training"] == alone["training"] == [True, True]
    assert float(alone["similarity"][0][0, 0]) == pytest.approx(1.0, abs=1e-6)
    assert float(alone["similarity"][0].max()) <= 1.0 + 1e-6
    assert json.loads((tmp_path / LAYERS_FILE).read_text()) == {"hidden": [[0, 0], [1, 2], [2, 4]]}


def test_what_was_measured_at_the_first_start_is_kept(models, two_ranks, tmp_path):
    objective = feature(layers=ADAPTIVE) | {"attention": [{"name": "maps", "layers": ADAPTIVE | {"count": 2}}]}
    first, _ = two_ranks.run(layer_jobs.pairs_of, objective=objective, folder=str(tmp_path), **models)
    # Both terms look at the same rows, which are measured once.
    assert len(first["similarity"]) == 1 and len(first["pairs"]["maps"]) == 2
    kept = first["pairs"] | {"hidden": [(0, 1), (1, 3), (2, 5)]}
    (tmp_path / LAYERS_FILE).write_text(json.dumps(kept))
    arguments = {"objective": objective, "folder": str(tmp_path), **models}
    for again in two_ranks.run(layer_jobs.pairs_of, resumed=True, **arguments):
        assert again["pairs"] == kept and again["similarity"] == []
    # Without a checkpoint the file may come from another configuration.
    for anew in two_ranks.run(layer_jobs.pairs_of, **arguments):
        assert anew["pairs"] == first["pairs"] and len(anew["similarity"]) == 1


def test_long_samples_are_measured_by_their_beginning(models, monkeypatch):
    (row,) = aligned_rows(count=1, packed=False)
    short = replace(row, segments=((Segment(0, 0, 9),),))
    decoders = {side: whole(name) for side, name in models.items()}
    expected = layers._measure(iter([short]), **decoders)
    assert not torch.allclose(layers._measure(iter([row]), **decoders), expected)
    monkeypatch.setattr(layers, "_MEASURED_POSITIONS", 9)
    torch.testing.assert_close(layers._measure(iter([row]), **decoders), expected)


def test_forwards_without_an_engine_are_those_of_an_engine(models, two_ranks):
    for found in two_ranks.run(layer_jobs.forwards, teacher=models["teacher"]):
        assert len(found["outputs"]) == 2
        for mine, theirs in zip(found["outputs"], found["expected"], strict=True):
            assert set(mine) == {
                "last",
                "hidden.0",
                "hidden.2",
                *(f"attention.1.{n}" for n in ("query", "key", "value")),
            }
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        before, after = found["resident"]
        assert before == after and found["hooks"] == 0


def whole(name: str) -> Decoder:
    from transformers import AutoModelForCausalLM

    return Decoder(model=AutoModelForCausalLM.from_pretrained(name))


def build(models: dict[str, str], objective: dict[str, Any], *, folder: Path) -> Alignment:
    """What the builder does between loading the models and building the engines."""
    decoders = {side: whole(name) for side, name in models.items()}
    config = layer_jobs.configured(objective)
    parsed = build_objective(config.objective)
    pairs = find_pairs(parsed, config=config, rows=lambda _: iter(()), folder=folder, ranks=Ranks(), **decoders)
    shapes = {
        side: decoder_shape(decoder, side=side, pairs=pairs, objective=parsed) for side, decoder in decoders.items()
    }
    return Alignment(parsed, pairs=pairs, **shapes)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            feature(layers={"map": "explicit", "pairs": [[0, 0], [1, 6]]}),
            r"objective\.features\.hidden\.layers\.pairs\.1 = \[1, 6\]: 6 is no layer of the teacher, which has 6",
        ),
        (
            feature(layers={"map": "explicit", "pairs": [[-4, 0]]}),
            r"objective\.features\.hidden\.layers\.pairs\.0 = \[-4, 0\]: -4 is no layer of the student, which has 3",
        ),
        (
            feature(layers={"map": "uniform", "count": 4}),
            r"objective\.features\.hidden\.layers\.count = 4: the student has 3 layers",
        ),
        (
            feature(layers={"map": "last", "count": 2}, sample_pairs=3),
            r"objective\.features\.hidden\.sample_pairs = 3: the layer map has 2 pairs",
        ),
        (
            {"alpha": 0.0, "attention": [{"name": "maps", "layers": {"map": "last", "count": 1}, "sample_pairs": 2}]},
            r"objective\.attention\.maps\.sample_pairs = 2: the layer map has 1 pairs",
        ),
    ],
)
def test_layers_that_do_not_exist_and_too_many_draws_are_refused(models, tmp_path, objective, message):
    with pytest.raises(ConfigError, match=message):
        build(models, objective, folder=tmp_path)
    assert not (tmp_path / LAYERS_FILE).exists()


def maps(**options: Any) -> dict[str, Any]:
    return {"alpha": 0.0, "attention": [{"name": "maps", "layers": {"map": "last", "count": 1}, **options}]}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            feature(projector={"kind": "none"}),
            r"features\.hidden\.projector\.kind = none: the student's states are 36 wide and the teacher's 48",
        ),
        (
            feature(projector={"kind": "low_rank_identity", "rank": 37}),
            r"objective\.features\.hidden\.projector\.rank = 37: .* a rank of at most 36",
        ),
        (
            maps(match_heads="group"),
            r"objective\.attention\.maps\.match_heads is 'group', but the student has 3 heads and the teacher 4",
        ),
        (maps(match_heads="repeat"), r"match_heads is 'repeat', but the student has 3 heads and the teacher 4"),
        (
            maps(loss="relation", relation_heads=8),
            r"objective\.attention\.maps\.relation_heads is 8, which does not divide the student's width 36",
        ),
    ],
)
def test_sizes_that_cannot_be_compared_are_refused_at_build(models, odd_models, tmp_path, objective, message):
    with pytest.raises(ConfigError, match=message):
        build(odd_models, objective, folder=tmp_path)
    # With the sizes of the copied student all of it is fine.
    if "rank" not in message:
        assert list(build(models, objective, folder=tmp_path).terms)


@pytest.fixture(scope="module")
def odd_models(models, tmp_path_factory) -> dict[str, str]:
    """A student of three heads of width 12."""
    folder = tmp_path_factory.mktemp("odd") / "student"
    return models | {"student": str(save_tiny_llama(folder, seed=3, hidden=36, heads=3, key_heads=3))}


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("keys",), "the name 'keys'.*choose another name"),
        (("half",), "the name 'half'.*choose another name"),
        (("a.b", "a_b"), r"features\.1\.name = 'a_b'.*names must differ"),
        (("a.b", "values_2"), None),
    ],
)
def test_names_that_a_module_cannot_have_are_refused(models, tmp_path, names, refused):
    objective = {"alpha": 0.0, "features": [{"name": name, "layers": {"map": "last"}} for name in names]}
    if refused is None:
        terms = build(models, objective, folder=tmp_path).terms
        assert list(terms) == ["a_b", "values_2"]
    else:
        with pytest.raises(ConfigError, match=refused):
            build(models, objective, folder=tmp_path)


def test_a_pooled_match_takes_any_two_head_counts(odd_models, tmp_path):
    alignment = build(odd_models, maps(match_heads="pool", head_importance="learned"), folder=tmp_path)
    assert alignment.terms["maps"].head_weights.logits_PH.shape == (1, 3)


def test_the_map_of_kept_layers_needs_them(models, tmp_path):
    objective = feature(layers={"map": "closest_non_pruned"})
    with pytest.raises(ConfigError, match=r"closest_non_pruned.*set student\.teacher_layers"):
        layer_jobs.configured(objective)
    config = layer_jobs.configured(objective, teacher_layers=KEPT)
    decoders = {side: whole(name) for side, name in models.items()}
    found = find_pairs(
        build_objective(config.objective),
        config=config,
        rows=lambda _: iter(()),
        folder=tmp_path,
        ranks=Ranks(),
        kept=KEPT,
        **decoders,
    )
    # Ties go to the deeper of two kept layers.
    assert found == {"hidden": ((0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (2, 5))}
