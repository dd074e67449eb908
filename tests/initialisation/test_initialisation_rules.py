"""Which layers, entries and heads the rules take, and what they refuse."""

import json

import pytest
import torch
from families import FAMILIES, build, family_config, save
from tiny_run import settings

from largekd.config.initialise import InitialiseConfig
from largekd.config.load import parse_config
from largekd.distillation.initialise import check_initialise
from largekd.errors import ConfigError
from largekd.initialisation import axes, fill
from largekd.initialisation.axes import Mix, Select, StudentMaps
from largekd.initialisation.derive import derivations
from largekd.initialisation.fill import fill_from
from largekd.initialisation.layers import LAYER_RULES, check_depth
from largekd.initialisation.roles import axes_of
from largekd.initialisation.sizes import Sizes, sizes_of
from largekd.initialisation.width import head_maps, interpolated, plain_maps, truncated


def sizes(**changes):
    base = {"layers": 4, "width": 8, "ffn": 16, "heads": 8, "kv_heads": 4, "vocabulary": 20, "head_dim": 2}
    return Sizes(**(base | changes))


@pytest.mark.parametrize(
    ("rule", "count", "expected"),
    [
        ("uniform", 10, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        ("uniform", 1, (0,)),
        ("uniform", 2, (0, 29)),
        ("uniform", 30, tuple(range(30))),
        ("first", 3, (0, 1, 2)),
        ("first_last", 5, (0, 1, 2, 28, 29)),
        ("first_last", 1, (0,)),
    ],
)
def test_layer_rules(rule, count, expected):
    assert LAYER_RULES[rule](count, depth=30) == expected


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_and_blends_are_products_with_their_matrix(monkeypatch, dim, dtype):
    torch.manual_seed(0)
    value = torch.randn(5, 5, 5).to(dtype)
    blend, matrix = interpolated(5, 3), torch.randn(3, 5)
    of_blend = torch.zeros(3, 5)
    for row, (below, above, share) in enumerate(zip(blend.below_N, blend.above_N, blend.share_N, strict=True)):
        of_blend[row, below] += 1 - share
        of_blend[row, above] += share
    for map_, by in ((blend, of_blend), (Mix(matrix), matrix)):
        expected = torch.tensordot(by, value.float(), dims=([1], [dim])).movedim(0, dim).to(dtype)
        torch.testing.assert_close(map_.apply(value, dim=dim), expected)
        # A few rows at a time.
        monkeypatch.setattr(axes, "_PART", 15)
        torch.testing.assert_close(map_.apply(value, dim=dim), expected)


@pytest.mark.parametrize("rule", sorted(LAYER_RULES))
def test_every_rule_takes_as_many_different_layers_as_it_is_asked_for(rule):
    for depth in range(1, 14):
        for count in range(1, depth + 1):
            layers = LAYER_RULES[rule](count, depth=depth)
            assert len(layers) == count and list(layers) == sorted(set(layers))
            assert layers[0] >= 0 and layers[-1] < depth


def test_truncation_and_resampling_of_an_axis():
    old = torch.arange(7.0)[None]
    assert truncated(7, 4).apply(old, dim=1).tolist() == [[0, 1, 2, 3]]
    assert interpolated(7, 4).apply(old, dim=1).tolist() == [[0, 2, 4, 6]]
    torch.testing.assert_close(interpolated(7, 5).apply(old.T, dim=0), torch.tensor([[0, 1.5, 3, 4.5, 6]]).T)
    assert interpolated(7, 1).apply(old, dim=1).tolist() == [[0]]
    torch.testing.assert_close(interpolated(9, 4).apply(torch.ones(2, 9, 3), dim=1), torch.ones(2, 4, 3))
    same = interpolated(6, 6)
    assert torch.equal(same.apply(torch.eye(6), dim=0), torch.eye(6))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "even", "queries", "keys"),
    [
        # Two queries on each key head stay two: the first key heads with theirs, or spread ones.
        (4, 2, False, [0, 1, 2, 3], [0, 1]),
        (4, 2, True, [0, 1, 6, 7], [0, 3]),
        # One query on each: the first of each pair.
        (4, 4, False, [0, 2, 4, 6], [0, 1, 2, 3]),
        (2, 2, True, [0, 6], [0, 3]),
        # Four on each: pairs of key heads are averaged.
        (8, 2, False, [0, 1, 2, 3, 4, 5, 6, 7], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (4, 1, False, [0, 1, 2, 3], [[0.5, 0.5, 0, 0]]),
        # More key heads: each is repeated and its queries are dealt out.
        (8, 8, False, [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_queries_follow_their_key_head(heads, kv_heads, even, queries, keys):
    query_map, key_map = head_maps(teacher=sizes(), student=sizes(heads=heads, kv_heads=kv_heads), even=even)
    assert query_map.index_N.tolist() == queries
    found = key_map.index_N if isinstance(key_map, Select) else key_map.matrix_NM
    assert found.tolist() == keys
    # The key head that a kept query looks at is, or holds, the one that it looked at before.
    for place, query in enumerate(queries):
        group = place // (heads // kv_heads)
        row = keys[group] if isinstance(key_map, Mix) else [float(keys[group] == key) for key in range(4)]
        assert row[query // 2] > 0


def test_gains_are_powers_of_the_ratio_of_lengths():
    student = sizes(width=2, ffn=4)
    assert plain_maps(teacher=sizes(), student=student, layers=[0], even=False, gain=0.5).gains == {
        "width": 2,
        "ffn": 2,
    }
    assert plain_maps(teacher=sizes(), student=student, layers=[0], even=True, gain=1).gains == {"width": 4, "ffn": 4}


def test_more_key_heads_keep_the_function(tmp_path):
    """Repeating the key heads of grouped attention gives full attention."""
    from families import logits

    teacher = build(family_config("llama"), seed=1)
    student = build(family_config("llama", num_key_value_heads=4), seed=2)
    maps = plain_maps(
        teacher=sizes(width=32, ffn=48, heads=4, kv_heads=2, vocabulary=67, head_dim=8),
        student=sizes(width=32, ffn=48, heads=4, kv_heads=4, vocabulary=67, head_dim=8),
        layers=range(3),
        even=False,
        gain=0.5,
    )
    made = derivations(student, maps=maps, teacher_config=teacher.config, seed=0)
    fill_from(student, derivations=made, folder=save(teacher, tmp_path), rank=0, seed=0)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [(False, True), (True, False)])
def test_a_head_that_is_tied_on_one_side_alone(ours, theirs, tmp_path):
    teacher = build(family_config("llama", tie_word_embeddings=theirs), seed=1)
    student = build(family_config("llama", tie_word_embeddings=ours), seed=2)
    made = derivations(student, maps=StudentMaps(layers=(0, 1, 2)), teacher_config=teacher.config, seed=0)
    fill_from(student, derivations=made, folder=save(teacher, tmp_path), rank=0, seed=0)
    embedding = teacher.get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, embedding)
    assert torch.equal(student.get_output_embeddings().weight, embedding)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_a_rule_with_as_many_dimensions(family):
    model = build(family_config(family), seed=0)
    for name, parameter in model.named_parameters():
        path = "gpt_neox.layers" if family == "gpt_neox" else "model.layers"
        axes = axes_of(name, model_type=family, layers_path=path)
        assert axes is not None and len(axes) == parameter.ndim, name


def test_a_parameter_without_a_rule_is_named():
    model = build(family_config("llama"), seed=0)
    model.model.layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.extra\.weight"):
        derivations(model, maps=StudentMaps(layers=(0, 1, 2)), teacher_config=model.config, seed=0)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    teacher = build(family_config("llama"), seed=0)
    student = build(family_config("llama", intermediate_size=24), seed=0)
    made = derivations(student, maps=StudentMaps(layers=(0, 1, 2)), teacher_config=teacher.config, seed=0)
    with pytest.raises(ConfigError, match=r"gate_proj\.weight' must have shape \(24, 32\).*\(48, 32\)"):
        fill_from(student, derivations=made, folder=save(teacher, tmp_path), rank=0, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "4 layers and the teacher 3"),
        ({"hidden_size": 40}, "hidden_size = 40, the teacher 32"),
        ({"intermediate_size": 64}, "intermediate_size = 64"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8"),
        ({"head_dim": 4}, "head_dim = 8"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"vocab_size": 68}, "vocab_size = 68"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "turns positions otherwise"),
    ],
)
def test_shapes_that_cannot_be_made_of_the_teacher_s(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_initialise(InitialiseConfig(), teacher=family_config("llama"), student=family_config("llama", **changes))


def test_another_family_and_key_heads_that_do_not_map_are_refused():
    with pytest.raises(ConfigError, match="'qwen3' student cannot be made of a 'llama' teacher"):
        check_initialise(InitialiseConfig(), teacher=family_config("llama"), student=family_config("qwen3"))
    with pytest.raises(ConfigError, match="more key heads must be a multiple"):
        head_maps(teacher=sizes(heads=6, kv_heads=2), student=sizes(heads=6, kv_heads=3), even=False)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((0, 1), "2 layers, but the student has 3"), ((0, 1, 4), "4 is not one"), ((0, 1, -1), "-1 is not one")],
)
def test_layers_that_do_not_exist(layers, message):
    with pytest.raises(ConfigError, match=message):
        check_depth(3, depth=4, chosen=layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__teacher_layers": [0]}, "student.initialise.layers"),
        ({"student__model": "somewhere"}, "has weights of its own"),
        ({"student__config": None}, "set one of them"),
        ({"student__initialise": {"layers": [-1]}}, r"student\.initialise\.layers = \[-1\]"),
        ({"teacher": {"kind": "cached", "path": "cache"}}, "a cache has no weights"),
    ],
)
def test_keys_that_contradict_each_other(changes, message, tmp_path):
    base = {"student__initialise": {}, "student__config": "student.json", "student__teacher_layers": None}
    tree = settings(tmp_path, tmp_path / "run", **(base | changes))
    with pytest.raises(ConfigError, match=message):
        parse_config(json.loads(json.dumps(tree)))


def test_a_head_that_is_the_embedding_is_not_drawn(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(fill, "_draw", lambda _model, module, *, seed: drawn.append(type(module).__name__))
    for tied, expected in ((True, ["Linear"]), (False, ["Linear", "Linear"])):
        config = family_config("llama", tie_word_embeddings=tied)
        teacher, student = build(config, seed=1), build(config, seed=2)
        maps = plain_maps(teacher=sizes_of(config), student=sizes_of(config), layers=range(3), even=False, gain=0)
        given = {name: None for name in ("model.layers.1.mlp.up_proj.weight", *([] if tied else ["lm_head.weight"]))}
        made = derivations(student, maps=maps, teacher_config=config, seed=0, given=given)
        fill_from(student, derivations=made, folder=save(teacher, tmp_path / str(tied)), rank=0, seed=0)
        assert drawn == expected
        drawn.clear()
