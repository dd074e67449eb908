"""Checkpoints stream into shards: the right values, in the right place, without a whole copy on any rank."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharding_jobs import hidden_and_residency, loaded_weights, loading_peak, random_weights
from tiny import join_rows, make_rows, save_tiny_llama

from largekd.errors import ConfigError
from largekd.models.build import config_with_layers
from largekd.models.source import find_model, read_config
from largekd.sharding.stream import tensor_files


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("loading") / "teacher", seed=5, layers=4))


def test_every_parameter_arrives(teacher, two_ranks):
    expected = load_file(f"{teacher}/model.safetensors")
    for result in two_ranks.run(loaded_weights, folder=teacher):
        assert result["weights"].keys() == expected.keys()
        assert all(torch.equal(result["weights"][name], expected[name]) for name in expected)
        assert result["unused"] == ()


def test_layers_of_the_teacher_in_the_order_asked_for(teacher, two_ranks):
    expected = load_file(f"{teacher}/model.safetensors")
    (result, _) = two_ranks.run(loaded_weights, folder=teacher, layers=[3, 1])
    weights = result["weights"]
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], expected["model.layers.3.mlp.up_proj.weight"])
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], expected["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert "model.layers.2.mlp.up_proj.weight" not in weights


def test_shards_in_several_files_and_without_prefix(teacher, two_ranks, tmp_path):
    tensors = load_file(f"{teacher}/model.safetensors")
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "config.json").write_text(Path(teacher, "config.json").read_text())
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    halves = [dict(list(bare.items())[::2]), dict(list(bare.items())[1::2])]
    for index, half in enumerate(halves):
        save_file(half, folder / f"part-{index}.safetensors")
    index = {name: f"part-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (result, _) = two_ranks.run(loaded_weights, folder=str(folder))
    assert all(torch.equal(result["weights"][name], tensors[name]) for name in tensors)


def test_random_initialisation_depends_on_the_seed_and_not_on_the_ranks(teacher, one_rank, two_ranks):
    (alone,) = one_rank.run(random_weights, folder=teacher, seed=3)
    for other in two_ranks.run(random_weights, folder=teacher, seed=3):
        assert all(torch.equal(alone[name], other[name]) for name in alone)
    (different,) = one_rank.run(random_weights, folder=teacher, seed=4)
    assert not torch.equal(alone["model.embed_tokens.weight"], different["model.embed_tokens.weight"])
    assert alone["model.embed_tokens.weight"].std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(alone["model.norm.weight"], torch.ones(32))


def test_forward_is_that_of_plain_transformers_and_shards_stay_shards(teacher, two_ranks):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    batch = join_rows(make_rows(count=2, packed=True))
    # With a cache, transformers does not look for packed segments and lets them see each other.
    with torch.no_grad():
        expected = model.model(**batch.model_inputs, use_cache=False).last_hidden_state
        contaminated = model.model(**batch.model_inputs, use_cache=True).last_hidden_state
    whole_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    for result in two_ranks.run(hidden_and_residency, folder=teacher):
        torch.testing.assert_close(result["hidden"], expected, rtol=1e-5, atol=1e-5)
        assert result["held"] == pytest.approx(whole_bytes / 2, rel=0.01)
    assert (contaminated - expected).abs().max() > 0.1


def test_rotary_frequencies_stay_fp32_in_a_bf16_model(teacher, two_ranks):
    for result in two_ranks.run(hidden_and_residency, folder=teacher, precision="bf16"):
        assert result["inv_freq"] == torch.float32


def test_loading_needs_its_shard_and_one_parameter(two_ranks, tmp_path):
    folder = str(save_tiny_llama(tmp_path / "big", seed=1, layers=4, hidden=768, vocab=4001))
    for result in two_ranks.run(loading_peak, folder=folder):
        # Slack for the allocator and the tensors' headers: 2 MB.
        assert result["growth"] <= result["shard"] + result["largest"] + 2_000_000, result


def test_folders_that_cannot_be_loaded(teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*can carry code"):
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
        tensor_files(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.model = 'no/such folder'"):
        find_model("no/such folder", key="teacher.model", revision=None, trust_remote_code=False, first=None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ConfigError, match=r"teacher\.model.*no usable config\.json"):
        read_config(tmp_path, key="teacher.model", trust_remote_code=False)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ConfigError, match="not a file name in this folder"):
        tensor_files(tmp_path)
    config = read_config(Path(teacher), key="teacher.model", trust_remote_code=False)
    with pytest.raises(ConfigError, match=r"student\.teacher_layers = \[0, 4\]: the model has layers 0 to 3; 4 is"):
        config_with_layers(config, layers=[0, 4])


def test_missing_and_misshapen_tensors_are_named(teacher, two_ranks, tmp_path):
    tensors = load_file(f"{teacher}/model.safetensors")
    norm = "model.norm.weight"
    for name, change, message in (
        ("missing", lambda t: {k: v for k, v in t.items() if k != norm}, rf"no tensor '{norm}'"),
        ("shape", lambda t: t | {norm: torch.ones(7)}, rf"{norm}' has shape \(7,\)"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(Path(teacher, "config.json").read_text())
        save_file(change(dict(tensors)), folder / "model.safetensors")
        with pytest.raises(AssertionError, match=message):
            two_ranks.run(loaded_weights, folder=str(folder))
