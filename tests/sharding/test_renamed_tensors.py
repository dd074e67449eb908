"""Folders whose tensors have other names than the model's: GPT-NeoX keeps its head as `embed_out`."""

import pytest
import torch
from safetensors.torch import load_file
from sharding_jobs import exported, loaded_weights
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(scope="module")
def neox():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("original", [True, False])
def test_a_head_of_another_name_is_loaded(neox, original, two_ranks, tmp_path):
    neox.save_pretrained(tmp_path, save_original_format=original)
    assert ("embed_out.weight" in load_file(tmp_path / "model.safetensors")) == original
    for result in two_ranks.run(loaded_weights, folder=str(tmp_path)):
        assert result["unused"] == ()
        assert result["weights"].keys() == dict(neox.named_parameters()).keys()
        for name, value in neox.named_parameters():
            assert torch.equal(result["weights"][name], value), name


def test_some_layers_keep_the_head(neox, two_ranks, tmp_path):
    neox.save_pretrained(tmp_path)
    (found, _) = two_ranks.run(loaded_weights, folder=str(tmp_path), layers=[0, 2])
    theirs = neox.state_dict()
    assert torch.equal(found["weights"]["lm_head.weight"], theirs["lm_head.weight"])
    ours, expected = (f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight" for layer in (1, 2))
    assert torch.equal(found["weights"][ours], theirs[expected])


def test_an_export_has_the_family_s_names(neox, two_ranks, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    neox.save_pretrained(theirs)
    two_ranks.run(exported, folder=str(theirs), target=str(ours))
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert after.keys() == before.keys()
    assert "embed_out.weight" in after
    assert all(torch.equal(after[name], before[name]) for name in before)
    back, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, neox(ids).logits)
