"""Pruning by activations drops what is dead, keeps the function then, and refuses what it cannot choose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_jobs import student_weights
from families import family_config
from pool import RankPool
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.config.initialise import InitialiseConfig
from largekd.distillation.initialise import check_initialise
from largekd.errors import ConfigError
from largekd.initialisation.importance import importance_maps, important_heads, most_important
from largekd.initialisation.sizes import Sizes
from largekd.initialisation.statistics import Statistics

DEAD_UNITS = (1, 2, 9, 17, 20, 26, 30, 31)
DEAD_NEURONS = {0: (0, 5, 40, 41), 1: (3, 20, 21, 63), 2: (7, 8, 9, 10)}
DEAD_GROUPS = {0: 0, 1: 1, 2: 1}
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def planted(folder: Path, *, model_type: str, tied: bool) -> Path:
    """A teacher of random weights with hidden units, neurons and key heads that never carry anything."""
    torch.manual_seed(0)
    # Norms add epsilon to a mean, which is over fewer entries in the student; here it must not matter.
    config = AutoConfig.for_model(model_type, **{**SHAPE, "rms_norm_eps": 1e-10}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
        model.get_input_embeddings().weight[:, list(DEAD_UNITS)] = 0
        for place, layer in enumerate(model.model.layers):
            for end in (layer.self_attn.o_proj, layer.mlp.down_proj):
                end.weight[list(DEAD_UNITS)] = 0
            layer.mlp.gate_proj.weight[list(DEAD_NEURONS[place])] = 0
            dead = slice(8 * DEAD_GROUPS[place], 8 * DEAD_GROUPS[place] + 8)
            layer.self_attn.v_proj.weight[dead] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[dead] = 0
    model.save_pretrained(folder)
    return folder


def smaller(folder: Path, *, source: Path, **changes: Any) -> Path:
    """A folder with the source's configuration under other sizes."""
    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return folder


def logits(folder: Path, *, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Logits of three rows, by the folder's own weights or by `weights`."""
    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
        missing, unknown = model.load_state_dict(weights, strict=False)
        assert not unknown
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
    with torch.no_grad():
        found: Tensor = model.eval()(torch.randint(3, 101, (3, 20), generator=torch.Generator().manual_seed(5))).logits
    return found


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_a_teacher_with_dead_parts_is_preserved(
    one_rank: RankPool, tmp_path: Path, model_type: str, tied: bool
) -> None:
    source = planted(tmp_path / "teacher", model_type=model_type, tied=tied)
    sizes = {"hidden_size": 24, "intermediate_size": 60, "num_attention_heads": 2, "num_key_value_heads": 1}
    target = smaller(tmp_path / "student", source=source, **sizes)
    job = {"teacher": str(source), "config": str(target), "rule": "importance", "layers": [0, 1, 2]}
    [(weights, _)] = one_rank.run(student_weights, **job)
    teacher = AutoModelForCausalLM.from_pretrained(source).state_dict()
    units = [unit for unit in range(32) if unit not in DEAD_UNITS]
    embedding = "model.embed_tokens.weight"
    assert torch.equal(weights[embedding], teacher[embedding][:, units])
    for layer, dead in DEAD_NEURONS.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        neurons = [neuron for neuron in range(64) if neuron not in dead]
        torch.testing.assert_close(weights[name], teacher[name][units][:, neurons], rtol=0, atol=0)
    torch.testing.assert_close(logits(target, weights=weights), logits(source), rtol=1e-5, atol=1e-5)


def test_two_ranks_choose_and_copy_what_one_does(one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    source = planted(tmp_path / "teacher", model_type="llama", tied=True)
    target = smaller(
        tmp_path / "student", source=source, hidden_size=20, intermediate_size=40, num_attention_heads=2,
        num_hidden_layers=2,
    )  # fmt: skip
    job = {"teacher": str(source), "config": str(target), "rule": "importance", "layers": [0, 2]}
    [(alone, report)] = one_rank.run(student_weights, **job)
    for weights, other in two_ranks.run(student_weights, **job):
        assert weights.keys() == alone.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=0, msg=name)
        # Gains are numbers in words, and equal in the digits that are printed.
        assert other == report
    assert sorted(entry["name"] for entry in report["tensors"]) == sorted(alone)


def test_the_greatest_are_kept_in_their_order() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0])
    assert most_important(scores, keep=3, role="ffn").tolist() == [1, 2, 3]
    assert most_important(scores, keep=1, role="ffn").tolist() == [1]
    with pytest.raises(ConfigError, match="'ffn', the teacher only 5"):
        most_important(scores, keep=6, role="ffn")


