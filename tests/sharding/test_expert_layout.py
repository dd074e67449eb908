"""Mixture-of-experts folders as the hub has them: one tensor per expert outside, one stacked tensor inside."""

import pytest
import torch
from moe_models import FAMILIES, save_moe
from safetensors.torch import load_file, save_file
from sharding_jobs import exported, loaded_weights, two_of_an_unknown_family
from transformers import AutoConfig, AutoModelForCausalLM

from largekd.errors import ConfigError
from largekd.sharding.layout import Layout
from largekd.sharding.stream import StoredModel


def test_one_tensor_per_expert_becomes_a_stack(two_ranks, tmp_path):
    folder = save_moe(tmp_path, "mixtral", seed=1)
    stored = load_file(folder / "model.safetensors")
    layer = "model.layers.1.block_sparse_moe"
    expected = torch.stack(
        [
            torch.cat([stored[f"{layer}.experts.{e}.w1.weight"], stored[f"{layer}.experts.{e}.w3.weight"]])
            for e in range(4)
        ]
    )
    for result in two_ranks.run(loaded_weights, folder=str(folder)):
        assert torch.equal(result["weights"]["model.layers.1.mlp.experts.gate_up_proj"], expected)
        assert torch.equal(result["weights"]["model.layers.1.mlp.gate.weight"], stored[f"{layer}.gate.weight"])
        assert result["unused"] == ()


def test_a_rank_reads_only_the_experts_of_its_shard(tmp_path, monkeypatch):
    folder = save_moe(tmp_path, "qwen3_moe", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.mlp.experts.down_proj"
    with StoredModel(folder, module=model) as stored:
        read: list[str] = []
        plain = StoredModel._read
        monkeypatch.setattr(StoredModel, "_read", lambda self, part: (read.append(part), plain(self, part))[1])
        pieces = stored.pieces(name)
        assert read == []
        numel = pieces.shape.numel()
        parts = dict(pieces.span(numel // 2, numel))
        assert read == [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in (2, 3)]
        assert torch.equal(torch.cat(list(parts.values())), model.get_parameter(name).detach()[2:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_folders_load_and_ours_load_in_transformers(family, two_ranks, tmp_path):
    folder = save_moe(tmp_path / "theirs", family, seed=3)
    model, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "ours"
    two_ranks.run(exported, folder=str(folder), target=str(ours))
    back, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, model(ids).logits)
    theirs, stored = load_file(folder / "model.safetensors"), load_file(ours / "model.safetensors")
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[name], theirs[name]) for name in theirs)


def test_a_folder_with_stacked_experts_loads_too(two_ranks, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_moe(tmp_path / "hub", "mixtral", seed=2))
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    (result, _) = two_ranks.run(loaded_weights, folder=str(tmp_path / "stacked"))
    assert all(
        torch.equal(result["weights"][name], value)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    )


def test_a_missing_expert_is_named_by_its_layer(tmp_path):
    folder = save_moe(tmp_path, "mixtral", seed=1)
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*same tensors of every expert"):
        StoredModel(folder, module=model)


def test_dense_names_are_what_they_were(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for name, value in model.named_parameters():
        assert [stored for stored, _ in Layout(model).stored(name, value)] == [name]


def test_a_second_model_of_a_family_is_like_the_first(one_rank, tmp_path):
    """Classes that were first imported while ZeRO-3 partitions lost their decorators afterwards."""
    AutoConfig.for_model(
        "flex_olmo",
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_experts=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    ).save_pretrained(tmp_path)
    module = "transformers.models.flex_olmo.modeling_flex_olmo"
    assert one_rank.run(two_of_an_unknown_family, folder=str(tmp_path), module=module) == [[True, True]]
