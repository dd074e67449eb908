"""Whole runs of mixture-of-experts students: what they record and leave, and resume bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moe import EXPERTS, FAMILIES, tiny_moe_config
from tiny_run import distil, distil_until, metrics, settings

MEASURED = ("perf/", "memory/", "time/")
ROUTER = {"balance": 0.05, "z": 0.01, "distil": {"weight": 0.5}}


def moe_folder(folder: Path, *, like: Path, family: str, layers: int, seed: int, **changes) -> Path:
    """A random mixture with the tokenizer and sizes of the model in `like`."""
    import shutil

    from transformers import AutoModelForCausalLM

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    dense = json.loads((like / "config.json").read_text())
    config = tiny_moe_config(
        family, layers=layers, hidden=dense["hidden_size"], vocab=dense["vocab_size"], **FAMILIES[family], **changes
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, dense[name])
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixtures(tiny_assets, tmp_path_factory):
    folder, like = tmp_path_factory.mktemp("mixtures"), tiny_assets / "teacher"
    return {
        "teacher": moe_folder(folder / "teacher", like=like, family="mixtral", layers=4, seed=1),
        "student": moe_folder(folder / "student", like=like, family="qwen3_moe", layers=2, seed=2),
    }


def tree_of(tiny_assets, mixtures, run_dir, **changes):
    options = {
        "teacher__model": str(mixtures["teacher"]),
        "student": {"model": str(mixtures["student"]), "deepspeed": "ds_configs/zero3_tiny.json"},
        "objective": {"alpha": 0.9, "router": ROUTER},
        "train__activation_checkpointing": True,
    }
    return settings(tiny_assets, run_dir, **(options | changes))


@pytest.fixture(scope="module")
def straight(tiny_assets, mixtures, two_ranks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("moe_runs") / "straight"
    two_ranks.run(distil, tree=tree_of(tiny_assets, mixtures, run_dir))
    return run_dir


def test_routers_are_recorded(straight):
    records = metrics(straight)
    for record in records:
        names = {"max_load", "dead_frac", "entropy"}
        assert {f"router/{name}{layer}" for name in names for layer in ("", "/layer_0", "/layer_1")} <= record.keys()
        # Layers of two are compared with those at the same depth of four.
        assert {"router/overlap/layers_0_1", "router/overlap/layers_1_3"} <= record.keys()
        assert {"router/load_balance", "router/router_z", "router/router_kl"} <= record.keys()
        assert 1.0 <= record["router/max_load"] <= EXPERTS / 2 and 0 <= record["router/overlap"] <= 1
        parts = sum(record[f"router_weighted/{name}"] for name in ("load_balance", "router_z", "router_kl"))
        kd = record["kd_weighted/cross_entropy"] + record["kd_weighted/forward_kl"]
        assert record["loss"] == pytest.approx(kd + parts, rel=1e-5)
    assert records[0]["router/load_balance"] == pytest.approx(1.0, rel=1e-5)
    assert records[-1]["router/router_kl"] < records[0]["router/router_kl"]


def test_tensorboard_shows_the_loads_as_images(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("router/load")] == [1, 2, 3, 4, 5, 6]
    assert {"router/max_load", "router/overlap", "router/router_kl"} <= set(events.Tags()["scalars"])


def test_a_stopped_run_resumes_bit_for_bit(straight, tiny_assets, mixtures, two_ranks, tmp_path):
    tree = tree_of(tiny_assets, mixtures, tmp_path / "run")
    assert two_ranks.run(distil_until, tree=tree, step=3, rank=1) == [None, None]
    two_ranks.run(distil, tree=tree)

    def numbers(run_dir):
        return [{n: v for n, v in record.items() if not n.startswith(MEASURED)} for record in metrics(run_dir)]

    assert numbers(tmp_path / "run") == numbers(straight)
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_export_is_a_plain_mixture(straight, tiny_assets, mixtures, one_rank, tmp_path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        straight / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before = AutoModelForCausalLM.from_config(model.config)
    before.load_state_dict(load_file(mixtures["student"] / "model.safetensors"))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits, earlier = model(input_ids=ids).logits, before(input_ids=ids).logits
    assert (logits - earlier).abs().max() > 1e-3
    # The exported student scores what the run's last evaluation says.
    summary = json.loads((straight / "summary.json").read_text())
    tree = tree_of(tiny_assets, mixtures, tmp_path / "again", train__max_steps=1, optim__warmup_steps=0)
    tree["student"]["model"] = str(straight / "export")
    (again,) = one_rank.run(distil, tree=tree)
    assert again["eval"]["before"]["perplexity"] == pytest.approx(summary["eval"]["after"]["perplexity"], rel=1e-4)