def test_queries_stay_with_their_keys() -> None:
    scores = torch.tensor([5.0, 0.0, 0.0, 4.0, 4.0, 4.0, 1.0, 1.0, 9.0])
    heads, groups = important_heads(scores, teacher_groups=3, heads=4, groups=2)
    assert groups.index_N.tolist() == [1, 2]
    assert heads.tolist() == [3, 4, 6, 8]
    heads, groups = important_heads(scores, teacher_groups=3, heads=3, groups=3)
    assert groups.index_N.tolist() == [0, 1, 2]
    assert heads.tolist() == [0, 3, 8]


def test_more_queries_on_a_key_come_from_neighbours_whose_keys_are_averaged() -> None:
    scores = torch.tensor([5.0, 0.0, 0.0, 4.0, 4.0, 4.0, 1.0, 1.0, 9.0])
    # Of three key heads with three queries each, two in one window; a third stands alone and is left out.
    heads, keys = important_heads(scores, teacher_groups=3, heads=4, groups=1)
    assert heads.tolist() == [0, 3, 4, 5]
    assert keys.matrix_NM.tolist() == [[0.5, 0.5, 0]]
    # Two windows of two must overlap.
    heads, keys = important_heads(scores, teacher_groups=3, heads=8, groups=2)
    assert heads.tolist() == [0, 3, 4, 5, 3, 4, 5, 8]
    assert keys.matrix_NM.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    # The window of the greatest sum is chosen.
    heads, keys = important_heads(torch.tensor([0.0, 1, 2, 3]), teacher_groups=4, heads=2, groups=1)
    assert heads.tolist() == [2, 3] and keys.matrix_NM.tolist() == [[0, 0, 0.5, 0.5]]


@pytest.mark.parametrize("rule", ["importance", "pca"])
def test_what_cannot_be_chosen_is_refused_before_the_teacher_is_measured(rule: str) -> None:
    teacher = family_config("llama", tie_word_embeddings=False)
    config = InitialiseConfig(width=rule)
    for heads, keys in ((4, 1), (2, 1), (2, 2)):
        student = family_config("llama", tie_word_embeddings=False, num_attention_heads=heads, num_key_value_heads=keys)
        check_initialise(config, teacher=teacher, student=student)
    repeated = family_config("llama", tie_word_embeddings=False, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="4 query heads on 4 key heads, which cannot be chosen"):
        check_initialise(config, teacher=teacher, student=repeated)
    check_initialise(InitialiseConfig(), teacher=teacher, student=repeated)


def test_narrower_experts_are_refused_before_the_teacher_is_measured() -> None:
    teacher, student = family_config("mixtral"), family_config("mixtral", intermediate_size=24)
    with pytest.raises(ConfigError, match="experts have no activations in common"):
        check_initialise(InitialiseConfig(width="importance"), teacher=teacher, student=student)
    check_initialise(InitialiseConfig(width="truncate"), teacher=teacher, student=student)


def test_a_layer_without_one_mlp_is_refused() -> None:
    sizes = Sizes(layers=1, width=4, ffn=6, heads=2, kv_heads=1, vocabulary=9, head_dim=2)
    narrow = Sizes(layers=1, width=4, ffn=3, heads=2, kv_heads=1, vocabulary=9, head_dim=2)
    statistics = Statistics(
        positions=1.0,
        units_D=torch.ones(4),
        energy_D=torch.ones(4),
        neurons_NF=(None,),
        heads_NH=(torch.ones(2),),
        influence_N=torch.zeros(1),
    )
    with pytest.raises(ConfigError, match="layer 0 of the teacher has no one MLP"):
        importance_maps(statistics, layers=[0], teacher=sizes, student=narrow)
    assert not importance_maps(statistics, layers=[0], teacher=sizes, student=sizes).ffn
