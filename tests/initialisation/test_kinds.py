"""Students on which the teacher's weights would be another function are refused, and layers keep their kinds."""

import pytest
import torch
from families import family_config

from largekd.config.design import DesignConfig
from largekd.config.initialise import InitialiseConfig
from largekd.distillation.initialise import check_initialise
from largekd.errors import ConfigError
from largekd.initialisation.kinds import choose_layers, drops_head, layer_kinds
from largekd.planner.design import design_student

OTHER_VALUES = [
    ("llama", "rms_norm_eps", 1e-5, 1e-1),
    ("gpt_neox", "layer_norm_eps", 1e-5, 1e-3),
    ("granite", "residual_multiplier", 0.2, 1.0),
    ("granite", "attention_multiplier", 0.1, 1.0),
    ("granite", "embedding_multiplier", 12.0, 1.0),
    ("granite", "logits_scaling", 4.0, 1.0),
    ("cohere", "logit_scale", 0.25, 0.5),
    ("cohere", "use_qk_norm", True, False),
    ("gemma2", "query_pre_attn_scalar", 8, 256),
    ("gemma2", "attn_logit_softcapping", 50.0, None),
    ("gemma2", "final_logit_softcapping", 30.0, None),
    ("gemma2", "sliding_window", 8, 16),
    ("mistral", "sliding_window", 8, 16),
    ("olmoe", "clip_qkv", 8.0, None),
    ("qwen3_moe", "norm_topk_prob", True, False),
    ("olmoe", "norm_topk_prob", False, True),
    ("llama", "attention_bias", True, False),
    ("llama", "attention_bias", False, True),
    ("llama", "mlp_bias", True, False),
]


@pytest.mark.parametrize(("family", "key", "theirs", "ours"), OTHER_VALUES)
def test_a_value_that_the_weights_were_not_made_for_is_refused(family, key, theirs, ours):
    teacher = family_config(family, **{key: theirs})
    check_initialise(InitialiseConfig(), teacher=teacher, student=family_config(family, **{key: theirs}))
    with pytest.raises(ConfigError, match=rf"{key} .*teacher"):
        check_initialise(InitialiseConfig(), teacher=teacher, student=family_config(family, **{key: ours}))


def test_a_narrower_stream_may_have_the_epsilon_that_keeps_its_norms():
    teacher, student = (family_config("llama", rms_norm_eps=eps) for eps in (1e-6, 4e-6))
    check_initialise(InitialiseConfig(), teacher=teacher, student=student)


def kinds(pattern):
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in pattern]


def gemma(pattern):
    return family_config("gemma3_text", num_hidden_layers=len(pattern), layer_types=kinds(pattern))


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        # Even layers, where these are of the right kinds already.
        ("ssfssf", "sf", (0, 5)),
        ("ssssssss", "ssss", (0, 2, 5, 7)),
        # The even ones would be 0 3 6 9 and 0 2 4 7 9 11.
        ("sfsfsfsfsf", "sfsf", (0, 3, 6, 9)),
        ("sssssfsssssf", "sssssf", (0, 2, 4, 7, 9, 11)),
        ("sffs", "ss", (0, 3)),
        ("sfff", "sf", (0, 3)),
        ("fsss", "ff", None),
        ("sfsf", "fsfs", None),
        ("sf", "fs", None),
    ],
)
def test_uniform_layers_are_of_the_student_s_kinds(theirs, ours, expected):
    teacher, student = gemma(theirs), gemma(ours)
    if expected is None:
        with pytest.raises(ConfigError, match="in this order"):
            check_initialise(InitialiseConfig(), teacher=teacher, student=student)
        return
    check_initialise(InitialiseConfig(), teacher=teacher, student=student)
    assert choose_layers("uniform", teacher=teacher, student=student) == expected


def test_the_nearest_layers_of_a_kind_stand_in_for_even_ones():
    # The even ones, 0 2 5 7, are s s f f.
    assert choose_layers("uniform", teacher=gemma("sssfsfsf"), student=gemma("sfsf")) == (0, 3, 4, 7)


def test_what_a_rule_that_adapts_not_and_chosen_layers_would_mix_is_refused():
    teacher, student = gemma("sfsf"), gemma("fs")
    for rule in ("first", "first_last", (0, 1)):
        with pytest.raises(ConfigError, match=r"layer 0 of the student is full_attention and .*sliding_attention"):
            check_initialise(InitialiseConfig(layers=rule), teacher=teacher, student=student)
    check_initialise(InitialiseConfig(layers=(1, 2)), teacher=teacher, student=student)


def test_influential_layers_are_of_the_student_s_kinds():
    teacher, student = gemma("sfsfsf"), gemma("sfs")
    influence = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7])
    found = choose_layers("block_influence", teacher=teacher, student=student, influence_N=influence)
    assert found == (0, 1, 4)
    plain = choose_layers("block_influence", teacher=teacher, student=gemma("sff"), influence_N=influence)
    assert plain == (0, 1, 3)
    with pytest.raises(ConfigError, match="in this order"):
        check_initialise(InitialiseConfig(layers="block_influence"), teacher=teacher, student=gemma("ffff"))


def test_layers_that_turn_no_positions_and_layers_with_experts_are_kinds_of_their_own():
    teacher = family_config("smollm3", num_hidden_layers=8)
    flat = family_config("smollm3", num_hidden_layers=8, no_rope_layers=[1] * 8)
    with pytest.raises(ConfigError, match="in this order"):
        check_initialise(InitialiseConfig(), teacher=teacher, student=flat)
    mixed = family_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2)
    shorter = family_config("qwen3_moe", num_hidden_layers=3, decoder_sparse_step=2)
    layers = choose_layers("uniform", teacher=mixed, student=shorter)
    assert [layer_kinds(mixed, other=shorter)[layer] for layer in layers] == list(layer_kinds(shorter, other=mixed))
    assert layers == (0, 3, 4)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7, 9, 12, 13, 20, 25])
def test_every_depth_of_a_designed_student_has_layers_of_its_kinds(layers):
    teacher = family_config("gemma3_text", num_hidden_layers=26)
    made = design_student(teacher.to_dict(), design=DesignConfig(layers=layers))
    student = type(teacher)(**made.config)
    found = choose_layers("uniform", teacher=teacher, student=student)
    assert [teacher.layer_types[layer] for layer in found] == student.layer_types
    assert list(found) == sorted(set(found))


def test_a_head_that_is_dropped_is_known():
    untied, tied = (family_config("llama", tie_word_embeddings=flag) for flag in (False, True))
    assert drops_head(teacher=untied, student=tied)
    assert not any(drops_head(teacher=teacher, student=untied) for teacher in (untied, tied))
    assert not drops_head(teacher=tied, student=tied)
