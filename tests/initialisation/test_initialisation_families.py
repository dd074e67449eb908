"""A student of the teacher's shape is the teacher; a narrower one has its own shapes and finite logits."""

import pytest
import torch
from families import FAMILIES, build, family_config, logits, narrow, save
from safetensors.torch import load_file

from largekd.initialisation.axes import Select, StudentMaps
from largekd.initialisation.derive import derivations
from largekd.initialisation.fill import fill_from
from largekd.initialisation.sizes import sizes_of
from largekd.initialisation.width import plain_maps

# Weight of a norm behind attention or MLP that lets nothing through.
BEHIND = {"gemma2": -1.0, "gemma3_text": -1.0, "olmo2": 0.0}
DEAD_UNITS = [
    ("llama", True),
    ("llama", False),
    ("qwen3", False),
    ("gemma", True),
    ("gemma2", True),
    ("gemma3_text", True),
    ("olmo2", False),
]


def filled(teacher, folder, *, config, maps=None, even=False, gain=0.5):
    student = build(config, seed=7)
    maps = maps or plain_maps(
        teacher=sizes_of(teacher.config),
        student=sizes_of(config),
        layers=range(config.num_hidden_layers),
        even=even,
        gain=gain,
    )
    made = derivations(student, maps=maps, teacher_config=teacher.config, seed=0)
    report = fill_from(student, derivations=made, folder=folder, rank=0, seed=0)
    return student, report


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_the_same_shape_is_the_teacher_bit_for_bit(family, tmp_path):
    teacher = build(family_config(family), seed=1)
    student, report = filled(teacher, save(teacher, tmp_path), config=family_config(family))
    weights = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.equal(logits(student), logits(teacher))
    assert [entry.name for entry in report.entries] == list(weights)
    assert report.copied_frac == 1.0
    assert {entry.how for entry in report.entries} == {"copied"}


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_folders_of_transformers_with_other_names_are_read(family, tmp_path):
    teacher = build(family_config(family), seed=1)
    teacher.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - dict(teacher.named_parameters()).keys()
    student, report = filled(teacher, tmp_path, config=family_config(family))
    assert torch.equal(logits(student), logits(teacher))
    assert report.copied_frac == 1.0


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_student_has_its_shapes_and_finite_logits(family, even, tmp_path):
    teacher = build(family_config(family), seed=1)
    config = family_config(family, **narrow(family))
    student, report = filled(teacher, save(teacher, tmp_path), config=config, even=even)
    found = logits(student)
    assert found.isfinite().all() and found.std() > 1e-3
    assert sorted(entry.name for entry in report.entries) == sorted(dict(student.named_parameters()))
    assert all(entry.how != "drawn" for entry in report.entries)
    untouched = build(config, seed=7)
    for (name, new), old in zip(student.named_parameters(), untouched.parameters(), strict=True):
        assert not torch.equal(new, old), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "granite", "olmo2", "gemma2"])
def test_dropping_dead_neurons_and_heads_keeps_the_function(family, tmp_path):
    """What is dropped is not the end of an axis, so that each fused or interleaved projection is cut where it must."""
    teacher = build(family_config(family), seed=1)
    kept_ffn = torch.tensor([n for n in range(48) if n % 2])
    # The second key head of two, and its two query heads.
    heads, kv_heads = ([1, 2], None) if family == "gpt_neox" else ([2, 3], [1])
    names = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in names.items():
            if name.endswith(("down_proj.weight", "dense_4h_to_h.weight")):
                parameter[:, torch.arange(0, 48, 2)] = 0
            if name.endswith(("o_proj.weight", "attention.dense.weight")):
                dead = [head for head in range(4) if head not in heads]
                parameter.unflatten(1, (4, 8))[:, dead] = 0
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    layers = range(3)
    maps = StudentMaps(
        layers=tuple(layers),
        ffn=dict.fromkeys(layers, Select(kept_ffn)),
        heads=dict.fromkeys(layers, Select(torch.tensor(heads))),
        kv_heads={} if kv_heads is None else dict.fromkeys(layers, Select(torch.tensor(kv_heads))),
    )
    if family == "gpt_neox":
        # A head's size follows from the width there, so heads stay.
        maps, changes = StudentMaps(layers=tuple(layers), ffn=maps.ffn), {"intermediate_size": 24}
    if family == "olmo2":
        # Its query norm spans all heads, dead or not.
        maps, changes = StudentMaps(layers=tuple(layers), ffn=maps.ffn), {"intermediate_size": 24}
    student, report = filled(teacher, save(teacher, tmp_path), config=family_config(family, **changes), maps=maps)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert report.copied_frac == 1.0


@pytest.mark.parametrize(("family", "tied"), DEAD_UNITS)
def test_dropping_dead_hidden_units_keeps_the_function_with_the_root_gain(family, tied, tmp_path):
    """A norm over fewer units divides by less; the gain of one half, and Gemma's embedding factor, give it back."""
    teacher = build(family_config(family, tie_word_embeddings=tied), seed=1)
    kept = torch.arange(0, 32, 2)
    dead = torch.arange(1, 32, 2)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "embed_tokens" in name:
                parameter[:, dead] = 0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[dead] = 0
            if "post_" in name and family in BEHIND:
                parameter[dead] = BEHIND[family]
    root = 2**0.5
    maps = StudentMaps(layers=(0, 1, 2), width=Select(kept), gains={"width": root})
    config = family_config(family, hidden_size=16, tie_word_embeddings=tied, rms_norm_eps=1e-12)
    teacher.config.rms_norm_eps = 1e-12
    for module in teacher.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-12)
    student, _ = filled(teacher, save(teacher, tmp_path), config=config, maps=maps)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)
